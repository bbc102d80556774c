/* dot with codes of 2 bits, AVX512-VNNI.
 *
 * Tried    gf2p8affineqb in place of shift and mask: the same to 5 % slower on Zen 5, where
 *          shifts do not compete with vpdpbusd and gf2p8affineqb does.
 * Measured 2560 x 2560 on a Zen 5 core at 3.8 GHz, whose vpdpbusd makes 483 products per ns: 450
 *          per ns with 1 row, 430 with 2, 480 with more.  One row with weights from memory runs at
 *          the speed of a loop that only reads them.
 */
#include "dot_avx512vnni.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_avx512vnni(s, rows, panels, 2);
}

void bn_dot_i2s_avx512vnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 2, a->group_steps);
    bn_all_rows(&strips, multiply, 8, 24);
}
