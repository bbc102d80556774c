/* optimum, AVX-512.
 *
 * Method   16 weights per step, in the 16 lanes of two vectors of double for each of the two bounds, under
 *          the masks of the comparisons.  Values in doubt are compressed into the list.
 */
#include "lanes_avx512.h"
#include "optimum.h"

typedef struct {
    __m512d low, high; /* lanes 0 to 7 and 8 to 15 */
    __m512i count;
} sums;

static inline __m512i load(const float *w, __mmask16 present, bn_view v)
{
    const __m512i bits = _mm512_maskz_loadu_epi32(present, w);
    const __m512i kept = _mm512_and_si512(bits, _mm512_set1_epi32((int)v.keep));
    return _mm512_xor_si512(kept, _mm512_set1_epi32((int)v.flip));
}

static inline void add(sums *s, __mmask16 joins, __m512d low, __m512d high)
{
    s->low = _mm512_mask_add_pd(s->low, (__mmask8)joins, s->low, low);
    s->high = _mm512_mask_add_pd(s->high, (__mmask8)(joins >> 8), s->high, high);
    s->count = _mm512_mask_sub_epi32(s->count, joins, s->count, _mm512_set1_epi32(-1));
}

static inline bn_sums total(const sums *s)
{
    double lane[BN_LANES];
    _mm512_storeu_pd(lane, _mm512_add_pd(s->low, s->high));
    return (bn_sums){bn_sum_lanes(lane), (double)_mm512_reduce_add_epi32(s->count)};
}

BN_INLINE void sum_above(const float *w, size_t count, bn_view v, int32_t low, int32_t high,
                         bn_sums above[2])
{
    const __m512i bound[2] = {_mm512_set1_epi32(low), _mm512_set1_epi32(high)};
    const sums none = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_si512()};
    sums s[2] = {none, none};

    for (size_t at = 0; at < count; at += 16) {
        const __mmask16 here = bn_first_lanes(count - at);
        const __m512i value = load(w + at, here, v);
        const __m256 half[2] = {_mm256_castsi256_ps(_mm512_castsi512_si256(value)),
                                _mm256_castsi256_ps(_mm512_extracti64x4_epi64(value, 1))};
        const __m512d first = _mm512_cvtps_pd(half[0]), second = _mm512_cvtps_pd(half[1]);
        add(&s[0], _mm512_mask_cmpgt_epi32_mask(here, value, bound[0]), first, second);
        add(&s[1], _mm512_mask_cmpgt_epi32_mask(here, value, bound[1]), first, second);
    }
    above[0] = total(&s[0]);
    above[1] = total(&s[1]);
}

BN_INLINE size_t between(const float *w, size_t count, bn_view v, int32_t low, int32_t high, uint32_t *keys)
{
    size_t found = 0;

    for (size_t at = 0; at < count; at += 16) {
        const __mmask16 here = bn_first_lanes(count - at);
        const __m512i value = load(w + at, here, v);
        const __mmask16 above = _mm512_mask_cmpgt_epi32_mask(here, value, _mm512_set1_epi32(low));
        const __mmask16 chosen = _mm512_mask_cmple_epi32_mask(above, value, _mm512_set1_epi32(high));
        _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(chosen, value));
        found += (size_t)_mm_popcnt_u32(chosen);
    }
    return found;
}

void bn_optimum_f32_avx512(const bn_optimum_args *a)
{
    bn_optimum(a, (bn_search){sum_above, between});
}
