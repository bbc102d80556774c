/* dot, AVX-VNNI (256 bits), with codes of 2, 4 and 8 bits.
 *
 * Layout   Half a field, 4 inputs of 8 outputs (layout.h), is the unsigned operand of vpdpbusd.  A
 *          lane of an accumulator is an output: there is no sum across lanes.
 * Numbers  vpdpbusd does not saturate, and all sums fit 32 bits (BN_MAX_GROUP and BN_MAX_WIDE_GROUP
 *          in layout.h).
 * Method   One row: 64 outputs at once, front to back, 8 independent sums.  Two rows x 32 outputs
 *          or 4 rows x 16 outputs share each unpacked field, again 8 sums.
 */
#ifndef BN_DOT_AVXVNNI_H
#define BN_DOT_AVXVNNI_H

#include <immintrin.h>

#include "strips.h"

enum { BN_HALF = 32 };

/* Half a field; `at` is its half of the first vector of 16 outputs x 16 inputs. */
BN_INLINE __m256i bn_half_field(const uint8_t *at, const int field, const int bits)
{
    const uint8_t *vector = at + field * bits / 8 * BN_VECTOR;
    const __m256i codes = _mm256_loadu_si256((const __m256i *)vector);
    const __m256i low = _mm256_set1_epi8((char)((1 << bits) - 1));

    return bits == 8 ? codes : _mm256_and_si256(_mm256_srli_epi16(codes, field * bits % 8), low);
}

/* A strip is a whole group: acc is always fresh. */
BN_INLINE void bn_multiply_avxvnni(const bn_strip *s, const int rows, const int panels,
                                   const int bits)
{
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m256i sum[4][4][2];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            sum[row][i][0] = sum[row][i][1] = _mm256_setzero_si256();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint8_t *at = panel + (size_t)i * bn_step_bytes(bits);
#pragma GCC unroll 4
            for (int vector = 0; vector < bits / 2; vector++) {
                _mm_prefetch((const char *)(at + vector * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const __m256i c0 = bn_half_field(at, field, bits);
                const __m256i c1 = bn_half_field(at + BN_HALF, field, bits);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                    const __m256i x = _mm256_set1_epi32(bn_load_four(four));
                    sum[row][i][0] = _mm256_dpbusd_avx_epi32(sum[row][i][0], c0, x);
                    sum[row][i][1] = _mm256_dpbusd_avx_epi32(sum[row][i][1], c1, x);
                    BN_KEEP(sum[row][i][0]);
                    BN_KEEP(sum[row][i][1]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            _mm256_storeu_si256((__m256i *)to, sum[row][i][0]);
            _mm256_storeu_si256((__m256i *)(to + 8), sum[row][i][1]);
        }
    }
}

#endif
