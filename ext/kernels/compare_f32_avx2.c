/* compare, AVX2.
 *
 * Method   8 values per step, in the eight lanes of two vectors of double.  A rest of fewer than 8 is
 *          read under a mask: masked lanes add 0 to the sums and are taken off the zeros.
 * Numbers  A lane counts at most 2^32 / 8 zeros.
 */
#include <immintrin.h>

#include "kernel.h"

typedef struct {
    __m256d error[2], signal[2]; /* lanes 0 to 3 and 4 to 7 */
    __m256i zeros;
} state;

static inline void add(state *s, __m256 w, __m256 decoded)
{
    const __m128 w_half[2] = {_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1)};
    const __m128 d_half[2] = {_mm256_castps256_ps128(decoded), _mm256_extractf128_ps(decoded, 1)};

    for (int half = 0; half < 2; half++) {
        const __m256d value = _mm256_cvtps_pd(w_half[half]);
        const __m256d delta = _mm256_sub_pd(value, _mm256_cvtps_pd(d_half[half]));
        s->error[half] = _mm256_add_pd(s->error[half], _mm256_mul_pd(delta, delta));
        s->signal[half] = _mm256_add_pd(s->signal[half], _mm256_mul_pd(value, value));
    }
    const __m256 zero = _mm256_cmp_ps(decoded, _mm256_setzero_ps(), _CMP_EQ_OQ);
    s->zeros = _mm256_sub_epi32(s->zeros, _mm256_castps_si256(zero));
}

static inline double sum(const __m256d v[2])
{
    double lane[BN_LANES];
    _mm256_storeu_pd(lane, v[0]);
    _mm256_storeu_pd(lane + 4, v[1]);
    return bn_sum_lanes(lane);
}

void bn_compare_f32_avx2(bn_compare_args *a)
{
    const __m256d none = _mm256_setzero_pd();
    state s = {{none, none}, {none, none}, _mm256_setzero_si256()};
    uint32_t zeros[8];
    size_t i = 0;

    for (; i + 8 <= a->count; i += 8) {
        add(&s, _mm256_loadu_ps(a->w + i), _mm256_loadu_ps(a->decoded + i));
    }
    a->zeros = 0;
    if (i < a->count) {
        const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(a->count - i)), place);
        add(&s, _mm256_maskload_ps(a->w + i, mask), _mm256_maskload_ps(a->decoded + i, mask));
        a->zeros -= 8 - (a->count - i);
    }
    _mm256_storeu_si256((__m256i *)zeros, s.zeros);
    for (int lane = 0; lane < 8; lane++) {
        a->zeros += zeros[lane];
    }
    a->error = sum(s.error);
    a->signal = sum(s.signal);
}
