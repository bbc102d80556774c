/* dot with codes of 8 bits, AVX512-VNNI.
 *
 * Method   8 rows x 32 outputs, since 4 x 64 read each code twice as often from the second-level
 *          cache, which is too slow for that.
 * Measured 2560 x 2560 on a Zen 5 core: 480 products per ns with 8 rows and more, 445 to 470 with 4 x 64.
 */
#include "dot_avx512vnni.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_multiply_avx512vnni(s, rows, panels, 8);
}

void bn_dot_w8_avx512vnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 8, a->group_steps);
    bn_all_rows(&strips, multiply, 8, 16);
}
