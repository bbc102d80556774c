/* dot with five ternary codes in a byte, in plain C: a piece of a row is expanded, then multiplied. */
#include "t5.h"

enum { PIECE = 20 * BN_T5_FIVE }; /* steps */

static void add_piece(const bn_dot_args *a, const uint8_t *panel, const int8_t *q, size_t steps,
                      int32_t *acc)
{
    uint8_t codes[PIECE * BN_SUPER / BN_PANEL * BN_VECTOR];
    int32_t sum[BN_SUPER];

    bn_expand_t5_scalar(&(bn_expand_args){panel, codes, a->panels, steps});
    bn_dot_i2s_scalar(&(bn_dot_args){codes, q, sum, 0, 1, a->panels, steps, steps});
    for (size_t i = 0; i < a->panels * BN_PANEL; i++) {
        acc[i] += sum[i];
    }
}

void bn_dot_t5_scalar(const bn_dot_args *a)
{
    int32_t *acc = a->acc;

    for (size_t row = 0; row < a->rows; row++) {
        const uint8_t *panel = a->panel;
        for (size_t group = 0; group < a->steps; group += a->group_steps, acc += BN_SUPER) {
            const size_t left = a->steps - group;
            const size_t end = group + (left < a->group_steps ? left : a->group_steps);

            for (size_t i = 0; i < a->panels * BN_PANEL; i++) {
                acc[i] = 0;
            }
            for (size_t step = group, steps; step < end; step += steps) {
                steps = end - step < PIECE ? end - step : PIECE;
                add_piece(a, panel, a->q + row * a->q_stride + step * BN_STEP, steps, acc);
                panel += bn_t5_vectors(steps) * a->panels * BN_VECTOR;
            }
        }
    }
}
