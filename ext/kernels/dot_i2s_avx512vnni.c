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
 *          up to 6 rows x 64 outputs share each unpacked plane, with 4 sums per row; 16 cover the
 *          latency of 4 or 5 at two per cycle.
 * Tried    gf2p8affineqb in place of shift and mask: the same to 5 % slower on Zen 5, where
 *          shifts do not compete with vpdpbusd and gf2p8affineqb does.
 * Measured 2560 x 2560 on a Zen 5 core at 3.8 GHz, whose vpdpbusd makes 483 products per ns: 450
 *          per ns with 1 row, 430 with 2, 480 with more.  One row with weights from memory runs at
 *          the speed of a loop that only reads them.
 */
#include <immintrin.h>

#include "strips.h"

enum { PREFETCH = 4096 }; /* bytes ahead; with 1024, 33 of 39 GB/s */

/* A strip is a whole group: acc is always fresh. */
BN_INLINE void one_row(const bn_strip *s, const int panels)
{
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][4];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            sum[i][field] = _mm512_setzero_si512();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            const uint8_t *at = panel + i * BN_VECTOR;
            const __m512i codes = _mm512_loadu_si512(at);
            _mm_prefetch((const char *)(at + PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const __m512i mask = _mm512_set1_epi8((char)(3 << 2 * field));
                const __m512i x = _mm512_set1_epi32(bn_load_four(q + 4 * field));
                sum[i][field] =
                    _mm512_dpbusd_epi32(sum[i][field], _mm512_and_si512(codes, mask), x);
                BN_KEEP(sum[i][field]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        const __m512i low = _mm512_add_epi32(sum[i][0], _mm512_srai_epi32(sum[i][1], 2));
        const __m512i high = _mm512_add_epi32(_mm512_srai_epi32(sum[i][2], 4),
                                              _mm512_srai_epi32(sum[i][3], 6));
        _mm512_storeu_si512((int32_t *)s->acc + i * BN_PANEL, _mm512_add_epi32(low, high));
    }
}

BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    const __m512i low2 = _mm512_set1_epi8(3);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][6];

    if (rows == 1) {
        one_row(s, panels);
        return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            sum[i][row] = _mm512_setzero_si512();
        }
    }
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < panels; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
            _mm_prefetch((const char *)(panel + i * BN_VECTOR + PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            __m512i plane[4];
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                plane[i] = _mm512_and_si512(_mm512_srli_epi16(codes[i], 2 * field), low2);
            }
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                const int8_t *four = q + (size_t)row * s->x_stride + 4 * field;
                const __m512i x = _mm512_set1_epi32(bn_load_four(four));
#pragma GCC unroll 4
                for (int i = 0; i < panels; i++) {
                    sum[i][row] = _mm512_dpbusd_epi32(sum[i][row], plane[i], x);
                    BN_KEEP(sum[i][row]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            _mm512_storeu_si512(to, sum[i][row]);
        }
    }
}

void bn_dot_i2s_avx512vnni(const bn_dot_args *a)
{
    const bn_strips strips = bn_dot_strips(a, a->group_steps);
    bn_all_rows(&strips, multiply, 6, 24);
}
