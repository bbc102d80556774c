/* optimum, AVX2.
 *
 * Method   8 weights at a time, 16 per step: the 16 lanes of double are four vectors for each of the two
 *          bounds, and what does not join adds 0.  A rest of fewer than 16 is read under a mask, its
 *          masked lanes as the least of all patterns, which is above no bound.  The few values in doubt
 *          are picked one by one.
 */
#include <immintrin.h>

#include "optimum.h"

typedef struct {
    __m256d lane[4];
    __m256i count; /* less, by 1 for each that joined */
} sums;

/* Eight values of a view; what is not there is INT32_MIN. */
static inline __m256i load(const float *w, size_t there, bn_view v)
{
    const __m256i keep = _mm256_set1_epi32((int)v.keep), flip = _mm256_set1_epi32((int)v.flip);

    if (there >= 8) {
        return _mm256_xor_si256(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(const void *)w), keep),
                                flip);
    }
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)there), place);
    const __m256i bits = _mm256_maskload_epi32((const int *)(const void *)w, mask);
    const __m256i value = _mm256_xor_si256(_mm256_and_si256(bits, keep), flip);
    return _mm256_blendv_epi8(_mm256_set1_epi32(INT32_MIN), value, mask);
}

static inline void add(sums *s, size_t half, __m256i value, __m256i bound)
{
    const __m256i joins = _mm256_cmpgt_epi32(value, bound);
    const __m256 joined = _mm256_castsi256_ps(_mm256_and_si256(value, joins));
    __m256d *lane = s->lane + 2 * half;

    lane[0] = _mm256_add_pd(lane[0], _mm256_cvtps_pd(_mm256_castps256_ps128(joined)));
    lane[1] = _mm256_add_pd(lane[1], _mm256_cvtps_pd(_mm256_extractf128_ps(joined, 1)));
    s->count = _mm256_add_epi32(s->count, joins);
}

static inline bn_sums total(const sums *s)
{
    double lane[BN_SUM_LANES];
    int32_t count[8], all = 0;

    for (int i = 0; i < 4; i++) {
        _mm256_storeu_pd(lane + 4 * i, s->lane[i]);
    }
    _mm256_storeu_si256((__m256i *)(void *)count, s->count);
    for (int i = 0; i < 8; i++) {
        all -= count[i];
    }
    return (bn_sums){bn_sum_of_lanes(lane), (double)all};
}

BN_INLINE void sum_above(const float *w, size_t count, bn_view v, int32_t low, int32_t high,
                         bn_sums above[2])
{
    const __m256i bound[2] = {_mm256_set1_epi32(low), _mm256_set1_epi32(high)};
    const __m256d zero = _mm256_setzero_pd();
    const sums none = {{zero, zero, zero, zero}, _mm256_setzero_si256()};
    sums s[2] = {none, none};

    for (size_t at = 0; at < count; at += 16) {
        for (size_t half = 0; half < 2 && at + 8 * half < count; half++) {
            const __m256i value = load(w + at + 8 * half, count - at - 8 * half, v);
            add(&s[0], half, value, bound[0]);
            add(&s[1], half, value, bound[1]);
        }
    }
    above[0] = total(&s[0]);
    above[1] = total(&s[1]);
}

BN_INLINE size_t between(const float *w, size_t count, bn_view v, int32_t low, int32_t high, uint32_t *keys)
{
    size_t found = 0;

    for (size_t at = 0; at < count; at += 8) {
        const __m256i value = load(w + at, count - at, v);
        const __m256i above = _mm256_cmpgt_epi32(value, _mm256_set1_epi32(low));
        const __m256i beyond = _mm256_cmpgt_epi32(value, _mm256_set1_epi32(high));
        const __m256 chosen = _mm256_castsi256_ps(_mm256_andnot_si256(beyond, above));
        for (unsigned left = (unsigned)_mm256_movemask_ps(chosen); left != 0; left &= left - 1) {
            const size_t place = (size_t)_mm_popcnt_u32(~left & (left - 1)); /* zeros below */
            keys[found++] = (uint32_t)bn_pattern(w[at + place], v);
        }
    }
    return found;
}

void bn_optimum_f32_avx2(const bn_optimum_args *a)
{
    bn_optimum(a, (bn_search){sum_above, between});
}
