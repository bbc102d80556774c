/* scale, AVX-512.
 *
 * Numbers  Where there is one zero point for all, the term is an integer of 32 bits, taken modulo
 *          2^32 and rounded once by the conversion.  Otherwise it is computed in double as kernel.h
 *          says.  Products and sums are separate instructions (-ffp-contract=off holds for
 *          intrinsics too), so the bits are those of the scalar kernel.
 */
#include <immintrin.h>

#include "kernel.h"

/* Sum of (code - zero) q, from 32-bit integers. */
static inline __m512 integer_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                  size_t at)
{
    __m512i product = _mm512_loadu_si512(acc);

    if (a->parts == 2) {
        const __m512i codes = _mm512_slli_epi32(_mm512_loadu_si512(a->code_sum + at), 7);
        const __m512i low = _mm512_loadu_si512(acc + a->groups * BN_SUPER);
        product = _mm512_add_epi32(_mm512_slli_epi32(product, 8), _mm512_add_epi32(low, codes));
    }
    const uint32_t offset = (uint32_t)a->zero * (uint32_t)sum;
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(product, _mm512_set1_epi32((int32_t)offset)));
}

/* Half a term: eight lanes in double. */
static inline __m256 half_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    const __m512d zero_point = _mm512_cvtps_pd(_mm256_loadu_ps(a->zero_point + at));
    __m512d product = _mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i *)acc));

    if (a->parts == 2) {
        const __m256i *low = (const __m256i *)(acc + a->groups * BN_SUPER);
        const __m256i *codes = (const __m256i *)(a->code_sum + at);
        product = _mm512_mul_pd(product, _mm512_set1_pd(256.0));
        product = _mm512_add_pd(product, _mm512_cvtepi32_pd(_mm256_loadu_si256(low)));
        product = _mm512_add_pd(product,
                                _mm512_mul_pd(_mm512_cvtepi32_pd(_mm256_loadu_si256(codes)),
                                              _mm512_set1_pd(128.0)));
    }
    const __m512d offset = _mm512_mul_pd(zero_point, _mm512_set1_pd((double)sum));
    return _mm512_cvtpd_ps(_mm512_sub_pd(product, offset));
}

static inline __m512 affine_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    const __m256 first = half_term(a, acc, sum, at);
    const __m256 second = half_term(a, acc + 8, sum, at + 8);
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}

/* `vectors` vectors of all rows from lane `from` on: their sums are independent of one another,
 * which covers the latency of the one of each. */
BN_INLINE void add_groups(const bn_scale_args *a, size_t from, const int vectors,
                          const int is_affine)
{
    for (size_t row = 0; row < a->rows; row++) {
        const __m512 factor = _mm512_set1_ps(a->factor[row]);
        const int32_t *acc = a->acc + row * a->parts * a->groups * BN_SUPER + from;
        float *y = a->y + row * a->y_stride + from;
        __m512 total[4];

#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            const size_t at = row * BN_SUPER + from + (size_t)i * BN_PANEL;
            total[i] = a->before ? _mm512_loadu_ps(a->before + at) : _mm512_setzero_ps();
        }
        for (size_t g = 0; g < a->groups; g++) {
            const int64_t sum = a->sum[row * a->sum_stride + g];
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                const size_t lane = g * BN_SUPER + (size_t)i * BN_PANEL;
                const size_t at = lane + from;
                const __m512 term = is_affine ? affine_term(a, acc + lane, sum, at)
                                              : integer_term(a, acc + lane, sum, at);
                const __m512 scale = _mm512_mul_ps(factor, _mm512_loadu_ps(a->scale + at));
                total[i] = _mm512_add_ps(total[i], _mm512_mul_ps(term, scale));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            if (a->bias) {
                total[i] = _mm512_mul_ps(total[i], _mm512_set1_ps(a->rescale[row]));
                total[i] = _mm512_add_ps(total[i], _mm512_loadu_ps(a->bias + from + BN_PANEL * i));
            }
            _mm512_storeu_ps(y + BN_PANEL * i, total[i]);
        }
    }
}

BN_INLINE void add_all(const bn_scale_args *a, const int is_affine)
{
    if (a->panels == 4) {
        add_groups(a, 0, 4, is_affine);
        return;
    }
    for (size_t from = 0; from < a->panels * BN_PANEL; from += BN_PANEL) {
        add_groups(a, from, 1, is_affine);
    }
}

void bn_scale_i32_avx512(const bn_scale_args *a)
{
    if (a->zero_point) {
        add_all(a, 1);
    } else {
        add_all(a, 0);
    }
}
