/* dot, ARMv8.6 with 8-bit matrix products.
 *
 * Layout   smmla multiplies 2 rows x 8 inputs with 2 outputs x 8 inputs.  A quarter (simd_neon.h)
 *          has 4 inputs of an output in a word; interleaving its words with those of its fields
 *          moved down by one gives vectors of 2 outputs that hold 8 inputs (fields 0 and 1) in
 *          their lowest bits and the other 8 (fields 2 and 3) four bits above.  Halves of the
 *          activations of two rows make the other operand.
 * Numbers  smmla does not saturate, and all sums fit 32 bits (BN_MAX_GROUP in layout.h).
 * Method   One row: dot_row_dotprod.h.  Several rows: up to 8 rows x 8 outputs, or 4 x 16, share
 *          each unpacked operand, with 16 independent sums.  Of an odd number of rows the last one
 *          meets itself, and what comes of its double is not stored.
 * Counted  0.155 instructions per weight with 1 row, 0.085 per weight and row with 4, 0.073 with 16
 *          (bench/instructions.py; never timed).
 */
#include "dot_row_dotprod.h"
#include "simd_neon.h"

/* A quarter as operands: [half of the inputs][half of the outputs]. */
typedef struct {
    int8x16_t part[2][2];
} operands;

BN_INLINE operands unpack(uint8x16_t codes)
{
    const uint8x16_t low2 = vdupq_n_u8(3);
    const uint32x4_t even = vreinterpretq_u32_u8(codes);
    const uint32x4_t odd = vreinterpretq_u32_u8(vshrq_n_u8(codes, 2));
    const uint8x16_t first = vreinterpretq_u8_u32(vzip1q_u32(even, odd));
    const uint8x16_t second = vreinterpretq_u8_u32(vzip2q_u32(even, odd));
    return (operands){{
        {
            vreinterpretq_s8_u8(vandq_u8(first, low2)),
            vreinterpretq_s8_u8(vandq_u8(second, low2)),
        },
        {
            vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(first, 4), low2)),
            vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(second, 4), low2)),
        },
    }};
}

/* One group of up to 8 rows; acc (rows, acc_stride). */
BN_INLINE void some_rows(const uint8_t *panel, size_t stride, const int8_t *q, size_t q_stride,
                         size_t steps, int32_t *acc, size_t acc_stride, const int rows,
                         const int quarters)
{
    const int pairs = (rows + 1) / 2;
    int32x4_t sum[4][4][2]; /* a lane each for 2 rows x 2 outputs */

#pragma GCC unroll 4
    for (int pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            sum[pair][i][0] = sum[pair][i][1] = vdupq_n_s32(0);
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
        int8x16_t x[4][2];
#pragma GCC unroll 4
        for (int pair = 0; pair < pairs; pair++) {
            const size_t second = (size_t)(2 * pair + (2 * pair + 1 < rows));
            const int64x2_t x0 = vreinterpretq_s64_s8(vld1q_s8(q + 2 * (size_t)pair * q_stride));
            const int64x2_t x1 = vreinterpretq_s64_s8(vld1q_s8(q + second * q_stride));
            x[pair][0] = vreinterpretq_s8_s64(vzip1q_s64(x0, x1));
            x[pair][1] = vreinterpretq_s8_s64(vzip2q_s64(x0, x1));
        }
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            BN_ORDER_LOADS();
            const operands codes = unpack(vld1q_u8(panel + i * BN_QUARTER));
#pragma GCC unroll 4
            for (int pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    int32x4_t *to = &sum[pair][i][half];
                    *to = vmmlaq_s32(*to, x[pair][0], codes.part[0][half]);
                    *to = vmmlaq_s32(*to, x[pair][1], codes.part[1][half]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            int32_t *to = acc + 2 * (size_t)pair * acc_stride + i * BN_QUARTER_OUTPUTS;
            const int64x2_t first = vreinterpretq_s64_s32(sum[pair][i][0]);
            const int64x2_t second = vreinterpretq_s64_s32(sum[pair][i][1]);
            vst1q_s32(to, vreinterpretq_s32_s64(vzip1q_s64(first, second)));
            if (2 * pair + 1 < rows) {
                vst1q_s32(to + acc_stride, vreinterpretq_s32_s64(vzip2q_s64(first, second)));
            }
        }
    }
}

/* All groups and outputs of `rows` rows from `first` on, `quarters` quarters at a time. */
BN_INLINE void all_outputs(const bn_dot_args *a, size_t first, const int rows, const int quarters)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;

    for (size_t from = 0; from < a->panels * BN_QUARTERS; from += (size_t)quarters) {
        for (size_t g = 0; g < groups; g++) {
            const size_t begin = g * a->group_steps;
            const size_t left = a->steps - begin;
            some_rows(a->panel + begin * stride + from * BN_QUARTER, stride,
                      a->q + first * a->q_stride + begin * BN_STEP, a->q_stride,
                      left < a->group_steps ? left : a->group_steps,
                      a->acc + (first * groups + g) * BN_SUPER + from * BN_QUARTER_OUTPUTS,
                      groups * BN_SUPER, rows, quarters);
        }
    }
}

void bn_dot_i2s_i8mm(const bn_dot_args *a)
{
    size_t row = 0;

    for (; row + 8 <= a->rows; row += 8) {
        all_outputs(a, row, 8, 2);
    }
    for (; row + 4 <= a->rows; row += 4) {
        all_outputs(a, row, 4, 4);
    }
    switch (a->rows - row) {
    case 3: all_outputs(a, row, 3, 4); break;
    case 2: all_outputs(a, row, 2, 4); break;
    case 1: bn_dot_row(a, row); break;
    default: break;
    }
}
