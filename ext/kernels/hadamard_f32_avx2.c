/* hadamard, AVX2.
 *
 * Method   Up to 128 values lie in 16 registers through all of their stages: strides 1 to 4 swap
 *          lanes within a register, strides from 8 on pair registers.  A larger block is done 128
 *          values at a time, then its last stages in memory, which is the first-level cache.
 *          Blocks of 2 and 4 lie side by side in a register; the last one may be cut by a mask.
 * Numbers  Within a register a pair (a, b) meets its swapped self (b, a): 1 * a + b and -1 * b + a.
 *          The products are exact, so the fused operation rounds once, like a + b and a - b.
 * Measured GB/s read and written, one core of a Zen 5 with gcc 12, x of 256 KiB: blocks of 8 86,
 *          32 63, 64 60, 128 52 (45 with 8 registers and one stage in memory), 1024 35.
 *          x of 128 MiB, on a busy machine: blocks of 32 to 256 14 to 28, memcpy 18 to 24.
 */
#include <immintrin.h>

#include "hadamard.h"

enum { LANES = 8, REGISTERS = 16 };

/* The stages with strides up to width / 2, at most 4. */
BN_INLINE __m256 within(__m256 v, size_t width)
{
    if (width >= 2) {
        const __m256 signs = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute_ps(v, 0xB1));
    }
    if (width >= 4) {
        const __m256 signs = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute_ps(v, 0x4E));
    }
    if (width >= 8) {
        const __m256 signs = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute2f128_ps(v, v, 0x01));
    }
    return v;
}

/* All stages of 8 * count values; count is a constant, so that v lies in registers. */
BN_INLINE void across(const float *x, const float *signs, float *y, size_t count, __m256 scale)
{
    __m256 v[REGISTERS];

#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        const __m256 signed_x =
            _mm256_mul_ps(_mm256_loadu_ps(x + i * LANES), _mm256_loadu_ps(signs + i * LANES));
        v[i] = within(signed_x, LANES);
    }
#pragma GCC unroll 4
    for (size_t stride = 1; stride < count; stride *= 2) {
#pragma GCC unroll 16
        for (size_t i = 0; i < count; i++) {
            if (!(i & stride)) {
                const __m256 first = v[i], second = v[i + stride];
                v[i] = _mm256_add_ps(first, second);
                v[i + stride] = _mm256_sub_ps(first, second);
            }
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        _mm256_storeu_ps(y + i * LANES, _mm256_mul_ps(v[i], scale));
    }
}

/* The stages of a block from this stride on; the last one multiplies by the scale. */
static void in_memory(float *y, size_t block, size_t stride, __m256 scale)
{
    for (; stride < block; stride *= 2) {
        const __m256 factor = 2 * stride == block ? scale : _mm256_set1_ps(1.0f);
        for (size_t at = 0; at < block; at += 2 * stride) {
            for (float *first = y + at; first < y + at + stride; first += LANES) {
                const __m256 a = _mm256_loadu_ps(first), b = _mm256_loadu_ps(first + stride);
                _mm256_storeu_ps(first, _mm256_mul_ps(_mm256_add_ps(a, b), factor));
                _mm256_storeu_ps(first + stride, _mm256_mul_ps(_mm256_sub_ps(a, b), factor));
            }
        }
    }
}

/* Rows of blocks of at least 8 * count values; count is a constant. */
BN_INLINE void wide(const bn_hadamard_args *a, size_t count)
{
    const __m256 scale = _mm256_set1_ps(bn_hadamard_scale(a->block));
    const __m256 factor = a->block == count * LANES ? scale : _mm256_set1_ps(1.0f);
    const size_t block = a->block;

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < a->k; at += block) {
            for (size_t i = at; i < at + block; i += count * LANES) {
                across(x + i, a->signs + i, y + i, count, factor);
            }
            in_memory(y + at, block, count * LANES, scale);
        }
    }
}

BN_INLINE __m256 side_by_side(__m256 x, __m256 signs, size_t block, __m256 scale)
{
    return _mm256_mul_ps(within(_mm256_mul_ps(x, signs), block), scale);
}

/* Rows of blocks of less than 8 values; block is a constant.  Masked stores are slow, so only the
 * end of a row has one. */
BN_INLINE void narrow(const bn_hadamard_args *a, size_t block)
{
    const __m256 scale = _mm256_set1_ps(bn_hadamard_scale(block));
    const size_t whole = a->k / LANES * LANES;
    const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(a->k - whole)),
                                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < whole; at += LANES) {
            const __m256 signs = _mm256_loadu_ps(a->signs + at);
            _mm256_storeu_ps(y + at, side_by_side(_mm256_loadu_ps(x + at), signs, block, scale));
        }
        if (whole < a->k) {
            const __m256 end = _mm256_maskload_ps(x + whole, rest);
            const __m256 signs = _mm256_maskload_ps(a->signs + whole, rest);
            _mm256_maskstore_ps(y + whole, rest, side_by_side(end, signs, block, scale));
        }
    }
}

void bn_hadamard_f32_avx2(const bn_hadamard_args *a)
{
    switch (a->block) {
    case 1: narrow(a, 1); break;
    case 2: narrow(a, 2); break;
    case 4: narrow(a, 4); break;
    case 8: wide(a, 1); break;
    case 16: wide(a, 2); break;
    case 32: wide(a, 4); break;
    case 64: wide(a, 8); break;
    default: wide(a, 16); break;
    }
}
