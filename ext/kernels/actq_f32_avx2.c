/* actq, AVX2.
 *
 * Method   Two passes over the row: the largest |x| as an integer (row_scale.h), then 16 values
 *          per step.  The last step of a group goes through a buffer padded with zeros, which
 *          quantize to the padding.
 * Numbers  vcvtps2dq rounds half to even in the default mode.  |q| <= 2^15 and a lane adds at most
 *          2^18 / 8 values, so the 32-bit sums of a group hold.
 */
#include <immintrin.h>
#include <string.h>

#include "kernel.h"
#include "row_scale.h"

static uint32_t absmax_bits(const float *x, size_t count)
{
    const __m256i mask = _mm256_set1_epi32(BN_ABS_BITS);
    __m256i most[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    uint32_t lanes[8], absmax = 0;
    size_t i = 0;

    for (; i + 16 <= count; i += 16) {
        for (int half = 0; half < 2; half++) {
            const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(x + i + 8 * half));
            most[half] = _mm256_max_epi32(most[half], _mm256_and_si256(bits, mask));
        }
    }
    _mm256_storeu_si256((__m256i *)lanes, _mm256_max_epi32(most[0], most[1]));
    for (int lane = 0; lane < 8; lane++) {
        absmax = lanes[lane] > absmax ? lanes[lane] : absmax;
    }
    for (; i < count; i++) {
        const uint32_t bits = bn_float_bits(x[i]) & (uint32_t)BN_ABS_BITS;
        absmax = bits > absmax ? bits : absmax;
    }
    return absmax;
}

typedef struct {
    __m256 s, low, high;
} scales;

static inline __m256i quantize(const float *x, const scales *scale)
{
    const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(x), scale->s);
    return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(value, scale->low), scale->high));
}

/* 16 values of 32 bits, each within 8 bits. */
static inline void store_bytes(int8_t *to, __m256i first, __m256i second)
{
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
    _mm_storeu_si128((__m128i *)to, _mm_packs_epi16(_mm256_castsi256_si128(words),
                                                    _mm256_extracti128_si256(words, 1)));
}

/* Writes 16 values and returns their sums in 8 lanes. */
static inline __m256i step(const bn_actq_args *a, const float *x, const scales *scale, int8_t *q)
{
    const __m256i first = quantize(x, scale);
    const __m256i second = quantize(x + 8, scale);

    if (a->bits == 8) {
        store_bytes(q, first, second);
    } else {
        const __m256i low8 = _mm256_set1_epi32(255);
        const __m256i half = _mm256_set1_epi32(128);
        store_bytes(q, _mm256_srai_epi32(first, 8), _mm256_srai_epi32(second, 8));
        store_bytes(q + a->q_stride, _mm256_sub_epi32(_mm256_and_si256(first, low8), half),
                    _mm256_sub_epi32(_mm256_and_si256(second, low8), half));
    }
    return _mm256_add_epi32(first, second);
}

void bn_actq_f32_avx2(const bn_actq_args *a)
{
    const bn_row_scale row = bn_make_row_scale(a, absmax_bits(a->x, a->groups.k));
    const scales scale = {_mm256_set1_ps(row.s), _mm256_set1_ps(row.low), _mm256_set1_ps(row.high)};

    for (size_t g = 0; row.finite && g < a->groups.count; g++) {
        const float *x = a->x + g * a->groups.length;
        const size_t length = bn_group_length(&a->groups, g);
        int8_t *q = a->q + g * a->groups.stride;
        __m256i sums = _mm256_setzero_si256();
        int32_t lanes[8];
        size_t i = 0;

        for (; i + BN_STEP <= length; i += BN_STEP) {
            sums = _mm256_add_epi32(sums, step(a, x + i, &scale, q + i));
        }
        if (i < length) {
            float tail[BN_STEP] = {0};
            memcpy(tail, x + i, (length - i) * sizeof *x);
            sums = _mm256_add_epi32(sums, step(a, tail, &scale, q + i));
        }
        _mm256_storeu_si256((__m256i *)lanes, sums);
        a->sum[g] = 0;
        for (int lane = 0; lane < 8; lane++) {
            a->sum[g] += lanes[lane];
        }
    }
}
