/* dot with codes of 8 bits, AVX-VNNI. */
#include "dot_avxvnni.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_avxvnni(s, rows, panels, 8);
}

void bn_dot_w8_avxvnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 8, a->group_steps);
    bn_all_rows(&strips, multiply, 4, 4);
}
