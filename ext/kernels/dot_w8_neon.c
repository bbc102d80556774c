/* dot with codes of 8 bits, NEON of ARMv8.0. */
#include "dot_wide_neon.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_wide_neon(s, rows, panels, 8);
}

void bn_dot_w8_neon(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 8, a->group_steps);
    bn_all_rows(&strips, multiply, 4, 4);
}
