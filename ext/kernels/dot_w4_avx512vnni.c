/* dot with codes of 4 bits, AVX512-VNNI. */
#include "dot_avx512vnni.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_avx512vnni(s, rows, panels, 4);
}

void bn_dot_w4_avx512vnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 4, a->group_steps);
    bn_all_rows(&strips, multiply, 8, 24);
}
