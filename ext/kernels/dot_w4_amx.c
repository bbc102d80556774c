/* dot with codes of 4 bits, AMX. */
#include "dot_amx.h"

void bn_dot_w4_amx(const bn_dot_args *a)
{
    bn_dot_amx(a, 4, bn_dot_w4_avx512vnni);
}
