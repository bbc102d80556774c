/* hadamard, NEON.
 *
 * Method   Up to 64 values lie in 16 registers through all of their stages: strides 1 and 2 pair lanes
 *          of two vectors at a time, which become sums and differences and are put back side by side;
 *          strides from 4 on pair registers.  A larger block is done 64 values at a time, then its last
 *          stages in memory, which is the first-level cache.  Blocks of 1 and 2 have a loop of their own.
 * Numbers  Sums, differences and products are those of the formula, each rounded by itself, so the bits
 *          are those of the scalar kernel.
 */
#include "hadamard.h"
#include "simd_neon.h"

enum { LANES = 4, REGISTERS = 16 };

/* The stage of stride 1: pairs (a, b) become (a + b, a - b). */
BN_INLINE float32x4_t stride_1(float32x4_t v)
{
    const float32x4_t first = vtrn1q_f32(v, v), second = vtrn2q_f32(v, v);
    return vtrn1q_f32(vaddq_f32(first, second), vsubq_f32(first, second));
}

/* The stage of stride 2. */
BN_INLINE float32x4_t stride_2(float32x4_t v)
{
    const float32x2_t first = vget_low_f32(v), second = vget_high_f32(v);
    return vcombine_f32(vadd_f32(first, second), vsub_f32(first, second));
}

/* All stages of 4 * count values; count is a constant, so that v lies in registers. */
BN_INLINE void across(const float *x, const float *signs, float *y, size_t count, float scale)
{
    float32x4_t v[REGISTERS];

#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        v[i] = vmulq_f32(vld1q_f32(x + i * LANES), vld1q_f32(signs + i * LANES));
        v[i] = stride_2(stride_1(v[i]));
    }
#pragma GCC unroll 4
    for (size_t stride = 1; stride < count; stride *= 2) {
#pragma GCC unroll 16
        for (size_t i = 0; i < count; i++) {
            if (!(i & stride)) {
                const float32x4_t first = v[i], second = v[i + stride];
                v[i] = vaddq_f32(first, second);
                v[i + stride] = vsubq_f32(first, second);
            }
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        vst1q_f32(y + i * LANES, vmulq_n_f32(v[i], scale));
    }
}

/* The stages of a block from this stride on; the last one multiplies by the scale. */
static void in_memory(float *y, size_t block, size_t stride, float scale)
{
    for (; stride < block; stride *= 2) {
        const float factor = 2 * stride == block ? scale : 1.0f;
        for (size_t at = 0; at < block; at += 2 * stride) {
            for (float *first = y + at; first < y + at + stride; first += LANES) {
                const float32x4_t a = vld1q_f32(first), b = vld1q_f32(first + stride);
                vst1q_f32(first, vmulq_n_f32(vaddq_f32(a, b), factor));
                vst1q_f32(first + stride, vmulq_n_f32(vsubq_f32(a, b), factor));
            }
        }
    }
}

/* Rows of blocks of at least 4 * count values; count is a constant. */
BN_INLINE void wide(const bn_hadamard_args *a, size_t count)
{
    const float scale = bn_hadamard_scale(a->block);
    const float factor = a->block == count * LANES ? scale : 1.0f;

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < a->k; at += a->block) {
            for (size_t i = at; i < at + a->block; i += count * LANES) {
                across(x + i, a->signs + i, y + i, count, factor);
            }
            in_memory(y + at, a->block, count * LANES, scale);
        }
    }
}

/* Rows of blocks of 1 and 2 values. */
static void narrow(const bn_hadamard_args *a)
{
    const float scale = bn_hadamard_scale(a->block);

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        size_t at = 0;

        for (; at + LANES <= a->k; at += LANES) {
            const float32x4_t v = vmulq_f32(vld1q_f32(x + at), vld1q_f32(a->signs + at));
            vst1q_f32(y + at, vmulq_n_f32(a->block == 2 ? stride_1(v) : v, scale));
        }
        if (at < a->k) {
            bn_hadamard_f32_scalar(
                &(bn_hadamard_args){x + at, a->signs + at, y + at, 1, a->k - at, a->block});
        }
    }
}

void bn_hadamard_f32_neon(const bn_hadamard_args *a)
{
    switch (a->block) {
    case 1:
    case 2: narrow(a); break;
    case 4: wide(a, 1); break;
    case 8: wide(a, 2); break;
    case 16: wide(a, 4); break;
    case 32: wide(a, 8); break;
    default: wide(a, 16); break;
    }
}
