/* attention, AVX-512: strips of 6 rows x 4 vectors, 24 of the 32 registers. */
#include "simd_avx512.h"
#include "exponential.h"

enum { BN_STRIP_VECTORS = 4 };

BN_INLINE bn_floats bn_zero_if_below(bn_floats x, bn_floats least, bn_floats value)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), value);
}

/* 2^n for n + BN_EXP_SHIFT. */
BN_INLINE bn_floats bn_power_of_two(bn_floats shifted)
{
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(BN_EXP_ONE_BITS)));
}

BN_INLINE float bn_max_of(bn_floats v)
{
    return _mm512_reduce_max_ps(v);
}

BN_INLINE float bn_sum_16(const bn_floats *v)
{
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v[0]), _mm512_extractf32x8_ps(v[0], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

#include "attention_wide.h"

void bn_attention_f32_avx512(const bn_attention_args *a)
{
    bn_attention_wide(a);
}
