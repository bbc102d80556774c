/* panel, NEON.
 *
 * Method   4 rows x 4 steps of words at a time: the fields of each word change places with shifts and
 *          masks, then the words with zips.
 * Bounds   Whole squares only; the last steps, fewer than 4, go word by word. */
#include <arm_neon.h>

#include "kernel.h"

static inline uint32x4_t fields(uint32x4_t w)
{
    uint32x4_t swap = vandq_u32(veorq_u32(w, vshrq_n_u32(w, 6)), vdupq_n_u32(0x00CC00CC));
    w = veorq_u32(w, veorq_u32(swap, vshlq_n_u32(swap, 6)));
    swap = vandq_u32(veorq_u32(w, vshrq_n_u32(w, 12)), vdupq_n_u32(0x0000F0F0));
    return veorq_u32(w, veorq_u32(swap, vshlq_n_u32(swap, 12)));
}

static inline void store(uint8_t *to, uint32x4_t v)
{
    vst1q_u8(to, vreinterpretq_u8_u32(v));
}

/* Words 0..3 of 4 rows to outputs 0..3 of 4 steps. */
static inline void square(const uint8_t *rows, size_t row_stride, uint8_t *to, size_t step_bytes)
{
    uint32x4_t row[4];

    for (size_t i = 0; i < 4; i++) {
        row[i] = fields(vreinterpretq_u32_u8(vld1q_u8(rows + i * row_stride)));
    }
    const uint32x4_t low02 = vzip1q_u32(row[0], row[2]), high02 = vzip2q_u32(row[0], row[2]);
    const uint32x4_t low13 = vzip1q_u32(row[1], row[3]), high13 = vzip2q_u32(row[1], row[3]);
    store(to, vzip1q_u32(low02, low13));
    store(to + step_bytes, vzip2q_u32(low02, low13));
    store(to + 2 * step_bytes, vzip1q_u32(high02, high13));
    store(to + 3 * step_bytes, vzip2q_u32(high02, high13));
}

void bn_panel_i2s_neon(const bn_panel_args *a)
{
    const size_t outputs = a->panels * BN_PANEL, step_bytes = a->panels * BN_VECTOR;
    const size_t steps = a->steps - a->steps % 4;

    for (size_t step = 0; step < steps; step += 4) {
        for (size_t output = 0; output < outputs; output += 4) {
            square(a->rows + output * a->row_stride + 4 * step, a->row_stride,
                   a->panel + step * step_bytes + 4 * output, step_bytes);
        }
    }
    for (size_t step = steps; step < a->steps; step++) {
        for (size_t output = 0; output < outputs; output++) {
            const uint32_t w = bn_load_word(a->rows + output * a->row_stride + 4 * step);
            bn_store_word(a->panel + step * step_bytes + 4 * output, bn_transpose_fields(w));
        }
    }
}
