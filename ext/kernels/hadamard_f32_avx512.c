/* hadamard, AVX-512.
 *
 * Method   Up to 256 values lie in 16 registers through all of their stages: strides 1 to 8 swap
 *          lanes within a register, strides from 16 on pair registers.  A larger block is done 256
 *          values at a time, then its last stages in memory, which is the first-level cache.
 *          Blocks of 2 to 8 lie side by side in a register; the last one may be cut by a mask.
 * Numbers  Within a register a pair (a, b) meets its swapped self (b, a): 1 * a + b and -1 * b + a.
 *          The products are exact, so the fused operation rounds once, like a + b and a - b.
 * Measured GB/s read and written, one core of a Zen 5 with gcc 12, x of 256 KiB: blocks of 8 140,
 *          32 111, 64 95, 128 91, 256 85, 1024 60.  x of 128 MiB, on a busy machine: blocks of 32 to
 *          256 15 to 28, memcpy 18 to 24.
 */
#include <immintrin.h>

#include "hadamard.h"

enum { LANES = 16, REGISTERS = 16 };

/* 1 in each lane, -1 in those of the mask. */
static inline __m512 plus_minus(__mmask16 minus)
{
    return _mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

/* The stages with strides up to width / 2, at most 8. */
BN_INLINE __m512 within(__m512 v, size_t width)
{
    if (width >= 2) {
        v = _mm512_fmadd_ps(v, plus_minus(0xAAAA), _mm512_permute_ps(v, 0xB1));
    }
    if (width >= 4) {
        v = _mm512_fmadd_ps(v, plus_minus(0xCCCC), _mm512_permute_ps(v, 0x4E));
    }
    if (width >= 8) {
        v = _mm512_fmadd_ps(v, plus_minus(0xF0F0), _mm512_shuffle_f32x4(v, v, 0xB1));
    }
    if (width >= 16) {
        v = _mm512_fmadd_ps(v, plus_minus(0xFF00), _mm512_shuffle_f32x4(v, v, 0x4E));
    }
    return v;
}

/* All stages of 16 * count values; count is a constant, so that v lies in registers. */
BN_INLINE void across(const float *x, const float *signs, float *y, size_t count, __m512 scale)
{
    __m512 v[REGISTERS];

#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        const __m512 signed_x =
            _mm512_mul_ps(_mm512_loadu_ps(x + i * LANES), _mm512_loadu_ps(signs + i * LANES));
        v[i] = within(signed_x, LANES);
    }
#pragma GCC unroll 4
    for (size_t stride = 1; stride < count; stride *= 2) {
#pragma GCC unroll 16
        for (size_t i = 0; i < count; i++) {
            if (!(i & stride)) {
                const __m512 first = v[i], second = v[i + stride];
                v[i] = _mm512_add_ps(first, second);
                v[i + stride] = _mm512_sub_ps(first, second);
            }
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < count; i++) {
        _mm512_storeu_ps(y + i * LANES, _mm512_mul_ps(v[i], scale));
    }
}

/* The stages of a block from this stride on; the last one multiplies by the scale. */
static void in_memory(float *y, size_t block, size_t stride, __m512 scale)
{
    for (; stride < block; stride *= 2) {
        const __m512 factor = 2 * stride == block ? scale : _mm512_set1_ps(1.0f);
        for (size_t at = 0; at < block; at += 2 * stride) {
            for (float *first = y + at; first < y + at + stride; first += LANES) {
                const __m512 a = _mm512_loadu_ps(first), b = _mm512_loadu_ps(first + stride);
                _mm512_storeu_ps(first, _mm512_mul_ps(_mm512_add_ps(a, b), factor));
                _mm512_storeu_ps(first + stride, _mm512_mul_ps(_mm512_sub_ps(a, b), factor));
            }
        }
    }
}

/* Rows of blocks of at least 16 * count values; count is a constant. */
BN_INLINE void wide(const bn_hadamard_args *a, size_t count)
{
    const __m512 scale = _mm512_set1_ps(bn_hadamard_scale(a->block));
    const __m512 factor = a->block == count * LANES ? scale : _mm512_set1_ps(1.0f);
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

BN_INLINE __m512 side_by_side(__m512 x, __m512 signs, size_t block, __m512 scale)
{
    return _mm512_mul_ps(within(_mm512_mul_ps(x, signs), block), scale);
}

/* Rows of blocks of less than 16 values; block is a constant.  Masked stores are slow, so only the
 * end of a row has one. */
BN_INLINE void narrow(const bn_hadamard_args *a, size_t block)
{
    const __m512 scale = _mm512_set1_ps(bn_hadamard_scale(block));
    const size_t whole = a->k / LANES * LANES;
    const __mmask16 rest = (__mmask16)((1u << (a->k - whole)) - 1);

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < whole; at += LANES) {
            const __m512 signs = _mm512_loadu_ps(a->signs + at);
            _mm512_storeu_ps(y + at, side_by_side(_mm512_loadu_ps(x + at), signs, block, scale));
        }
        if (rest) {
            const __m512 end = _mm512_maskz_loadu_ps(rest, x + whole);
            const __m512 signs = _mm512_maskz_loadu_ps(rest, a->signs + whole);
            _mm512_mask_storeu_ps(y + whole, rest, side_by_side(end, signs, block, scale));
        }
    }
}

void bn_hadamard_f32_avx512(const bn_hadamard_args *a)
{
    switch (a->block) {
    case 1: narrow(a, 1); break;
    case 2: narrow(a, 2); break;
    case 4: narrow(a, 4); break;
    case 8: narrow(a, 8); break;
    case 16: wide(a, 1); break;
    case 32: wide(a, 2); break;
    case 64: wide(a, 4); break;
    case 128: wide(a, 8); break;
    default: wide(a, 16); break;
    }
}
