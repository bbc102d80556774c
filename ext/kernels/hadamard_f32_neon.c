/* hadamard, NEON.
 *
 * Method   Strides 1 and 2 pair lanes of two vectors at a time, which become sums and differences
 *          and are put back side by side; larger blocks see hadamard_wide.h.  Blocks of 1 and 2
 *          have a loop of their own.
 * Numbers  Sums, differences and products are those of the formula, each rounded by itself, so the bits
 *          are those of the scalar kernel.
 */
#include "simd_neon.h"
#include "hadamard_wide.h"

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

BN_INLINE bn_floats within_vector(bn_floats v)
{
    return stride_2(stride_1(v));
}

/* Rows of blocks of 1 and 2 values. */
static void narrow(const bn_hadamard_args *a)
{
    const float scale = bn_hadamard_scale(a->block);

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        size_t at = 0;

        for (; at + BN_FLOATS <= a->k; at += BN_FLOATS) {
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
    default: bn_hadamard_wide(a, within_vector); break;
    }
}
