/* What the SIMD kernels of hadamard share: blocks of at least a vector of floats.  The header of the
 * instruction set (simd_*.h) comes before it.
 *
 * Up to 16 vectors lie in registers through all of their stages: those within a vector, which each
 * kernel brings, then those that pair registers.  A larger block is done 16 vectors at a time, then
 * its last stages in memory, which is the first-level cache. */
#ifndef BN_HADAMARD_WIDE_H
#define BN_HADAMARD_WIDE_H

#include "hadamard.h"

/* All stages within a vector. */
typedef bn_floats bn_within_fn(bn_floats v);

/* All stages of `count` vectors; count is a constant, so that v lies in registers. */
BN_INLINE void bn_across(const float *x, const float *signs, float *y, const size_t count,
                         bn_floats scale, bn_within_fn *within)
{
    bn_floats v[16];

#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        v[i] = within(bn_mul(bn_load_floats(x + i * BN_FLOATS), bn_load_floats(signs + i * BN_FLOATS)));
    }
#pragma GCC unroll 4
    for (size_t stride = 1; stride < count; stride *= 2) {
#pragma GCC unroll 16
        for (size_t i = 0; i < count; i++) {
            if (!(i & stride)) {
                const bn_floats first = v[i], second = v[i + stride];
                v[i] = bn_add(first, second);
                v[i + stride] = bn_sub(first, second);
            }
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        bn_store_floats(y + i * BN_FLOATS, bn_mul(v[i], scale));
    }
}

/* The stages of a block from this stride on; the last one multiplies by the scale. */
static inline void bn_in_memory(float *y, size_t block, size_t stride, bn_floats scale)
{
    for (; stride < block; stride *= 2) {
        const bn_floats factor = 2 * stride == block ? scale : bn_all(1.0f);
        for (size_t at = 0; at < block; at += 2 * stride) {
            for (float *first = y + at; first < y + at + stride; first += BN_FLOATS) {
                const bn_floats a = bn_load_floats(first), b = bn_load_floats(first + stride);
                bn_store_floats(first, bn_mul(bn_add(a, b), factor));
                bn_store_floats(first + stride, bn_mul(bn_sub(a, b), factor));
            }
        }
    }
}

/* Rows of blocks of at least `count` vectors; count is a constant. */
BN_INLINE void bn_wide_blocks(const bn_hadamard_args *a, const size_t count, bn_within_fn *within)
{
    const size_t block = a->block, step = count * BN_FLOATS;
    const bn_floats scale = bn_all(bn_hadamard_scale(block));
    const bn_floats factor = block == step ? scale : bn_all(1.0f);

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < a->k; at += block) {
            for (size_t i = at; i < at + block; i += step) {
                bn_across(x + i, a->signs + i, y + i, count, factor, within);
            }
            bn_in_memory(y + at, block, step, scale);
        }
    }
}

/* Rows of blocks of a vector and more. */
BN_INLINE void bn_hadamard_wide(const bn_hadamard_args *a, bn_within_fn *within)
{
    switch (a->block / BN_FLOATS) {
    case 1: bn_wide_blocks(a, 1, within); break;
    case 2: bn_wide_blocks(a, 2, within); break;
    case 4: bn_wide_blocks(a, 4, within); break;
    case 8: bn_wide_blocks(a, 8, within); break;
    default: bn_wide_blocks(a, 16, within); break;
    }
}

#endif
