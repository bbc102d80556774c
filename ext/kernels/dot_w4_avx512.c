/* dot with codes of 4 bits, AVX-512 without VNNI. */
#include "dot_wide_avx512.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_wide_avx512(s, rows, panels, 4);
}

void bn_dot_w4_avx512(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 4, a->group_steps);
    bn_all_rows(&strips, multiply, 4, 16);
}
