/* dotf, AVX-512.
 *
 * Layout   A vector of a panel (layout.h) as 16 words of 32 bits is one word per output.  Shifted
 *          right by 8j + 2p, its lowest two bits are the code of input 4p + j.
 * Method   vpermps looks up code - 1 by the lowest four bits of a lane; the table repeats every
 *          four entries, so the two bits above the code need no mask.  Up to 4 rows x 64 outputs
 *          share the looked-up weights.  One row alone keeps two sums per output, to cover the
 *          latency of the multiply-add.
 * Numbers  Partial sums of BN_DOTF_STEPS steps are added to acc, so that errors grow with the
 *          number of steps in a sum and not with the length of the row.
 */
#include <immintrin.h>

#include "kernel.h"

/* Some steps; acc (rows, acc_stride) gets 16 outputs for each of `panels` vectors, added to what
 * is there unless the sum is fresh. */
BN_INLINE void add_steps(const uint8_t *panel, size_t stride, const float *x, size_t x_stride,
                         size_t steps, int fresh, float *acc, size_t acc_stride, const int rows,
                         const int panels)
{
    const __m512 value = _mm512_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2);
    __m512 sum[4][4], odd[4];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        odd[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            sum[row][i] = _mm512_setzero_ps();
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, x += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
        }
#pragma GCC unroll 16
        for (int k = 0; k < BN_STEP; k++) {
            const unsigned shift = 8 * ((unsigned)k % 4) + 2 * ((unsigned)k / 4);
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(codes[i], shift), value);
                if (rows == 1 && k % 2) {
                    odd[i] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[k]), odd[i]);
                    continue;
                }
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const __m512 xs = _mm512_set1_ps(x[(size_t)row * x_stride + (size_t)k]);
                    sum[row][i] = _mm512_fmadd_ps(w, xs, sum[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        sum[0][i] = _mm512_add_ps(sum[0][i], odd[i]);
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            float *to = acc + (size_t)row * acc_stride + i * BN_PANEL;
            const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
            _mm512_storeu_ps(to, _mm512_add_ps(before, sum[row][i]));
        }
    }
}

/* All groups of `rows` rows from `first` on, for `panels` of the vectors side by side from `from`
 * on. */
BN_INLINE void all_groups(const bn_dotf_args *a, size_t first, size_t from, const int rows,
                          const int panels)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;
    const uint8_t *panel = a->panel + from * BN_VECTOR;
    const float *x = a->x + first * a->x_stride;

    for (size_t g = 0; g < groups; g++) {
        float *acc = a->acc + (first * groups + g) * BN_SUPER + from * BN_PANEL;
        const size_t left = a->steps - g * a->group_steps;
        const size_t end = left < a->group_steps ? left : a->group_steps;

        for (size_t step = 0; step < end; step += BN_DOTF_STEPS) {
            const size_t steps = end - step < BN_DOTF_STEPS ? end - step : BN_DOTF_STEPS;
            add_steps(panel, stride, x, a->x_stride, steps, step == 0, acc, groups * BN_SUPER, rows,
                      panels);
            panel += steps * stride;
            x += steps * BN_STEP;
        }
    }
}

BN_INLINE void all_panels(const bn_dotf_args *a, size_t first, const int rows)
{
    if (a->panels == 4) {
        all_groups(a, first, 0, rows, 4);
        return;
    }
    for (size_t from = 0; from < a->panels; from++) {
        all_groups(a, first, from, rows, 1);
    }
}

void bn_dotf_i2s_avx512vnni(const bn_dotf_args *a)
{
    size_t row = 0;

    for (; row + 4 <= a->rows; row += 4) {
        all_panels(a, row, 4);
    }
    switch (a->rows - row) {
    case 3: all_panels(a, row, 3); break;
    case 2: all_panels(a, row, 2); break;
    case 1: all_panels(a, row, 1); break;
    default: break;
    }
}
