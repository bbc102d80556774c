/* expand, AVX-512 with VBMI.
 *
 * Method   One table of 128 bytes (vpermi2b) gives four codes of each byte; the fifth are masked into the
 *          fifth step. */
#include "strips.h"
#include "t5_avx512vbmi.h"

/* Five steps of one panel; row: bytes from vector to vector. */
BN_INLINE void five_steps(const uint8_t *from, uint8_t *to, size_t row)
{
    __m512i last = _mm512_setzero_si512();

#pragma GCC unroll 4
    for (int r = 0; r < BN_T5_FOUR; r++, from += row, to += row) {
        const __m512i mask = _mm512_set1_epi8((char)(3 << 2 * r));
        __m512i fifth;
        _mm512_storeu_si512(to, bn_split_t5(_mm512_loadu_si512(from), &fifth));
        _mm_prefetch((const char *)(from + BN_PREFETCH), _MM_HINT_T0);
        last = _mm512_ternarylogic_epi64(last, fifth, mask, 0xF8); /* last | (fifth & mask) */
    }
    _mm512_storeu_si512(to, last);
}

void bn_expand_t5_avx512vbmi(const bn_expand_args *a)
{
    const size_t row = a->panels * BN_VECTOR;
    const uint8_t *from = a->from;
    uint8_t *to = a->to;

    for (size_t five = 0; five < a->steps / BN_T5_FIVE; five++) {
        for (size_t panel = 0; panel < row; panel += BN_VECTOR) {
            five_steps(from + panel, to + panel, row);
        }
        from += BN_T5_FOUR * row;
        to += BN_T5_FIVE * row;
    }
    memcpy(to, from, a->steps % BN_T5_FIVE * row);
}
