/* dot, AVX2.
 *
 * Layout   Half a vector of a panel (layout.h) is 8 outputs x 16 inputs: field p of its bytes is
 *          the unsigned operand of vpmaddubsw for inputs 4p .. 4p + 3, which leaves two 16-bit
 *          sums per output.
 * Numbers  Codes may be 3, so a pair is at most 2 * 3 * 128 = 768 in magnitude, and 42 pairs fit
 *          16 bits: 42 * 768 = 32256.  A step adds 4 of them, so 10 steps (40 pairs, 30720) are
 *          added before vpmaddwd widens the sums to 32 bits; nothing ever saturates.
 * Method   One row: 64 outputs at once, front to back.  Two rows x 32 outputs or 4 rows x 16
 *          outputs share each unpacked plane.
 */
#include <immintrin.h>

#include "strips.h"

enum { STEPS = 10, HALVES = 8, HALF = 32 };

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    const int halves = 2 * panels;
    const __m256i low2 = _mm256_set1_epi8(3);
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m256i sum[4][HALVES];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            sum[row][i] = _mm256_setzero_si256();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < halves; i += 2) {
            const uint8_t *at = panel + i * HALF;
            const __m256i first = _mm256_loadu_si256((const __m256i *)at);
            const __m256i second = _mm256_loadu_si256((const __m256i *)(at + HALF));
            _mm_prefetch((const char *)(at + BN_PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const __m256i c0 = _mm256_and_si256(_mm256_srli_epi16(first, 2 * field), low2);
                const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(second, 2 * field), low2);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                    const __m256i x = _mm256_set1_epi32(bn_load_four(four));
                    sum[row][i] = _mm256_add_epi16(sum[row][i], _mm256_maddubs_epi16(c0, x));
                    sum[row][i + 1] =
                        _mm256_add_epi16(sum[row][i + 1], _mm256_maddubs_epi16(c1, x));
                    BN_KEEP(sum[row][i]);
                    BN_KEEP(sum[row][i + 1]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            int32_t *at = (int32_t *)s->acc + (size_t)row * s->acc_stride + 8 * i;
            __m256i *to = (__m256i *)at;
            const __m256i wide = _mm256_madd_epi16(sum[row][i], ones);
            const __m256i before = s->fresh ? _mm256_setzero_si256() : _mm256_loadu_si256(to);
            _mm256_storeu_si256(to, _mm256_add_epi32(before, wide));
        }
    }
}

void bn_dot_i2s_avx2(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 2, STEPS);
    bn_all_rows(&strips, multiply, 4, 4);
}
