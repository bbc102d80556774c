/* dot with codes of 8 bits, AMX. */
#include "dot_amx.h"

void bn_dot_w8_amx(const bn_dot_args *a)
{
    bn_dot_amx(a, 8, bn_dot_w8_avx512vnni);
}
