/* scale, AVX-512.
 *
 * Numbers  With zero points of 1 the term is an integer of 32 bits, taken modulo 2^32 and rounded
 *          once by the conversion.  Otherwise it is computed in double as kernel.h says.  Products
 *          and sums are separate instructions (-ffp-contract=off holds for intrinsics too), so the
 *          bits are those of the scalar kernel.
 */
#include <immintrin.h>

#include "kernel.h"

/* Sum of (code - 1) q, from 32-bit integers. */
static inline __m512 ternary_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                  size_t at)
{
    __m512i product = _mm512_loadu_si512(acc);

    if (a->parts == 2) {
        const __m512i codes = _mm512_slli_epi32(_mm512_loadu_si512(a->code_sum + at), 7);
        const __m512i low = _mm512_loadu_si512(acc + a->groups * BN_SUPER);
        product = _mm512_add_epi32(_mm512_slli_epi32(product, 8), _mm512_add_epi32(low, codes));
    }
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(product, _mm512_set1_epi32((int32_t)sum)));
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

void bn_scale_i32_avx512vnni(const bn_scale_args *a)
{
    for (size_t row = 0; row < a->rows; row++) {
        const __m512 factor = _mm512_set1_ps(a->factor[row]);
        for (size_t lane = 0; lane < a->panels * BN_PANEL; lane += BN_PANEL) {
            float *y = a->y + row * BN_SUPER + lane;
            __m512 total = _mm512_loadu_ps(y);
            for (size_t g = 0; g < a->groups; g++) {
                const size_t at = g * BN_SUPER + lane;
                const int32_t *acc = a->acc + row * a->parts * a->groups * BN_SUPER + at;
                const int64_t sum = a->sum[row * a->sum_stride + g];
                const __m512 term = a->zero_point ? affine_term(a, acc, sum, at)
                                                  : ternary_term(a, acc, sum, at);
                const __m512 scale = _mm512_mul_ps(factor, _mm512_loadu_ps(a->scale + at));
                total = _mm512_add_ps(total, _mm512_mul_ps(term, scale));
            }
            _mm512_storeu_ps(y, total);
        }
    }
}
