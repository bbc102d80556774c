/* What the AVX2 kernels share: vectors of floats, by names that are the same in the header of each
 * instruction set, for kernels whose shape is (attention_wide.h, hadamard_wide.h, scale_groups.h). */
#ifndef BN_SIMD_AVX2_H
#define BN_SIMD_AVX2_H

#include <immintrin.h>

#include "kernel.h"

typedef __m256 bn_floats;

enum { BN_FLOATS = 8 };

BN_INLINE bn_floats bn_load_floats(const float *from)
{
    return _mm256_loadu_ps(from);
}

BN_INLINE void bn_store_floats(float *to, bn_floats v)
{
    _mm256_storeu_ps(to, v);
}

BN_INLINE bn_floats bn_all(float value)
{
    return _mm256_set1_ps(value);
}

BN_INLINE bn_floats bn_add(bn_floats a, bn_floats b)
{
    return _mm256_add_ps(a, b);
}

BN_INLINE bn_floats bn_sub(bn_floats a, bn_floats b)
{
    return _mm256_sub_ps(a, b);
}

BN_INLINE bn_floats bn_mul(bn_floats a, bn_floats b)
{
    return _mm256_mul_ps(a, b);
}

/* a * b + c, rounded once. */
BN_INLINE bn_floats bn_fma(bn_floats a, bn_floats b, bn_floats c)
{
    return _mm256_fmadd_ps(a, b, c);
}

/* The larger one; where b is NaN, that. */
BN_INLINE bn_floats bn_max(bn_floats a, bn_floats b)
{
    return _mm256_max_ps(a, b);
}

#endif
