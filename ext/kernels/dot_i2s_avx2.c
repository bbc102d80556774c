/* dot, AVX2.
 *
 * Layout   Half a vector of a panel (layout.h) is 8 outputs x 16 inputs: field p of its bytes is
 *          the unsigned operand of vpmaddubsw for inputs 4p .. 4p + 3, which leaves two 16-bit
 *          sums per output.
 * Numbers  Codes may be 3, so a pair is at most 2 * 3 * 128 = 768 in magnitude, and 42 pairs fit
 *          16 bits: 42 * 768 = 32256.  A step adds 4 of them, so 10 steps (40 pairs, 30720) are
 *          added before vpmaddwd widens the sums to 32 bits; nothing ever saturates.
 * Method   One row: 64 outputs at once, front to back.  Several rows: 4 rows x 16 outputs share
 *          each unpacked plane.
 */
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

enum { STEPS = 10, HALVES = 8, HALF = 32, PREFETCH = 1024 };

static inline __m256i broadcast(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm256_set1_epi32(four);
}

/* Up to STEPS steps; acc (rows, acc_stride) gets 8 outputs for each of `halves` half vectors,
 * added to what is there unless the sum is fresh. */
BN_INLINE void add_steps(const uint8_t *panel, size_t stride, const int8_t *q, size_t q_stride,
                         size_t steps, int fresh, int32_t *acc, size_t acc_stride, const int rows,
                         const int halves)
{
    const __m256i low2 = _mm256_set1_epi8(3);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[4][HALVES];

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            sum[row][i] = _mm256_setzero_si256();
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < halves; i += 2) {
            const uint8_t *at = panel + i * HALF;
            const __m256i first = _mm256_loadu_si256((const __m256i *)at);
            const __m256i second = _mm256_loadu_si256((const __m256i *)(at + HALF));
            _mm_prefetch((const char *)(at + PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const __m256i c0 = _mm256_and_si256(_mm256_srli_epi16(first, 2 * field), low2);
                const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(second, 2 * field), low2);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const __m256i x = broadcast(q + (size_t)row * q_stride + 4 * field);
                    sum[row][i] = _mm256_add_epi16(sum[row][i], _mm256_maddubs_epi16(c0, x));
                    sum[row][i + 1] =
                        _mm256_add_epi16(sum[row][i + 1], _mm256_maddubs_epi16(c1, x));
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 8
        for (int i = 0; i < halves; i++) {
            __m256i *to = (__m256i *)(acc + (size_t)row * acc_stride + 8 * i);
            const __m256i wide = _mm256_madd_epi16(sum[row][i], ones);
            const __m256i before = fresh ? _mm256_setzero_si256() : _mm256_loadu_si256(to);
            _mm256_storeu_si256(to, _mm256_add_epi32(before, wide));
        }
    }
}

/* All groups of `rows` rows from `first` on, for `halves` half vectors from vector `from` on. */
BN_INLINE void all_groups(const bn_dot_args *a, size_t first, size_t from, const int rows,
                          const int halves)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;
    const uint8_t *panel = a->panel + from * BN_VECTOR;
    const int8_t *q = a->q + first * a->q_stride;

    for (size_t g = 0; g < groups; g++) {
        int32_t *acc = a->acc + (first * groups + g) * BN_SUPER + from * BN_PANEL;
        const size_t left = a->steps - g * a->group_steps;
        const size_t end = left < a->group_steps ? left : a->group_steps;

        for (size_t step = 0; step < end; step += STEPS) {
            const size_t steps = end - step < STEPS ? end - step : STEPS;
            add_steps(panel, stride, q, a->q_stride, steps, step == 0, acc, groups * BN_SUPER, rows,
                      halves);
            panel += steps * stride;
            q += steps * BN_STEP;
        }
    }
}

BN_INLINE void all_panels(const bn_dot_args *a, size_t first, const int rows)
{
    if (rows == 1 && a->panels == 4) {
        all_groups(a, first, 0, 1, HALVES);
        return;
    }
    for (size_t from = 0; from < a->panels; from++) {
        all_groups(a, first, from, rows, 2);
    }
}

void bn_dot_i2s_avx2(const bn_dot_args *a)
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
