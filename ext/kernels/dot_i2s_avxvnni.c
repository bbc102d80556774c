/* dot with codes of 2 bits, AVX-VNNI. */
#include "dot_avxvnni.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_avxvnni(s, rows, panels, 2);
}

void bn_dot_i2s_avxvnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 2, a->group_steps);
    bn_all_rows(&strips, multiply, 4, 4);
}
