/* scale, NEON: its two kinds of terms. */
#include "simd_neon.h"
#include "scale_groups.h"

static inline uint32x4_t load(const int32_t *from)
{
    return vreinterpretq_u32_s32(vld1q_s32(from));
}

/* Sum of (code - zero) q, from 32-bit integers; unsigned ones, since they may wrap around. */
static inline bn_floats integer_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                       size_t at)
{
    uint32x4_t product = load(acc);

    if (a->parts == 2) {
        const uint32x4_t codes = vshlq_n_u32(load(a->code_sum + at), 7);
        product = vaddq_u32(vshlq_n_u32(product, 8), load(acc + a->groups * BN_SUPER));
        product = vaddq_u32(product, codes);
    }
    product = vsubq_u32(product, vdupq_n_u32((uint32_t)a->zero * (uint32_t)sum));
    return vcvtq_f32_s32(vreinterpretq_s32_u32(product));
}

static inline float64x2_t to_double(const int32_t *from)
{
    return vcvtq_f64_s64(vmovl_s32(vld1_s32(from)));
}

/* Half a term: two lanes in double. */
static inline float32x2_t half_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                    size_t at)
{
    const float64x2_t zero_point = vcvt_f64_f32(vld1_f32(a->zero_point + at));
    float64x2_t product = to_double(acc);

    if (a->parts == 2) {
        const float64x2_t codes = vmulq_n_f64(to_double(a->code_sum + at), 128.0);
        product = vmulq_n_f64(product, 256.0);
        product = vaddq_f64(product, to_double(acc + a->groups * BN_SUPER));
        product = vaddq_f64(product, codes);
    }
    return vcvt_f32_f64(vsubq_f64(product, vmulq_n_f64(zero_point, (double)sum)));
}

static inline bn_floats affine_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                      size_t at)
{
    return vcombine_f32(half_term(a, acc, sum, at), half_term(a, acc + 2, sum, at + 2));
}

void bn_scale_i32_neon(const bn_scale_args *a)
{
    if (a->zero_point) {
        bn_add_all_groups(a, affine_term);
    } else {
        bn_add_all_groups(a, integer_term);
    }
}
