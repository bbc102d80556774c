/* dot, AVX512-VNNI.
 *
 * Layout   A vector of a panel (layout.h) is 16 outputs x 16 inputs: field p of all bytes is the
 *          unsigned operand of vpdpbusd for inputs 4p .. 4p + 3, and the four activations of these
 *          inputs, broadcast, are the signed one.  A lane of an accumulator is an output: there is
 *          no sum across lanes.
 * Numbers  vpdpbusd does not saturate, and all sums fit 32 bits (BN_MAX_GROUP in layout.h).
 * Method   One row: fields are masked in place, without shifts, into four accumulators that carry
 *          the factors 1, 4, 16 and 64 and are shifted back at the end, exactly.  That is 2
 *          instructions per plane where shifting takes 3, and 16 independent sums.  Several rows:
 *          up to 4 rows x 64 outputs share each unpacked plane, again with 16 independent sums,
 *          enough to cover the latency of 4 or 5 at two per cycle.
 */
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

enum { PREFETCH = 1024 }; /* bytes ahead; further ahead was slower */

static inline __m512i broadcast(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

/* One group of one row; acc (64). */
BN_INLINE void one_row(const uint8_t *panel, size_t stride, const int8_t *q, size_t steps,
                       int32_t *acc, const int panels)
{
    __m512i sum[4][4];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            sum[i][field] = _mm512_setzero_si512();
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint8_t *at = panel + i * BN_VECTOR;
            const __m512i codes = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)(at + PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const __m512i mask = _mm512_set1_epi8((char)(3 << 2 * field));
                sum[i][field] = _mm512_dpbusd_epi32(sum[i][field], _mm512_and_si512(codes, mask),
                                                    broadcast(q + 4 * field));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        const __m512i low = _mm512_add_epi32(sum[i][0], _mm512_srai_epi32(sum[i][1], 2));
        const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sum[i][2], 4),
                                              _mm512_srai_epi32(sum[i][3], 6));
        _mm512_storeu_si512(acc + i * BN_PANEL, _mm512_add_epi32(low, high));
    }
}

/* One group of up to 4 rows; acc (rows, acc_stride). */
BN_INLINE void some_rows(const uint8_t *panel, size_t stride, const int8_t *q, size_t q_stride,
                         size_t steps, int32_t *acc, size_t acc_stride, const int rows,
                         const int panels)
{
    const __m512i low2 = _mm512_set1_epi8(3);
    __m512i sum[4][4];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            sum[i][row] = _mm512_setzero_si512();
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
            _mm_prefetch((const char *)(panel + i * BN_VECTOR + PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            __m512i x[4];
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                x[row] = broadcast(q + (size_t)row * q_stride + 4 * field);
            }
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                const __m512i plane =
                    _mm512_and_si512(_mm512_srli_epi16(codes[i], 2 * field), low2);
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    sum[i][row] = _mm512_dpbusd_epi32(sum[i][row], plane, x[row]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
            _mm512_storeu_si512(acc + (size_t)row * acc_stride + i * BN_PANEL, sum[i][row]);
        }
    }
}

/* All groups of `rows` rows from `first` on, for `panels` of the vectors that stand side by side
 * from `from` on. */
BN_INLINE void all_groups(const bn_dot_args *a, size_t first, size_t from, const int rows,
                          const int panels)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;

    for (size_t g = 0; g < groups; g++) {
        const size_t begin = g * a->group_steps;
        const size_t left = a->steps - begin;
        const size_t steps = left < a->group_steps ? left : a->group_steps;
        const uint8_t *panel = a->panel + begin * stride + from * BN_VECTOR;
        const int8_t *q = a->q + first * a->q_stride + begin * BN_STEP;
        int32_t *acc = a->acc + (first * groups + g) * BN_SUPER + from * BN_PANEL;

        if (rows == 1) {
            one_row(panel, stride, q, steps, acc, panels);
        } else {
            some_rows(panel, stride, q, a->q_stride, steps, acc, groups * BN_SUPER, rows, panels);
        }
    }
}

BN_INLINE void all_panels(const bn_dot_args *a, size_t first, const int rows)
{
    if (a->panels == 4) {
        all_groups(a, first, 0, rows, 4);
        return;
    }
    for (size_t from = 0; from < a->panels; from++) {
        all_groups(a, first, from, rows, 1);
    }
}

void bn_dot_i2s_avx512vnni(const bn_dot_args *a)
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
