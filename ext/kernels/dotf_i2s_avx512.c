/* dotf, AVX-512.
 *
 * Layout   A vector of a panel (layout.h) as 16 words of 32 bits is one word per output.  Its bits
 *          8j + 4h .. 8j + 4h + 3 are the codes of inputs 8h + j and 8h + 4 + j.
 * Method   The 16 values that two codes a and b can give, (a - 1) x[8h + j] and (b - 1)
 *          x[8h + 4 + j] added, are made with two instructions, and vpermps looks one up for each
 *          output by the lowest four bits of its lane: a shift, a look-up and a sum for two inputs,
 *          where looking up the weights takes a multiply-add for each.  Up to 4 rows x 64 outputs
 *          share the shifts.  One row alone keeps two sums per output, to cover the latency of the
 *          sum.
 * Numbers  Partial sums of BN_DOTF_STEPS steps are added to acc, so that errors grow with the
 *          number of steps in a sum and not with the length of the row.
 */
#include <immintrin.h>

#include "strips.h"

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    const __m512 first = _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2);
    const __m512 second = _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2);
    const uint8_t *panel = s->panel;
    const float *x = s->x;
    __m512 sum[4][4], odd[4];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        odd[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            sum[row][i] = _mm512_setzero_ps();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, x += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
            _mm_prefetch((const char *)(panel + i * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++) {
            const int input = 8 * (pair % 2) + pair / 2;
            __m512i index[4];
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                index[i] = _mm512_srli_epi32(codes[i], 4 * (unsigned)pair);
            }
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                const float *at = x + (size_t)row * s->x_stride + input;
                const __m512 half = _mm512_mul_ps(second, _mm512_set1_ps(at[4]));
                const __m512 table = _mm512_fmadd_ps(first, _mm512_set1_ps(at[0]), half);
#pragma GCC unroll 4
                for (int i = 0; i < panels; i++) {
                    const __m512 value = _mm512_permutexvar_ps(index[i], table);
                    if (rows == 1 && pair % 2) {
                        odd[i] = _mm512_add_ps(odd[i], value);
                    } else {
                        sum[row][i] = _mm512_add_ps(sum[row][i], value);
                        BN_KEEP(sum[row][i]);
                    }
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        sum[0][i] = _mm512_add_ps(sum[0][i], odd[i]);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            float *to = (float *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            const __m512 before = s->fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
            _mm512_storeu_ps(to, _mm512_add_ps(before, sum[row][i]));
        }
    }
}

void bn_dotf_i2s_avx512(const bn_dotf_args *a)
{
    const bn_strips strips = bn_dotf_strips(a, BN_DOTF_STEPS);
    bn_all_rows(&strips, multiply, 4, 16);
}
