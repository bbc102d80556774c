/* dot with five ternary codes in a byte, in plain C: a piece of a row is expanded, then multiplied. */
#include "dot_scalar.h"
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

static const uint8_t *add_group(const bn_dot_args *a, const uint8_t *panel, const int8_t *q, size_t left,
                                int32_t *acc)
{
    for (size_t steps; left > 0; left -= steps) {
        steps = left < PIECE ? left : PIECE;
        add_piece(a, panel, q, steps, acc);
        panel += bn_t5_vectors(steps) * a->panels * BN_VECTOR;
        q += steps * BN_STEP;
    }
    return panel;
}

void bn_dot_t5_scalar(const bn_dot_args *a)
{
    bn_dot_scalar(a, add_group);
}
