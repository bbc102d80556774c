/* scale, AVX2: its two kinds of terms. */
#include "simd_avx2.h"
#include "scale_groups.h"

static inline __m256i load(const int32_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

/* Sum of (code - zero) q, from 32-bit integers. */
static inline bn_floats integer_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
                                  size_t at)
{
    __m256i product = load(acc);

    if (a->parts == 2) {
        const __m256i codes = _mm256_slli_epi32(load(a->code_sum + at), 7);
        product = _mm256_add_epi32(_mm256_slli_epi32(product, 8), load(acc + a->groups * BN_SUPER));
        product = _mm256_add_epi32(product, codes);
    }
    const uint32_t offset = (uint32_t)a->zero * (uint32_t)sum;
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(product, _mm256_set1_epi32((int32_t)offset)));
}

/* Half a term: four lanes in double. */
static inline __m128 half_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    const __m256d zero_point = _mm256_cvtps_pd(_mm_loadu_ps(a->zero_point + at));
    __m256d product = _mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)acc));

    if (a->parts == 2) {
        const __m128i *low = (const __m128i *)(acc + a->groups * BN_SUPER);
        const __m128i *codes = (const __m128i *)(a->code_sum + at);
        product = _mm256_mul_pd(product, _mm256_set1_pd(256.0));
        product = _mm256_add_pd(product, _mm256_cvtepi32_pd(_mm_loadu_si128(low)));
        product = _mm256_add_pd(product, _mm256_mul_pd(_mm256_cvtepi32_pd(_mm_loadu_si128(codes)),
                                                       _mm256_set1_pd(128.0)));
    }
    const __m256d offset = _mm256_mul_pd(zero_point, _mm256_set1_pd((double)sum));
    return _mm256_cvtpd_ps(_mm256_sub_pd(product, offset));
}

static inline bn_floats affine_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    return _mm256_set_m128(half_term(a, acc + 4, sum, at + 4), half_term(a, acc, sum, at));
}

void bn_scale_i32_avx2(const bn_scale_args *a)
{
    if (a->zero_point) {
        bn_add_all_groups(a, affine_term);
    } else {
        bn_add_all_groups(a, integer_term);
    }
}
