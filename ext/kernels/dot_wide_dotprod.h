/* dot with codes of 4 and 8 bits, ARMv8.2 with the dot product extension.
 *
 * Layout   A field of a quarter (simd_neon.h) is the operand of sdot for 4 outputs x 4 inputs, and a
 *          vector of 16 activations is that of all four fields, selected by lane.
 * Numbers  sdot wants signed codes: of 8 bits it gets code - 128, and 128 times the sum of the
 *          activations comes back at the end.  All sums fit 32 bits (BN_MAX_WIDE_GROUP in
 *          layout.h), or wrap around and back.
 * Method   Up to 4 rows x 16 outputs share each unpacked field, or one row has 64 outputs at once,
 *          with 16 independent sums. */
#ifndef BN_DOT_WIDE_DOTPROD_H
#define BN_DOT_WIDE_DOTPROD_H

#include "simd_neon.h"
#include "strips.h"

BN_INLINE void bn_multiply_wide_dotprod(const bn_strip *s, const int rows, const int panels,
                                        const int bits)
{
    const int quarters = panels * BN_QUARTERS;
    const uint8x16_t offset = vdupq_n_u8(bits == 8 ? 128 : 0);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    int32x4_t sum[4][16], total[4];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
        total[row] = vdupq_n_s32(0);
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            sum[row][i] = vdupq_n_s32(0);
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        int8x16_t x[4];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            x[row] = vld1q_s8(q + (size_t)row * s->x_stride);
            if (bits == 8) {
                total[row] = vdotq_s32(total[row], x[row], vdupq_n_s8(1));
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            const uint8_t *at = panel + (size_t)(i / BN_QUARTERS) * bn_step_bytes(bits) +
                                i % BN_QUARTERS * BN_QUARTER;
            int8x16_t c[4];
            BN_ORDER_LOADS();
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                c[field] = vreinterpretq_s8_u8(veorq_u8(bn_wide_field(at, field, bits), offset));
            }
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                sum[row][i] = vdotq_laneq_s32(sum[row][i], c[0], x[row], 0);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], c[1], x[row], 1);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], c[2], x[row], 2);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], c[3], x[row], 3);
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
        const int32x4_t back = vdupq_n_s32(128 * vaddvq_s32(total[row]));
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride;
            vst1q_s32(to + i * BN_QUARTER_OUTPUTS, vaddq_s32(sum[row][i], back));
        }
    }
}

#endif
