/* moments, AVX2.
 *
 * Method   8 weights per step, in the eight lanes of two vectors of double.  A rest of fewer than 8
 *          is read under a mask: masked lanes add 0 and take part in the extremes as w[0].
 * Numbers  0 and -0 are equal: which of them an extreme is depends on the kernel.
 */
#include <immintrin.h>

#include "kernel.h"

typedef struct {
    __m256d low, high; /* sums of lanes 0 to 3 and 4 to 7 */
    __m256 least, most;
} state;

static inline state add(state s, __m256 w)
{
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), w);
    s.low = _mm256_add_pd(s.low, _mm256_cvtps_pd(_mm256_castps256_ps128(magnitude)));
    s.high = _mm256_add_pd(s.high, _mm256_cvtps_pd(_mm256_extractf128_ps(magnitude, 1)));
    return s;
}

static inline state extend(state s, __m256 w)
{
    s.least = _mm256_min_ps(s.least, w);
    s.most = _mm256_max_ps(s.most, w);
    return s;
}

static inline float reduce(__m256 v, int most)
{
    float lane[8];
    _mm256_storeu_ps(lane, v);
    for (int i = 1; i < 8; i++) {
        lane[0] = (most ? lane[i] > lane[0] : lane[i] < lane[0]) ? lane[i] : lane[0];
    }
    return lane[0];
}

static inline void group_moments(const float *w, size_t count, double *moments)
{
    const __m256 first = _mm256_broadcast_ss(w);
    state s = {_mm256_setzero_pd(), _mm256_setzero_pd(), first, first};
    double lane[BN_LANES];
    size_t i = 0;

    for (; i + 8 <= count; i += 8) {
        const __m256 v = _mm256_loadu_ps(w + i);
        s = extend(add(s, v), v);
    }
    if (i < count) {
        const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count - i)), place);
        const __m256 v = _mm256_maskload_ps(w + i, mask);
        s = extend(add(s, v), _mm256_blendv_ps(first, v, _mm256_castsi256_ps(mask)));
    }
    _mm256_storeu_pd(lane, s.low);
    _mm256_storeu_pd(lane + 4, s.high);
    moments[0] = bn_sum_lanes(lane);
    moments[1] = (double)reduce(s.least, 0);
    moments[2] = (double)reduce(s.most, 1);
}

void bn_moments_f32_avx2(const bn_moments_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t length = bn_group_length(&a->groups, g);
        group_moments(a->w + g * a->groups.length, length, a->moments + 3 * g);
    }
}
