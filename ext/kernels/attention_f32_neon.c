/* attention, NEON: strips of 6 rows x 4 vectors, 24 of the 32 registers. */
#include "simd_neon.h"
#include "exponential.h"

enum { BN_STRIP_VECTORS = 4 };

BN_INLINE bn_floats bn_zero_if_below(bn_floats x, bn_floats least, bn_floats value)
{
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), vcltq_f32(x, least)));
}

/* 2^n for n + BN_EXP_SHIFT. */
BN_INLINE bn_floats bn_power_of_two(bn_floats shifted)
{
    const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    return vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(BN_EXP_ONE_BITS)));
}

BN_INLINE float bn_max_of(bn_floats v)
{
    return vmaxvq_f32(v);
}

BN_INLINE float bn_sum_16(const bn_floats *v)
{
    const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

#include "attention_wide.h"

void bn_attention_f32_neon(const bn_attention_args *a)
{
    bn_attention_wide(a);
}
