/* dot with codes of 4 and 8 bits, AVX2.
 *
 * Layout   Half a field, 4 inputs of 8 outputs (layout.h), is the unsigned operand of vpmaddubsw,
 *          which leaves two 16-bit sums per output.
 * Numbers  Of codes of 8 bits the low and the high 4 bits are multiplied apart, since vpmaddubsw
 *          would saturate.  With 4 bits a pair is at most 2 * 15 * 128 = 3840 in magnitude, and the 4
 *          of a step 15360: they fit 16 bits.  vpmaddwd widens each step's to 32 bits, where the
 *          high bits get their factor 16 (BN_MAX_WIDE_GROUP in layout.h).
 * Method   One row: 64 outputs at once.  Two rows x 32 outputs or 4 rows x 16 outputs share each
 *          unpacked field.
 */
#ifndef BN_DOT_WIDE_AVX2_H
#define BN_DOT_WIDE_AVX2_H

#include <immintrin.h>

#include "strips.h"

enum { BN_HALF = 32, BN_HALVES = 8 };

/* Four bits of half a field: with 8 bits the low or the high ones of its codes. */
BN_INLINE __m256i bn_nibbles(const uint8_t *at, const int field, const int high, const int bits)
{
    const uint8_t *vector = at + field * bits / 8 * BN_VECTOR;
    const __m256i codes = _mm256_loadu_si256((const __m256i *)vector);
    const int shift = bits == 8 ? 4 * high : 4 * (field % 2);

    return _mm256_and_si256(_mm256_srli_epi16(codes, shift), _mm256_set1_epi8(15));
}

BN_INLINE void bn_multiply_wide_avx2(const bn_strip *s, const int rows, const int panels,
                                     const int bits)
{
    const int halves = 2 * panels;
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m256i sum[4][BN_HALVES];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            sum[row][i] = _mm256_setzero_si256();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            const uint8_t *at = panel + (size_t)(i / 2) * bn_step_bytes(bits) + i % 2 * BN_HALF;
#pragma GCC unroll 2
            for (int high = 0; high < bits / 4; high++) {
                const __m256i factor = _mm256_set1_epi16(high ? 16 : 1);
                __m256i c[4];
#pragma GCC unroll 4
                for (int field = 0; field < 4; field++) {
                    c[field] = bn_nibbles(at, field, high, bits);
                }
                const int vector = 2 * high + i % 2; /* each is read twice, and prefetched once */
                _mm_prefetch((const char *)(at + vector * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    __m256i pairs = _mm256_setzero_si256();
#pragma GCC unroll 4
                    for (int field = 0; field < 4; field++) {
                        const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                        const __m256i x = _mm256_set1_epi32(bn_load_four(four));
                        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(c[field], x));
                    }
                    sum[row][i] = _mm256_add_epi32(sum[row][i], _mm256_madd_epi16(pairs, factor));
                    BN_KEEP(sum[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride + 8 * i;
            _mm256_storeu_si256((__m256i *)to, sum[row][i]);
        }
    }
}

#endif
