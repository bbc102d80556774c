/* scale, AVX-512: its two kinds of terms. */
#include "simd_avx512.h"
#include "scale_groups.h"

/* Sum of (code - zero) q, from 32-bit integers. */
static inline bn_floats integer_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
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

static inline bn_floats affine_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    const __m256 first = half_term(a, acc, sum, at);
    const __m256 second = half_term(a, acc + 8, sum, at + 8);
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
}

void bn_scale_i32_avx512(const bn_scale_args *a)
{
    if (a->zero_point) {
        bn_add_all_groups(a, affine_term);
    } else {
        bn_add_all_groups(a, integer_term);
    }
}
