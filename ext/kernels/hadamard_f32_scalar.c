/* hadamard, scalar. */
#include "hadamard.h"

static void transform(const float *x, const float *signs, float *y, size_t block)
{
    const float scale = bn_hadamard_scale(block);

    for (size_t i = 0; i < block; i++) {
        y[i] = x[i] * signs[i];
    }
    for (size_t stride = 1; stride < block; stride *= 2) {
        for (size_t at = 0; at < block; at += 2 * stride) {
            for (size_t i = at; i < at + stride; i++) {
                const float first = y[i], second = y[i + stride];
                y[i] = first + second;
                y[i + stride] = first - second;
            }
        }
    }
    for (size_t i = 0; i < block; i++) {
        y[i] *= scale;
    }
}

void bn_hadamard_f32_scalar(const bn_hadamard_args *a)
{
    for (size_t row = 0; row < a->rows; row++) {
        for (size_t at = 0; at < a->k; at += a->block) {
            transform(a->x + row * a->k + at, a->signs + at, a->y + row * a->k + at, a->block);
        }
    }
}
