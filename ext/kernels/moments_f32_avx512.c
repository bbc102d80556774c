/* moments, AVX-512.
 *
 * Method   16 weights per step, the last under a mask.  The eight lanes of one vector of double add the
 *          first half, then the second.  Masked lanes add 0 and take part in the extremes as w[0].
 * Numbers  0 and -0 are equal: which of them an extreme is depends on the kernel.
 * Speed    Zen 5, 4096 weights in cache: 0.36 us, 0.50 with AVX2.
 */
#include "lanes_avx512.h"

typedef struct {
    __m512d sum;
    __m512 least, most;
} state;

static inline state add(state s, __m512 w, __m512 or_first)
{
    const __m512 magnitude = _mm512_abs_ps(w);
    s.sum = _mm512_add_pd(s.sum, _mm512_cvtps_pd(_mm512_castps512_ps256(magnitude)));
    s.sum = _mm512_add_pd(s.sum, _mm512_cvtps_pd(_mm512_extractf32x8_ps(magnitude, 1)));
    s.least = _mm512_min_ps(s.least, or_first);
    s.most = _mm512_max_ps(s.most, or_first);
    return s;
}

static inline void group_moments(const float *w, size_t count, double *moments)
{
    const __m512 first = _mm512_set1_ps(w[0]);
    state s = {_mm512_setzero_pd(), first, first};
    double lane[BN_LANES];
    size_t i = 0;

    for (; i + 16 <= count; i += 16) {
        const __m512 v = _mm512_loadu_ps(w + i);
        s = add(s, v, v);
    }
    if (i < count) {
        const __mmask16 rest = bn_first_lanes(count - i);
        s = add(s, _mm512_maskz_loadu_ps(rest, w + i), _mm512_mask_loadu_ps(first, rest, w + i));
    }
    _mm512_storeu_pd(lane, s.sum);
    moments[0] = bn_sum_lanes(lane);
    moments[1] = (double)_mm512_reduce_min_ps(s.least);
    moments[2] = (double)_mm512_reduce_max_ps(s.most);
}

void bn_moments_f32_avx512(const bn_moments_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t length = bn_group_length(&a->groups, g);
        group_moments(a->w + g * a->groups.length, length, a->moments + 3 * g);
    }
}
