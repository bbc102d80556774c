/* dot, ARMv8.2 with the dot product extension.
 *
 * Layout   simd_neon.h: a field of a quarter is the operand of sdot for 4 outputs x 4 inputs, and a
 *          vector of 16 activations is that of all four fields, selected by lane.  A lane of an
 *          accumulator is an output: there is no sum across lanes.
 * Numbers  sdot does not saturate, and all sums fit 32 bits (BN_MAX_GROUP in layout.h).
 * Method   One row: dot_row_dotprod.h.  Several rows: up to 8 rows x 8 outputs, or 4 x 16, share
 *          each unpacked field, with 16 independent sums.
 * Counted  0.155 instructions per weight with 1 row, 0.100 per weight and row with 4, 0.096 with 16
 *          (bench/instructions.py; never timed).
 */
#include "dot_row_dotprod.h"
#include "simd_neon.h"

/* One group of up to 8 rows; acc (rows, acc_stride). */
BN_INLINE void some_rows(const uint8_t *panel, size_t stride, const int8_t *q, size_t q_stride,
                         size_t steps, int32_t *acc, size_t acc_stride, const int rows,
                         const int quarters)
{
    int32x4_t sum[8][4];

#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            sum[row][i] = vdupq_n_s32(0);
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, q += BN_STEP) {
        int8x16_t x[8];
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            x[row] = vld1q_s8(q + (size_t)row * q_stride);
        }
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            BN_ORDER_LOADS();
            const bn_fields codes = bn_unpack(vld1q_u8(panel + i * BN_QUARTER));
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                sum[row][i] = vdotq_laneq_s32(sum[row][i], codes.field[0], x[row], 0);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], codes.field[1], x[row], 1);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], codes.field[2], x[row], 2);
                sum[row][i] = vdotq_laneq_s32(sum[row][i], codes.field[3], x[row], 3);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            vst1q_s32(acc + (size_t)row * acc_stride + i * BN_QUARTER_OUTPUTS, sum[row][i]);
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

void bn_dot_i2s_dotprod(const bn_dot_args *a)
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
