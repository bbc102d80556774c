/* scale, AVX2.
 *
 * Numbers  Where there is one zero point for all, the term is an integer of 32 bits, taken modulo
 *          2^32 and rounded once by the conversion.  Otherwise it is computed in double as kernel.h
 *          says.  Products and sums are separate instructions (-ffp-contract=off holds for
 *          intrinsics too), so the bits are those of the scalar kernel.
 */
#include <immintrin.h>

#include "kernel.h"

enum { LANES = 8 };

static inline __m256i load(const int32_t *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

/* Sum of (code - zero) q, from 32-bit integers. */
static inline __m256 integer_term(const bn_scale_args *a, const int32_t *acc, int64_t sum,
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

static inline __m256 affine_term(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at)
{
    return _mm256_set_m128(half_term(a, acc + 4, sum, at + 4), half_term(a, acc, sum, at));
}

/* `vectors` vectors of all rows from lane `from` on: their sums are independent of one another,
 * which covers the latency of the one of each. */
BN_INLINE void add_groups(const bn_scale_args *a, size_t from, const int vectors,
                          const int is_affine)
{
    for (size_t row = 0; row < a->rows; row++) {
        const __m256 factor = _mm256_set1_ps(a->factor[row]);
        const int32_t *acc = a->acc + row * a->parts * a->groups * BN_SUPER + from;
        float *y = a->y + row * a->y_stride + from;
        __m256 total[4];

#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            const size_t at = row * BN_SUPER + from + (size_t)i * LANES;
            total[i] = a->before ? _mm256_loadu_ps(a->before + at) : _mm256_setzero_ps();
        }
        for (size_t g = 0; g < a->groups; g++) {
            const int64_t sum = a->sum[row * a->sum_stride + g];
#pragma GCC unroll 4
            for (int i = 0; i < vectors; i++) {
                const size_t lane = g * BN_SUPER + (size_t)i * LANES;
                const size_t at = lane + from;
                const __m256 term = is_affine ? affine_term(a, acc + lane, sum, at)
                                              : integer_term(a, acc + lane, sum, at);
                const __m256 scale = _mm256_mul_ps(factor, _mm256_loadu_ps(a->scale + at));
                total[i] = _mm256_add_ps(total[i], _mm256_mul_ps(term, scale));
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            if (a->bias) {
                total[i] = _mm256_mul_ps(total[i], _mm256_set1_ps(a->rescale[row]));
                total[i] = _mm256_add_ps(total[i], _mm256_loadu_ps(a->bias + from + LANES * i));
            }
            _mm256_storeu_ps(y + LANES * i, total[i]);
        }
    }
}

BN_INLINE void add_all(const bn_scale_args *a, const int is_affine)
{
    size_t from = 0;

    for (; from + 4 * LANES <= a->panels * BN_PANEL; from += 4 * LANES) {
        add_groups(a, from, 4, is_affine);
    }
    if (from < a->panels * BN_PANEL) {
        add_groups(a, from, 2, is_affine);
    }
}

void bn_scale_i32_avx2(const bn_scale_args *a)
{
    if (a->zero_point) {
        add_all(a, 1);
    } else {
        add_all(a, 0);
    }
}
