/* dot with codes of 4 and 8 bits, NEON of ARMv8.0.
 *
 * Layout   A field of a quarter (simd_neon.h) meets its four activations, repeated for each of the
 *          four outputs: a lane of 16 bits sums the products of one byte lane.
 * Numbers  Of codes of 8 bits the low and the high 4 bits are multiplied apart.  With 4 bits a
 *          product is at most 15 * 128 = 1920 in magnitude, and two lanes of the four of a step
 *          15360: they fit 16 bits.  Then they are widened to 32 bits, where the high bits get their
 *          factor 16 (BN_MAX_WIDE_GROUP in layout.h).
 * Method   smlal and smlal2 add 8 products each.  Up to 4 rows x 16 outputs share each unpacked
 *          field, or one row has 64 outputs at once, with 16 independent sums. */
#ifndef BN_DOT_WIDE_NEON_H
#define BN_DOT_WIDE_NEON_H

#include "simd_neon.h"
#include "strips.h"

/* Products of a step with 4 bits of its codes, as 4 outputs in pairs of lanes. */
BN_INLINE int16x8_t bn_pairs(const int8x16_t *codes, const int8_t *q)
{
    int16x8_t low = vdupq_n_s16(0), high = low;

#pragma GCC unroll 4
    for (int field = 0; field < 4; field++) {
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(bn_load_four(q + 4 * field)));
        low = vmlal_s8(low, vget_low_s8(codes[field]), vget_low_s8(x));
        high = vmlal_high_s8(high, codes[field], x);
    }
    return vpaddq_s16(low, high);
}

BN_INLINE void bn_multiply_wide_neon(const bn_strip *s, const int rows, const int panels,
                                     const int bits)
{
    const int quarters = panels * BN_QUARTERS;
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    int32x4_t sum[4][16];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            sum[row][i] = vdupq_n_s32(0);
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            const uint8_t *at = panel + (size_t)(i / BN_QUARTERS) * bn_step_bytes(bits) +
                                i % BN_QUARTERS * BN_QUARTER;
            int8x16_t low[4], high[4];
            BN_ORDER_LOADS();
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const uint8x16_t codes = bn_wide_field(at, field, bits);
                low[field] = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
                high[field] = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
            }
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                const int8_t *at_row = q + (size_t)row * s->x_stride;
                sum[row][i] = vpadalq_s16(sum[row][i], bn_pairs(low, at_row));
                if (bits == 8) {
                    const int32x4_t wide = vpaddlq_s16(bn_pairs(high, at_row));
                    sum[row][i] = vaddq_s32(sum[row][i], vshlq_n_s32(wide, 4));
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride;
            vst1q_s32(to + i * BN_QUARTER_OUTPUTS, sum[row][i]);
        }
    }
}

#endif
