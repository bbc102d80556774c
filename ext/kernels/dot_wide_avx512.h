/* dot with codes of 4 and 8 bits, AVX-512 without VNNI.
 *
 * Layout   A field, 4 inputs of 16 outputs (layout.h), is the unsigned operand of vpmaddubsw, which
 *          leaves two 16-bit sums per output.
 * Numbers  As in dot_wide_avx2.h: 4 bits at a time, the 4 pairs of a step fit 16 bits, and vpmaddwd
 *          widens each step's to 32 bits.
 * Method   Up to 4 rows x 64 outputs share each unpacked field.
 */
#ifndef BN_DOT_WIDE_AVX512_H
#define BN_DOT_WIDE_AVX512_H

#include <immintrin.h>

#include "sums_avx512.h"

/* Four bits of a field: with 8 bits the low or the high ones of its codes. */
BN_INLINE __m512i bn_nibbles(const uint8_t *at, const int field, const int high, const int bits)
{
    const __m512i codes = _mm512_loadu_si512(at + field * bits / 8 * BN_VECTOR);
    const int shift = bits == 8 ? 4 * high : 4 * (field % 2);

    return _mm512_and_si512(_mm512_srli_epi16(codes, shift), _mm512_set1_epi8(15));
}

BN_INLINE void bn_multiply_wide_avx512(const bn_strip *s, const int rows, const int panels,
                                       const int bits)
{
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][8];

    bn_begin_sums(s, sum, rows, panels);
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint8_t *at = panel + (size_t)i * bn_step_bytes(bits);
#pragma GCC unroll 2
            for (int high = 0; high < bits / 4; high++) {
                const __m512i factor = _mm512_set1_epi16(high ? 16 : 1);
                __m512i c[4];
#pragma GCC unroll 4
                for (int field = 0; field < 4; field++) {
                    c[field] = bn_nibbles(at, field, high, bits);
                }
#pragma GCC unroll 2
                for (int vector = 2 * high; vector < 2 * high + 2; vector++) {
                    _mm_prefetch((const char *)(at + vector * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
                }
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 4
                    for (int field = 0; field < 4; field++) {
                        const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                        const __m512i x = _mm512_set1_epi32(bn_load_four(four));
                        pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(c[field], x));
                    }
                    sum[i][row] = _mm512_add_epi32(sum[i][row], _mm512_madd_epi16(pairs, factor));
                    BN_KEEP(sum[i][row]);
                }
            }
        }
    }
    bn_store_sums(s, sum, rows, panels);
}

#endif
