/* A vector of t5 (layout.h, t5.h) with AVX-512 and VBMI. */
#ifndef BN_T5_AVX512VBMI_H
#define BN_T5_AVX512VBMI_H

#include <immintrin.h>

#include "t5.h"

/* Four fields, as a vector of i2s; *fifth gets 85 times the fifth code, which has it in every field. */
BN_INLINE __m512i bn_split_t5(__m512i five, __m512i *fifth)
{
    const __m512i weight = _mm512_set1_epi8(BN_T5_WEIGHT);
    const __m512i low = _mm512_loadu_si512(bn_t5_codes);
    const __m512i high = _mm512_loadu_si512(bn_t5_codes + BN_VECTOR);
    __m512i rest = _mm512_min_epu8(five, _mm512_sub_epi8(five, weight));

    rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, weight));
    *fifth = _mm512_sub_epi8(five, rest);
    return _mm512_permutex2var_epi8(low, rest, high);
}

#endif
