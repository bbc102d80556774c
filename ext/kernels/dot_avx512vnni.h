/* dot, AVX512-VNNI, with codes of 2, 4 and 8 bits.
 *
 * Layout   A field, 4 inputs of 16 outputs (layout.h), is the unsigned operand of vpdpbusd, and the
 *          four activations of these inputs, broadcast, are the signed one.  A lane of an
 *          accumulator is an output: there is no sum across lanes.
 * Numbers  vpdpbusd does not saturate, and all sums fit 32 bits (BN_MAX_GROUP and BN_MAX_WIDE_GROUP
 *          in layout.h).
 * Method   One row: fields are masked in place, without shifts, into four accumulators that carry
 *          their place as a factor and are shifted back at the end, exactly.  That is 2
 *          instructions per field where shifting takes 3, and 16 independent sums.  Several rows:
 *          up to 6 rows x 64 outputs, or 8 x 32, share each unpacked field; 16 sums cover the latency
 *          of 4 or 5 at two per cycle.
 * Counted  64 inputs x 64 outputs with codes of 2 bits take an Intel core, which multiplies and masks twice
 *          per cycle and shifts once, 56 + 32 cycles for each of up to 8 rows at once (bench/ports.py).
 */
#ifndef BN_DOT_AVX512VNNI_H
#define BN_DOT_AVX512VNNI_H

#include <immintrin.h>

#include "sums_avx512.h"

/* In which vector of a step a field is, and from which bit on. */
BN_INLINE int bn_vector_of(const int field, const int bits)
{
    return field * bits / 8;
}

BN_INLINE int bn_shift_of(const int field, const int bits)
{
    return field * bits % 8;
}

/* A strip is a whole group: acc is always fresh. */
BN_INLINE void bn_one_row(const bn_strip *s, const int panels, const int bits)
{
    const size_t step_bytes = bn_step_bytes(bits);
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
            __m512i codes[4];
#pragma GCC unroll 4
            for (int vector = 0; vector < bits / 2; vector++) {
                const uint8_t *at = panel + (size_t)i * step_bytes + vector * BN_VECTOR;
                codes[vector] = _mm512_loadu_si512(at);
                _mm_prefetch((const char *)(at + BN_PREFETCH), _MM_HINT_T0);
            }
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                const int mask = ((1 << bits) - 1) << bn_shift_of(field, bits);
                const __m512i place = _mm512_and_si512(codes[bn_vector_of(field, bits)],
                                                       _mm512_set1_epi8((char)mask));
                const __m512i x = _mm512_set1_epi32(bn_load_four(q + 4 * field));
                sum[i][field] = _mm512_dpbusd_epi32(sum[i][field], place, x);
                BN_KEEP(sum[i][field]);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        __m512i total = sum[i][0];
#pragma GCC unroll 4
        for (int field = 1; field < 4; field++) {
            const unsigned shift = (unsigned)bn_shift_of(field, bits);
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[i][field], shift));
        }
        _mm512_storeu_si512((int32_t *)s->acc + i * BN_PANEL, total);
    }
}

BN_INLINE void bn_some_rows(const bn_strip *s, const int rows, const int panels, const int bits)
{
    const __m512i low = _mm512_set1_epi8((char)((1 << bits) - 1));
    const size_t step_bytes = bn_step_bytes(bits);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][8];

    bn_begin_sums(s, sum, rows, panels);
    for (size_t step = 0; step < s->steps; step++, panel += s->panel_stride, q += BN_STEP) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            const int shift = bn_shift_of(field, bits);
            __m512i plane[4];
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                if (shift == 0) {
                    const uint8_t *at = panel + (size_t)i * step_bytes +
                                        bn_vector_of(field, bits) * BN_VECTOR;
                    codes[i] = _mm512_loadu_si512(at);
                    _mm_prefetch((const char *)(at + BN_PREFETCH), _MM_HINT_T0);
                }
                plane[i] = codes[i];
                if (bits != 8) {
                    plane[i] = _mm512_and_si512(_mm512_srli_epi16(codes[i], shift), low);
                }
            }
#pragma GCC unroll 8
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
    bn_store_sums(s, sum, rows, panels);
}

BN_INLINE void bn_multiply_avx512vnni(const bn_strip *s, const int rows, const int panels,
                                      const int bits)
{
    if (rows == 1) {
        bn_one_row(s, panels, bits);
    } else {
        bn_some_rows(s, rows, panels, bits);
    }
}

#endif
