/* dot with codes of 4 and 8 bits, ARMv8.6 with 8-bit matrix products.
 *
 * Layout   usmmla multiplies 2 outputs x 8 inputs, unsigned, with 2 rows x 8 inputs, signed.  The
 *          words of two fields of a quarter (simd_neon.h), interleaved, are its first operand, and
 *          halves of the activations of two rows the second.
 * Numbers  Nothing saturates, and all sums fit 32 bits (BN_MAX_WIDE_GROUP in layout.h).
 * Method   One row: usdot, 64 outputs at once.  Several rows: up to 4 rows x 16 outputs share each
 *          operand, with 16 independent sums.  Of an odd number of rows the last one meets itself,
 *          and what comes of its double is not stored. */
#ifndef BN_DOT_WIDE_I8MM_H
#define BN_DOT_WIDE_I8MM_H

#include "simd_neon.h"
#include "strips.h"

BN_INLINE void bn_one_row(const bn_strip *s, const int panels, const int bits)
{
    const int quarters = panels * BN_QUARTERS;
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    int32x4_t sum[16];

#pragma GCC unroll 16
    for (int i = 0; i < quarters; i++) {
        sum[i] = vdupq_n_s32(0);
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        const int8x16_t x = vld1q_s8(q);
#pragma GCC unroll 16
        for (int i = 0; i < quarters; i++) {
            const uint8_t *at = panel + (size_t)(i / BN_QUARTERS) * bn_step_bytes(bits) +
                                i % BN_QUARTERS * BN_QUARTER;
            BN_ORDER_LOADS();
            sum[i] = vusdotq_laneq_s32(sum[i], bn_wide_field(at, 0, bits), x, 0);
            sum[i] = vusdotq_laneq_s32(sum[i], bn_wide_field(at, 1, bits), x, 1);
            sum[i] = vusdotq_laneq_s32(sum[i], bn_wide_field(at, 2, bits), x, 2);
            sum[i] = vusdotq_laneq_s32(sum[i], bn_wide_field(at, 3, bits), x, 3);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < quarters; i++) {
        vst1q_s32((int32_t *)s->acc + i * BN_QUARTER_OUTPUTS, sum[i]);
    }
}

/* Two fields of a quarter as operands of its first and of its last two outputs. */
BN_INLINE void bn_interleave(const uint8_t *at, const int field, const int bits, uint8x16_t *out)
{
    const uint32x4_t first = vreinterpretq_u32_u8(bn_wide_field(at, field, bits));
    const uint32x4_t second = vreinterpretq_u32_u8(bn_wide_field(at, field + 1, bits));

    out[0] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
    out[1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
}

BN_INLINE void bn_some_rows(const bn_strip *s, const int rows, const int panels, const int bits)
{
    const int quarters = panels * BN_QUARTERS;
    const int pairs = (rows + 1) / 2;
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    int32x4_t sum[2][8][2]; /* a lane each for 2 outputs x 2 rows */

#pragma GCC unroll 2
    for (int pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            sum[pair][i][0] = sum[pair][i][1] = vdupq_n_s32(0);
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        int8x16_t x[2][2];
#pragma GCC unroll 2
        for (int pair = 0; pair < pairs; pair++) {
            const int last = 2 * pair + 1 < rows ? 2 * pair + 1 : 2 * pair;
            const int64x2_t x0 =
                vreinterpretq_s64_s8(vld1q_s8(q + (size_t)(2 * pair) * s->x_stride));
            const int64x2_t x1 = vreinterpretq_s64_s8(vld1q_s8(q + (size_t)last * s->x_stride));
            x[pair][0] = vreinterpretq_s8_s64(vzip1q_s64(x0, x1));
            x[pair][1] = vreinterpretq_s8_s64(vzip2q_s64(x0, x1));
        }
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            const uint8_t *at = panel + (size_t)(i / BN_QUARTERS) * bn_step_bytes(bits) +
                                i % BN_QUARTERS * BN_QUARTER;
            BN_ORDER_LOADS();
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                uint8x16_t c[2];
                bn_interleave(at, 2 * half, bits, c);
#pragma GCC unroll 2
                for (int pair = 0; pair < pairs; pair++) {
                    sum[pair][i][0] = vusmmlaq_s32(sum[pair][i][0], c[0], x[pair][half]);
                    sum[pair][i][1] = vusmmlaq_s32(sum[pair][i][1], c[1], x[pair][half]);
                }
            }
        }
    }
#pragma GCC unroll 2
    for (int pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)(2 * pair) * s->acc_stride +
                          i * BN_QUARTER_OUTPUTS;
            vst1q_s32(to, vuzp1q_s32(sum[pair][i][0], sum[pair][i][1]));
            if (2 * pair + 1 < rows) {
                vst1q_s32(to + s->acc_stride, vuzp2q_s32(sum[pair][i][0], sum[pair][i][1]));
            }
        }
    }
}

BN_INLINE void bn_multiply_wide_i8mm(const bn_strip *s, const int rows, const int panels,
                                     const int bits)
{
    if (rows == 1) {
        bn_one_row(s, panels, bits);
    } else {
        bn_some_rows(s, rows, panels, bits);
    }
}

#endif
