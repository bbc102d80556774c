/* actq, NEON.
 *
 * Method   Two passes over the row: the largest |x| as an integer (row_scale.h), then 16 values
 *          per step.  The last step of a group goes through a buffer padded with zeros, which
 *          quantize to the padding.
 * Numbers  fcvtns rounds half to even in every mode.  |q| <= 2^15 and there are 8 lanes of sums,
 *          each of at most 2^18 / 8 values, so the 32-bit sums of a group hold; saddlv adds the
 *          lanes in 64 bits.
 */
#include <string.h>

#include "row_scale.h"
#include "simd_neon.h"

static uint32_t absmax_bits(const float *x, size_t count)
{
    const uint32x4_t mask = vdupq_n_u32(BN_ABS_BITS);
    uint32x4_t most[4];
    uint32_t absmax;
    size_t i = 0;

    most[0] = most[1] = most[2] = most[3] = vdupq_n_u32(0);
    for (; i + 16 <= count; i += 16) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i + 4 * part));
            most[part] = vmaxq_u32(most[part], vandq_u32(bits, mask));
        }
    }
    absmax = vmaxvq_u32(vmaxq_u32(vmaxq_u32(most[0], most[1]), vmaxq_u32(most[2], most[3])));
    for (; i < count; i++) {
        const uint32_t bits = bn_float_bits(x[i]) & (uint32_t)BN_ABS_BITS;
        absmax = bits > absmax ? bits : absmax;
    }
    return absmax;
}

typedef struct {
    float32x4_t s, low, high;
} scales;

static inline int32x4_t quantize(const float *x, const scales *scale)
{
    const float32x4_t value = vmulq_f32(vld1q_f32(x), scale->s);
    return vcvtnq_s32_f32(vminq_f32(vmaxq_f32(value, scale->low), scale->high));
}

/* 8 values in 16 bits each, which they fit. */
static inline int16x8_t quantize8(const float *x, const scales *scale)
{
    return vcombine_s16(vmovn_s32(quantize(x, scale)), vmovn_s32(quantize(x + 4, scale)));
}

/* Writes 16 values and adds them to the sums. */
static inline void step(const bn_actq_args *a, const float *x, const scales *scale, int8_t *q,
                        int32x4_t *sums)
{
    const int16x8_t first = quantize8(x, scale);
    const int16x8_t second = quantize8(x + 8, scale);
    const int8x16_t low = vcombine_s8(vmovn_s16(first), vmovn_s16(second));

    if (a->bits == 8) {
        vst1q_s8(q, low);
    } else {
        vst1q_s8(q, vcombine_s8(vshrn_n_s16(first, 8), vshrn_n_s16(second, 8)));
        vst1q_s8(q + a->q_stride, veorq_s8(low, vdupq_n_s8(INT8_MIN))); /* - 128 modulo 256 */
    }
    sums[0] = vpadalq_s16(sums[0], first);
    sums[1] = vpadalq_s16(sums[1], second);
}

void bn_actq_f32_neon(const bn_actq_args *a)
{
    const bn_row_scale row = bn_make_row_scale(a, absmax_bits(a->x, a->groups.k));
    const scales scale = {vdupq_n_f32(row.s), vdupq_n_f32(row.low), vdupq_n_f32(row.high)};

    for (size_t g = 0; row.finite && g < a->groups.count; g++) {
        const float *x = a->x + g * a->groups.length;
        const size_t length = bn_group_length(&a->groups, g);
        int8_t *q = a->q + g * a->groups.stride;
        int32x4_t sums[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
        size_t i = 0;

        for (; i + BN_STEP <= length; i += BN_STEP) {
            step(a, x + i, &scale, q + i, sums);
        }
        if (i < length) {
            float tail[BN_STEP] = {0};
            memcpy(tail, x + i, (length - i) * sizeof *x);
            step(a, tail, &scale, q + i, sums);
        }
        a->sum[g] = vaddlvq_s32(sums[0]) + vaddlvq_s32(sums[1]);
    }
}
