/* dot, NEON of ARMv8.0.
 *
 * Layout   A field of a quarter (simd_neon.h) meets its four activations, repeated for each of the
 *          four outputs: a lane of 16 bits sums the products of one byte lane.
 * Numbers  Codes may be 3, so a product is at most 3 * 128 = 384 in magnitude.  A step adds four to
 *          a lane; 21 steps, 84 * 384 = 32256, fit 16 bits.  Then pairs are widened to 32 bits.
 * Method   smlal and smlal2 add 8 products each.  One row: 32 outputs at once.  Several rows: 2
 *          rows x 16 outputs share each unpacked field.
 * Counted  0.265 instructions per weight with 1 row, 0.225 per weight and row with more
 *          (bench/instructions.py; never timed).
 */
#include <string.h>

#include "simd_neon.h"

enum { STEPS = 21 };

static inline int8x16_t broadcast(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* Up to STEPS steps; acc (rows, acc_stride) gets 4 outputs for each of `quarters` quarters, added
 * to what is there unless the sum is fresh. */
BN_INLINE void add_steps(const uint8_t *panel, size_t stride, const int8_t *q, size_t q_stride,
                         size_t steps, int fresh, int32_t *acc, size_t acc_stride, const int rows,
                         const int quarters)
{
    int16x8_t low[2][8], high[2][8]; /* of the first and of the last two outputs of a quarter */

#pragma GCC unroll 2
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            low[row][i] = high[row][i] = vdupq_n_s16(0);
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
        int8x16_t x[2][4];
#pragma GCC unroll 2
        for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                x[row][field] = broadcast(q + (size_t)row * q_stride + 4 * field);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            BN_ORDER_LOADS();
            const bn_fields codes = bn_unpack(vld1q_u8(panel + i * BN_QUARTER));
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const int8x16_t c = codes.field[field];
#pragma GCC unroll 2
                for (int row = 0; row < rows; row++) {
                    low[row][i] =
                        vmlal_s8(low[row][i], vget_low_s8(c), vget_low_s8(x[row][field]));
                    high[row][i] = vmlal_high_s8(high[row][i], c, x[row][field]);
                }
            }
        }
    }
#pragma GCC unroll 2
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            int32_t *to = acc + (size_t)row * acc_stride + i * BN_QUARTER_OUTPUTS;
            const int32x4_t sum = vpaddq_s32(vpaddlq_s16(low[row][i]), vpaddlq_s16(high[row][i]));
            vst1q_s32(to, fresh ? sum : vaddq_s32(vld1q_s32(to), sum));
        }
    }
}

/* All groups of `rows` rows from `first` on, for `quarters` quarters from `from` on. */
BN_INLINE void all_groups(const bn_dot_args *a, size_t first, size_t from, const int rows,
                          const int quarters)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;
    const uint8_t *panel = a->panel + from * BN_QUARTER;
    const int8_t *q = a->q + first * a->q_stride;

    for (size_t g = 0; g < groups; g++) {
        int32_t *acc = a->acc + (first * groups + g) * BN_SUPER + from * BN_QUARTER_OUTPUTS;
        const size_t left = a->steps - g * a->group_steps;
        const size_t end = left < a->group_steps ? left : a->group_steps;

        for (size_t step = 0; step < end; step += STEPS) {
            const size_t steps = end - step < STEPS ? end - step : STEPS;
            add_steps(panel, stride, q, a->q_stride, steps, step == 0, acc, groups * BN_SUPER, rows,
                      quarters);
            panel += steps * stride;
            q += steps * BN_STEP;
        }
    }
}

void bn_dot_i2s_neon(const bn_dot_args *a)
{
    const size_t quarters = a->panels * BN_QUARTERS;
    size_t row = 0, from = 0;

    for (; row + 2 <= a->rows; row += 2) {
        for (from = 0; from < quarters; from += 4) {
            all_groups(a, row, from, 2, 4);
        }
    }
    if (row < a->rows) {
        for (from = 0; from + 8 <= quarters; from += 8) {
            all_groups(a, row, from, 1, 8);
        }
        if (from < quarters) {
            all_groups(a, row, from, 1, 4);
        }
    }
}
