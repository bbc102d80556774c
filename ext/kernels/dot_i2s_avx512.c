/* dot, AVX-512 without VNNI.
 *
 * Layout   A vector of a panel (layout.h) is 16 outputs x 16 inputs: field p of its bytes is the
 *          unsigned operand of vpmaddubsw for inputs 4p .. 4p + 3, which leaves two 16-bit sums per
 *          output.
 * Numbers  As in dot_i2s_avx2.c: 10 steps of pairs of at most 768 in magnitude fit 16 bits, then
 *          vpmaddwd widens the sums to 32 bits.
 * Method   Up to 4 rows x 64 outputs share each unpacked plane.
 */
#include <immintrin.h>

#include "strips.h"

enum { STEPS = 10 };

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    const __m512i low2 = _mm512_set1_epi8(3);
    const __m512i ones = _mm512_set1_epi16(1);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][4];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            sum[row][i] = _mm512_setzero_si512();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
            _mm_prefetch((const char *)(panel + i * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            __m512i plane[4];
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                plane[i] = _mm512_and_si512(_mm512_srli_epi16(codes[i], 2 * field), low2);
            }
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                const __m512i x = _mm512_set1_epi32(bn_load_four(four));
#pragma GCC unroll 4
                for (int i = 0; i < panels; i++) {
                    const __m512i pairs = _mm512_maddubs_epi16(plane[i], x);
                    sum[row][i] = _mm512_add_epi16(sum[row][i], pairs);
                    BN_KEEP(sum[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            const __m512i wide = _mm512_madd_epi16(sum[row][i], ones);
            const __m512i before = s->fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(to);
            _mm512_storeu_si512(to, _mm512_add_epi32(before, wide));
        }
    }
}

void bn_dot_i2s_avx512(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, 2, STEPS);
    bn_all_rows(&strips, multiply, 4, 16);
}
