/* actq, AVX-512.
 *
 * Method   Two passes over the row: the largest |x| as an integer (row_scale.h), then 16 values
 *          per step, the last of a group under a mask; masked values are 0 and quantize to the
 *          padding.  With 8 bits 64 values at a time are packed to one vector.
 * Numbers  vcvtps2dq rounds half to even in the default mode.  |q| <= 2^15 and a lane adds at most
 *          2^18 / 16 values, so the 32-bit sums of a group hold; their sum takes 64 bits.
 */
#include "lanes_avx512.h"
#include "row_scale.h"

static uint32_t absmax_bits(const float *x, size_t count)
{
    const __m512i mask = _mm512_set1_epi32(BN_ABS_BITS);
    __m512i most = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
    size_t i = 0;

    for (; i + 32 <= count; i += 32) {
        const __m512i first = _mm512_and_si512(_mm512_loadu_si512(x + i), mask);
        const __m512i second = _mm512_and_si512(_mm512_loadu_si512(x + i + 16), mask);
        most = _mm512_max_epu32(most, first);
        odd = _mm512_max_epu32(odd, second);
    }
    for (; i < count; i += 16) {
        const __m512i bits = _mm512_maskz_loadu_epi32(bn_first_lanes(count - i), x + i);
        most = _mm512_max_epu32(most, _mm512_and_si512(bits, mask));
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu32(most, odd));
}

typedef struct {
    __m512 s, low, high;
} scales;

/* 16 values, which are 0 outside the mask. */
static inline __m512i quantized(const float *x, __mmask16 mask, const scales *scale)
{
    const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), scale->s);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(value, scale->low), scale->high));
}

/* Writes 16 values, which are 0 outside the mask, and returns them. */
static inline __m512i step(const bn_actq_args *a, const float *x, __mmask16 mask,
                           const scales *scale, int8_t *q)
{
    const __m512i v = quantized(x, mask, scale);

    if (a->bits == 8) {
        _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(v));
    } else {
        const __m512i low = _mm512_sub_epi32(v, _mm512_set1_epi32(128)); /* modulo 256 */
        _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(_mm512_srai_epi32(v, 8)));
        _mm_storeu_si128((__m128i *)(q + a->q_stride), _mm512_cvtepi32_epi8(low));
    }
    return v;
}

/* Writes 64 values of 8 bits and returns the sums of four. */
static inline __m512i four_steps(const float *x, const scales *scale, int8_t *q)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i v[4];

    for (int i = 0; i < 4; i++) {
        v[i] = quantized(x + 16 * i, 0xFFFF, scale);
    }
    const __m512i first = _mm512_packs_epi32(v[0], v[1]), second = _mm512_packs_epi32(v[2], v[3]);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(first, second)));
    return _mm512_add_epi32(_mm512_add_epi32(v[0], v[1]), _mm512_add_epi32(v[2], v[3]));
}

static inline int64_t wide_sum(__m512i sums)
{
    const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums));
    const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sums, 1));
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
}

void bn_actq_f32_avx512(const bn_actq_args *a)
{
    const bn_row_scale row = bn_make_row_scale(a, absmax_bits(a->x, a->groups.k));
    const scales scale = {_mm512_set1_ps(row.s), _mm512_set1_ps(row.low), _mm512_set1_ps(row.high)};

    for (size_t g = 0; row.finite && g < a->groups.count; g++) {
        const float *x = a->x + g * a->groups.length;
        const size_t length = bn_group_length(&a->groups, g);
        int8_t *q = a->q + g * a->groups.stride;
        __m512i sums = _mm512_setzero_si512();

        size_t i = 0;

        for (; a->bits == 8 && i + 64 <= length; i += 64) {
            sums = _mm512_add_epi32(sums, four_steps(x + i, &scale, q + i));
        }
        for (; i < length; i += BN_STEP) {
            const __m512i v = step(a, x + i, bn_first_lanes(length - i), &scale, q + i);
            sums = _mm512_add_epi32(sums, v);
        }
        a->sum[g] = wide_sum(sums);
    }
}
