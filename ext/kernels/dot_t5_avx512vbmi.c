/* dot with five ternary codes in a byte, AVX512-VNNI with VBMI.
 *
 * Layout   Five steps in the room of four (layout.h): a vector becomes one of i2s and, without a shift, a
 *          field of the fifth step, at 6 instructions for 320 codes.
 * Numbers  As in dot_avx512vnni.h; a fifth code counts 85-fold, at most 170 where a field of i2s in place
 *          counts 192 at most.
 * Method   One row: fields in place, as in dot_avx512vnni.h, and the fifth codes in a sum of their own,
 *          which is divided by 85 at the end: exactly, as a product with the inverse modulo 2^32.  Some
 *          rows: all codes at bits 1..0 and one sum for 16 outputs, up to 4 rows x 64 outputs or 8 x 32.
 *          A field is broadcast once for all vectors that are side by side: vector by vector, gcc 12 keeps
 *          the broadcasts in registers and the sums in memory, which took 1.4 times as long.  The steps
 *          that are left are i2s and go to the kernel for these.
 * Measured 2560 x 2560 on a Zen 5 core: 470 products per ns with 4 rows and more, as with i2s; 335 to 350 with 2.
 */
#include "dot_avx512vnni.h"
#include "t5.h"

enum { FIFTH = 4, SUMS = 5 };
#define INVERSE_OF_85 ((int32_t)0xFCFCFCFD)

/* Four fields, as a vector of i2s; *fifth gets 85 times the fifth code, which has it in every field. */
BN_INLINE __m512i split(__m512i five, __m512i *fifth)
{
    const __m512i weight = _mm512_set1_epi8(BN_T5_WEIGHT);
    const __m512i low = _mm512_loadu_si512(bn_t5_codes);
    const __m512i high = _mm512_loadu_si512(bn_t5_codes + BN_VECTOR);
    __m512i rest = _mm512_min_epu8(five, _mm512_sub_epi8(five, weight));

    rest = _mm512_min_epu8(rest, _mm512_sub_epi8(rest, weight));
    *fifth = _mm512_sub_epi8(five, rest);
    return _mm512_permutex2var_epi8(low, rest, high);
}

/* Inputs of the four fields of vector r of five steps, and of its fifth codes. */
BN_INLINE __m512i four_inputs(const int8_t *q, const int r, const int field)
{
    return _mm512_set1_epi32(bn_load_four(q + (field == FIFTH ? FIFTH * BN_STEP + 4 * r
                                                              : r * BN_STEP + 4 * field)));
}

BN_INLINE void one_row(const bn_strip *s, const int panels)
{
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][SUMS];

#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 5
        for (int field = 0; field < SUMS; field++) {
            sum[i][field] = _mm512_setzero_si512();
        }
    }
    for (size_t five = 0; five < s->steps / BN_T5_FIVE; five++, q += BN_T5_FIVE * BN_STEP) {
        for (int r = 0; r < BN_T5_FOUR; r++, panel += s->panel_stride) {
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                __m512i fifth;
                const __m512i codes = split(_mm512_loadu_si512(panel + i * BN_VECTOR), &fifth);
                _mm_prefetch((const char *)(panel + i * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
#pragma GCC unroll 5
                for (int field = 0; field < SUMS; field++) {
                    const __m512i mask = _mm512_set1_epi8((char)(3 << 2 * (field % 4)));
                    const __m512i place = field == FIFTH ? fifth : _mm512_and_si512(codes, mask);
                    sum[i][field] = _mm512_dpbusd_epi32(sum[i][field], place, four_inputs(q, r, field));
                    BN_KEEP(sum[i][field]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
        __m512i total = _mm512_mullo_epi32(sum[i][FIFTH], _mm512_set1_epi32(INVERSE_OF_85));
#pragma GCC unroll 4
        for (int field = 0; field < FIFTH; field++) {
            total = _mm512_add_epi32(total, _mm512_srai_epi32(sum[i][field], 2 * (unsigned)field));
        }
        _mm512_storeu_si512((int32_t *)s->acc + i * BN_PANEL, total);
    }
}

BN_INLINE void some_rows(const bn_strip *s, const int rows, const int panels)
{
    const __m512i low = _mm512_set1_epi8(3);
    const uint8_t *panel = s->panel;
    const int8_t *q = s->x;
    __m512i sum[4][8];

    bn_begin_sums(s, sum, rows, panels);
    for (size_t five = 0; five < s->steps / BN_T5_FIVE; five++, q += BN_T5_FIVE * BN_STEP) {
        for (int r = 0; r < BN_T5_FOUR; r++, panel += s->panel_stride) {
            __m512i codes[4], fifth[4];
#pragma GCC unroll 4
            for (int i = 0; i < panels; i++) {
                codes[i] = split(_mm512_loadu_si512(panel + i * BN_VECTOR), &fifth[i]);
                _mm_prefetch((const char *)(panel + i * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
            }
#pragma GCC unroll 5
            for (int field = 0; field < SUMS; field++) {
                __m512i code[4];
#pragma GCC unroll 4
                for (int i = 0; i < panels; i++) {
                    const __m512i at =
                        field == FIFTH ? fifth[i] : _mm512_srli_epi16(codes[i], 2 * field);
                    code[i] = _mm512_and_si512(at, low);
                }
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) {
                    const __m512i x = four_inputs(q + (size_t)row * s->x_stride, r, field);
#pragma GCC unroll 4
                    for (int i = 0; i < panels; i++) {
                        sum[i][row] = _mm512_dpbusd_epi32(sum[i][row], code[i], x);
                        BN_KEEP(sum[i][row]);
                    }
                }
            }
        }
    }
    bn_store_sums(s, sum, rows, panels);
}

/* A strip is a whole group. */
BN_INLINE void multiply(const bn_strip *s, const int rows, const int panels)
{
    const size_t fives = s->steps / BN_T5_FIVE;
    bn_strip rest = *s;

    if (rows == 1) {
        one_row(s, panels);
    } else {
        some_rows(s, rows, panels);
    }
    rest.panel += fives * BN_T5_FOUR * s->panel_stride;
    rest.x = (const int8_t *)s->x + fives * BN_T5_FIVE * BN_STEP;
    rest.steps = s->steps % BN_T5_FIVE;
    rest.fresh = 0;
    if (rest.steps > 0) {
        bn_some_rows(&rest, rows, panels, 2);
    }
}

void bn_dot_t5_avx512vbmi(const bn_dot_args *a)
{
    bn_strips strips = bn_dot_strips(a, 2, a->group_steps);
    strips.is_t5 = 1;
    bn_all_rows(&strips, multiply, 8, 16);
}
