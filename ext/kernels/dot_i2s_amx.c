/* dot with codes of 2 bits, AMX. */
#include "dot_amx.h"

void bn_dot_i2s_amx(const bn_dot_args *a)
{
    bn_dot_amx(a, 2, bn_dot_i2s_avx512vnni);
}
