/* dot of one row with sdot: the part that the kernels of dotprod and i8mm share, since smmla gains
 * nothing there.
 *
 * Method   sdot by lane multiplies 4 outputs x 4 inputs.  Fields 0 to 2 are masked in place, and
 *          their sums carry the factors 1, 4 and 16 until the end, where shifts undo them exactly.
 *          Field 3 is shifted down, since at its place it would be signed, and joins field 0.
 *          That is 2 instructions per field.  32 outputs at once: 24 sums, 3 masks, 1 vector of
 *          activations and 4 temporaries are all 32 registers.
 * Numbers  A step adds at most 4 * (16 * 3) * 128 to a lane, less than BN_MAX_GROUP allows for. */
#ifndef BN_DOT_ROW_DOTPROD_H
#define BN_DOT_ROW_DOTPROD_H

#include "simd_neon.h"

/* One group; acc gets 4 outputs for each of `quarters` quarters. */
BN_INLINE void bn_dot_row_group(const uint8_t *panel, size_t stride, const int8_t *q, size_t steps,
                                int32_t *acc, const int quarters)
{
    int32x4_t by1[8], by4[8], by16[8];

#pragma GCC unroll 8
    for (int i = 0; i < quarters; i++) {
        by1[i] = by4[i] = by16[i] = vdupq_n_s32(0);
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
        const int8x16_t x = vld1q_s8(q);
#pragma GCC unroll 8
        for (int i = 0; i < quarters; i++) {
            BN_ORDER_LOADS();
            const uint8x16_t codes = vld1q_u8(panel + i * BN_QUARTER);
            const int8x16_t field3 = vreinterpretq_s8_u8(vshrq_n_u8(codes, 6));
            const int8x16_t field0 = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(0x03)));
            const int8x16_t field1 = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(0x0C)));
            const int8x16_t field2 = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(0x30)));
            by1[i] = vdotq_laneq_s32(by1[i], field0, x, 0);
            by4[i] = vdotq_laneq_s32(by4[i], field1, x, 1);
            by16[i] = vdotq_laneq_s32(by16[i], field2, x, 2);
            by1[i] = vdotq_laneq_s32(by1[i], field3, x, 3);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < quarters; i++) {
        const int32x4_t sum = vsraq_n_s32(vsraq_n_s32(by1[i], by4[i], 2), by16[i], 4);
        vst1q_s32(acc + i * BN_QUARTER_OUTPUTS, sum);
    }
}

/* All groups of row `row`, for `quarters` quarters from `from` on. */
BN_INLINE void bn_dot_row_part(const bn_dot_args *a, size_t row, size_t from, const int quarters)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;

    for (size_t g = 0; g < groups; g++) {
        const size_t begin = g * a->group_steps;
        const size_t left = a->steps - begin;
        bn_dot_row_group(a->panel + begin * stride + from * BN_QUARTER, stride,
                         a->q + row * a->q_stride + begin * BN_STEP,
                         left < a->group_steps ? left : a->group_steps,
                         a->acc + (row * groups + g) * BN_SUPER + from * BN_QUARTER_OUTPUTS,
                         quarters);
    }
}

BN_INLINE void bn_dot_row(const bn_dot_args *a, size_t row)
{
    const size_t quarters = a->panels * BN_QUARTERS;
    size_t from = 0;

    for (; from + 8 <= quarters; from += 8) {
        bn_dot_row_part(a, row, from, 8);
    }
    if (from < quarters) {
        bn_dot_row_part(a, row, from, 4);
    }
}

#endif
