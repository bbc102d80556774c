/* compare, AVX-512.
 *
 * Method   8 values per step, in the eight lanes of one vector of double, which is twice what AVX2 holds.
 *          A rest of fewer than 8 is read under a mask: masked lanes add 0 to the sums and are no zeros.
 * Speed    Zen 5, 4096 values in cache, called from Python on a busy machine: 1.3 us, 1.7 with AVX2. */
#include <immintrin.h>

#include "kernel.h"

typedef struct {
    __m512d error, signal;
    size_t zeros;
} state;

static inline void add(state *s, __m256 w, __m256 decoded, __mmask8 counted)
{
    const __m512d value = _mm512_cvtps_pd(w);
    const __m512d delta = _mm512_sub_pd(value, _mm512_cvtps_pd(decoded));
    const __mmask8 zero = _mm256_mask_cmp_ps_mask(counted, decoded, _mm256_setzero_ps(), _CMP_EQ_OQ);

    s->error = _mm512_add_pd(s->error, _mm512_mul_pd(delta, delta));
    s->signal = _mm512_add_pd(s->signal, _mm512_mul_pd(value, value));
    s->zeros += (size_t)_mm_popcnt_u32(zero);
}

static inline double sum(__m512d v)
{
    double lane[BN_LANES];
    _mm512_storeu_pd(lane, v);
    return bn_sum_lanes(lane);
}

void bn_compare_f32_avx512(bn_compare_args *a)
{
    state s = {_mm512_setzero_pd(), _mm512_setzero_pd(), 0};
    size_t i = 0;

    for (; i + 8 <= a->count; i += 8) {
        add(&s, _mm256_loadu_ps(a->w + i), _mm256_loadu_ps(a->decoded + i), 0xFF);
    }
    if (i < a->count) {
        const __mmask8 rest = (__mmask8)((1u << (a->count - i)) - 1);
        add(&s, _mm256_maskz_loadu_ps(rest, a->w + i), _mm256_maskz_loadu_ps(rest, a->decoded + i), rest);
    }
    a->zeros = s.zeros;
    a->error = sum(s.error);
    a->signal = sum(s.signal);
}
