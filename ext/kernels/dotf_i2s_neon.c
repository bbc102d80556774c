/* dotf, NEON.
 *
 * Layout   A field of a quarter (simd_neon.h) becomes four vectors of floats, one for each output,
 *          which meet four consecutive activations.
 * Method   Two tables give the upper two bytes of the float code - 1, whose lower two are always 0;
 *          interleaving them, and zeros, makes the floats.  Two fields of a byte are looked up
 *          where they are: the tables are indexed by c and by 4c, which never disagree.  One row:
 *          16 outputs at once.  Several rows: 4 rows x 4 outputs share the floats.
 * Numbers  Partial sums of BN_DOTF_STEPS steps are added to acc, so that errors grow with the
 *          number of steps in a sum and not with the length of the row.
 * Counted  0.97 instructions per weight with 1 row, 0.52 per weight and row with 4
 *          (bench/instructions.py; never timed).
 */
#include "simd_neon.h"

/* Bytes 3 and 2 of the floats -1, 0, 1 and 2 at c = 0, 1, 2, 3 and at 4c. */
static const uint8_t byte3[16] = {0xBF, 0x00, 0x3F, 0x40, 0x00, 0, 0, 0, 0x3F, 0, 0, 0, 0x40};
static const uint8_t byte2[16] = {0x80, 0x00, 0x80, 0x00, 0x00, 0, 0, 0, 0x80, 0, 0, 0, 0x00};

/* code - 1 for four inputs of each output of a quarter. */
typedef struct {
    float32x4_t output[4];
} weights;

BN_INLINE weights look_up(uint8x16_t index)
{
    const uint16x8_t zero = vdupq_n_u16(0);
    const uint8x16_t high = vqtbl1q_u8(vld1q_u8(byte3), index);
    const uint8x16_t low = vqtbl1q_u8(vld1q_u8(byte2), index);
    const uint16x8_t first = vreinterpretq_u16_u8(vzip1q_u8(low, high));
    const uint16x8_t second = vreinterpretq_u16_u8(vzip2q_u8(low, high));
    return (weights){{
        vreinterpretq_f32_u16(vzip1q_u16(zero, first)),
        vreinterpretq_f32_u16(vzip2q_u16(zero, first)),
        vreinterpretq_f32_u16(vzip1q_u16(zero, second)),
        vreinterpretq_f32_u16(vzip2q_u16(zero, second)),
    }};
}

/* Field `field` of a quarter, as an index into the tables. */
BN_INLINE uint8x16_t index_of(uint8x16_t codes, const int field)
{
    const uint8x16_t two = field < 2 ? codes : vshrq_n_u8(codes, 4);
    return vandq_u8(two, vdupq_n_u8(field % 2 ? 0x0C : 0x03));
}

/* Some steps; acc (rows, acc_stride) gets 4 outputs for each of `quarters` quarters, added to what
 * is there unless the sum is fresh. */
BN_INLINE void add_steps(const uint8_t *panel, size_t stride, const float *x, size_t x_stride,
                         size_t steps, int fresh, float *acc, size_t acc_stride, const int rows,
                         const int quarters)
{
    float32x4_t sum[4][4][4]; /* [row][quarter][output], lanes are inputs modulo 4 */

#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 16
        for (int i = 0; i < 4 * quarters; i++) {
            sum[row][i / 4][i % 4] = vdupq_n_f32(0.0f);
        }
    }
    for (size_t step = 0; step < steps; step++, panel += stride, x += BN_STEP) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            const uint8x16_t codes = vld1q_u8(panel + i * BN_QUARTER);
#pragma GCC unroll 4
            for (int field = 0; field < 4; field++) {
                BN_ORDER_LOADS();
                const weights w = look_up(index_of(codes, field));
#pragma GCC unroll 4
                for (int row = 0; row < rows; row++) {
                    const float32x4_t xs = vld1q_f32(x + (size_t)row * x_stride + 4 * field);
#pragma GCC unroll 4
                    for (int output = 0; output < 4; output++) {
                        sum[row][i][output] =
                            vfmaq_f32(sum[row][i][output], w.output[output], xs);
                    }
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (int i = 0; i < quarters; i++) {
            float *to = acc + (size_t)row * acc_stride + i * BN_QUARTER_OUTPUTS;
            const float32x4_t *s = sum[row][i];
            const float32x4_t all = vpaddq_f32(vpaddq_f32(s[0], s[1]), vpaddq_f32(s[2], s[3]));
            vst1q_f32(to, fresh ? all : vaddq_f32(vld1q_f32(to), all));
        }
    }
}

/* All groups and outputs of `rows` rows from `first` on, `quarters` quarters at a time. */
BN_INLINE void all_outputs(const bn_dotf_args *a, size_t first, const int rows, const int quarters)
{
    const size_t stride = a->panels * BN_VECTOR;
    const size_t groups = (a->steps - 1) / a->group_steps + 1;

    for (size_t from = 0; from < a->panels * BN_QUARTERS; from += (size_t)quarters) {
        const uint8_t *panel = a->panel + from * BN_QUARTER;
        const float *x = a->x + first * a->x_stride;
        float *acc = a->acc + first * groups * BN_SUPER + from * BN_QUARTER_OUTPUTS;

        for (size_t group = 0; group < a->steps; group += a->group_steps, acc += BN_SUPER) {
            const size_t left = a->steps - group;
            const size_t end = left < a->group_steps ? left : a->group_steps;
            for (size_t step = 0; step < end; step += BN_DOTF_STEPS) {
                const size_t steps = end - step < BN_DOTF_STEPS ? end - step : BN_DOTF_STEPS;
                add_steps(panel, stride, x, a->x_stride, steps, step == 0, acc, groups * BN_SUPER,
                          rows, quarters);
                panel += steps * stride;
                x += steps * BN_STEP;
            }
        }
    }
}

void bn_dotf_i2s_neon(const bn_dotf_args *a)
{
    size_t row = 0;

    for (; row + 4 <= a->rows; row += 4) {
        all_outputs(a, row, 4, 1);
    }
    switch (a->rows - row) {
    case 3: all_outputs(a, row, 3, 1); break;
    case 2: all_outputs(a, row, 2, 2); break;
    case 1: all_outputs(a, row, 1, 4); break;
    default: break;
    }
}
