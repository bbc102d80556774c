/* dotf, AVX2 and FMA.
 *
 * Layout   Half a vector of a panel (layout.h) as 8 words of 32 bits is one word per output.
 *          Shifted right by 8j + 2p, its lowest two bits are the code of input 4p + j.
 * Method   vpermps looks up code - 1 by the lowest three bits of a lane; the table repeats after
 *          four entries, so the bit above the code needs no mask.  One row: 64 outputs at once.
 *          Several rows: 4 rows x 16 outputs share the looked-up weights.
 * Numbers  Partial sums of BN_DOTF_STEPS steps are added to acc, so that errors grow with the
 *          number of steps in a sum and not with the length of the row.
 */
#include <immintrin.h>

#include "kernel.h"

enum { HALVES = 8, HALF = 32 };

/* Some steps; acc (rows, acc_stride) gets 8 outputs for each of `halves` half vectors, added to
 * what is there unless the sum is fresh. */
BN_INLINE void add_steps(const uint8_t *panel, size_t stride, const float *x, size_t x_stride,
                         size_t steps, int fresh, float *acc, size_t acc_stride, const int rows,
                         const int halves)
{
    const __m256 value = _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2);
    __m256 sum[4][HALVES];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            sum[row][i] = _mm256_setzero_ps();
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, x += BN_STEP) {
#pragma GCC unroll 16
        for (int k = 0; k < BN_STEP; k++) {
            const int shift = 8 * (k % 4) + 2 * (k / 4);
#pragma GCC unroll 8
            for (int i = 0; i < halves; i++) {
                const __m256i codes = _mm256_loadu_si256((const __m256i *)(panel + i * HALF));
                const __m256 w = _mm256_permutevar8x32_ps(value, _mm256_srli_epi32(codes, shift));
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const __m256 xs = _mm256_set1_ps(x[(size_t)row * x_stride + (size_t)k]);
                    sum[row][i] = _mm256_fmadd_ps(w, xs, sum[row][i]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            float *to = acc + (size_t)row * acc_stride + 8 * i;
            const __m256 before = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
            _mm256_storeu_ps(to, _mm256_add_ps(before, sum[row][i]));
        }
    }
}

/* All groups of `rows` rows from `first` on, for `halves` half vectors from vector `from` on. */
BN_INLINE void all_groups(const bn_dotf_args *a, size_t first, size_t from, const int rows,
                          const int halves)
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
                      halves);
            panel += steps * stride;
            x += steps * BN_STEP;
        }
    }
}

BN_INLINE void all_panels(const bn_dotf_args *a, size_t first, const int rows)
{
    if (rows == 1 && a->panels == 4) {
        all_groups(a, first, 0, 1, HALVES);
        return;
    }
    for (size_t from = 0; from < a->panels; from++) {
        all_groups(a, first, from, rows, 2);
    }
}

void bn_dotf_i2s_avx2(const bn_dotf_args *a)
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
