/* dotf, AVX2 and FMA.
 *
 * Layout   Half a vector of a panel (layout.h) as 8 words of 32 bits is one word per output.
 *          Shifted right by 8j + 2p, its lowest two bits are the code of input 4p + j.
 * Method   vpermps looks up code - 1 by the lowest three bits of a lane; the table repeats after
 *          four entries, so the bit above the code needs no mask.  1 or 2 rows x 32 outputs or 4
 *          rows x 16 outputs share the looked-up weights; one row alone keeps two sums per output,
 *          to cover the latency of the multiply-add.
 * Numbers  Partial sums of BN_DOTF_STEPS steps are added to acc, so that errors grow with the
 *          number of steps in a sum and not with the length of the row.
 */
#include <immintrin.h>

#include "strips.h"

enum { HALVES = 4, HALF = 32 };

BN_INLINE void multiply_some(const bn_strip *s, const int rows, const int halves)
{
    const __m256 value = _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2);
    const uint8_t *panel = s->panel;
    const float *x = s->x;
    __m256 sum[4][HALVES], odd[HALVES];

#pragma GCC unroll 4
    for (int i = 0; i < halves; i++) {
        odd[i] = _mm256_setzero_ps();
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            sum[row][i] = _mm256_setzero_ps();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, x += BN_STEP) {
        __m256i codes[HALVES];
#pragma GCC unroll 4
        for (int i = 0; i < halves; i++) {
            codes[i] = _mm256_loadu_si256((const __m256i *)(panel + i * HALF));
            _mm_prefetch((const char *)(panel + i * HALF + BN_PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 16
        for (int k = 0; k < BN_STEP; k++) {
            const int shift = 8 * (k % 4) + 2 * (k / 4);
#pragma GCC unroll 4
            for (int i = 0; i < halves; i++) {
                const __m256i index = _mm256_srli_epi32(codes[i], shift);
                const __m256 w = _mm256_permutevar8x32_ps(value, index);
                if (rows == 1 && k % 2) {
                    odd[i] = _mm256_fmadd_ps(w, _mm256_set1_ps(x[k]), odd[i]);
                    BN_KEEP(odd[i]);
                    continue;
                }
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const __m256 xs = _mm256_set1_ps(x[(size_t)row * s->x_stride + (size_t)k]);
                    sum[row][i] = _mm256_fmadd_ps(w, xs, sum[row][i]);
                    BN_KEEP(sum[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < halves; i++) {
        sum[0][i] = _mm256_add_ps(sum[0][i], odd[i]);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            float *to = (float *)s->acc + (size_t)row * s->acc_stride + 8 * i;
            const __m256 before = s->fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
            _mm256_storeu_ps(to, _mm256_add_ps(before, sum[row][i]));
        }
    }
}

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    bn_strip part = *s;

    if (panels <= 2) {
        multiply_some(s, rows, 2 * panels);
        return;
    }
    multiply_some(&part, rows, 4);
    part.panel += 2 * BN_VECTOR;
    part.acc = (float *)part.acc + 2 * BN_PANEL;
    multiply_some(&part, rows, 4);
}

void bn_dotf_i2s_avx2(const bn_dotf_args *a)
{
    const bn_strips strips = bn_dotf_strips(a, BN_DOTF_STEPS);
    bn_all_rows(&strips, multiply, 4, 4);
}
