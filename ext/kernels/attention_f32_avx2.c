/* attention, AVX2: strips of 6 rows x 2 vectors, 12 of the 16 registers. */
#include "simd_avx2.h"
#include "exponential.h"

enum { BN_STRIP_VECTORS = 2 };

BN_INLINE bn_floats bn_zero_if_below(bn_floats x, bn_floats least, bn_floats value)
{
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), value);
}

/* 2^n for n + BN_EXP_SHIFT. */
BN_INLINE bn_floats bn_power_of_two(bn_floats shifted)
{
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(BN_EXP_ONE_BITS)));
}

BN_INLINE float bn_max_of(bn_floats v)
{
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

BN_INLINE float bn_sum_16(const bn_floats *v)
{
    const __m256 eight = _mm256_add_ps(v[0], v[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "attention_wide.h"

void bn_attention_f32_avx2(const bn_attention_args *a)
{
    bn_attention_wide(a);
}
