/* dot with codes of 4 bits, ARMv8.2 with the dot product extension. */
#include "dot_wide_dotprod.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_wide_dotprod(s, rows, panels, 4);
}

void bn_dot_w4_dotprod(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 4, a->group_steps);
    bn_all_rows(&strips, multiply, 4, 4);
}
