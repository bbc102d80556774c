/* dot with five ternary codes in a byte, in plain C: a piece of a row is expanded, then multiplied. */
#include "dot_scalar.h"
#include "t5.h"

enum { PIECE = 20 * BN_T5_FIVE }; /* steps */

static uint8_t least(uint8_t a, uint8_t b)
{
    return a < b ? a : b;
}

/* Steps of t5 to as many of i2s, each of `row` bytes. */
static void expand(const uint8_t *from, size_t steps, size_t row, uint8_t *to)
{
    for (size_t five = 0; five < steps / BN_T5_FIVE; five++, to += BN_T5_FIVE * row) {
        uint8_t *fifth = to + BN_T5_FOUR * row;
        for (size_t i = 0; i < row; i++) {
            fifth[i] = 0;
        }
        for (int r = 0; r < BN_T5_FOUR; r++, from += row) {
            for (size_t i = 0; i < row; i++) {
                uint8_t rest = least(from[i], (uint8_t)(from[i] - BN_T5_WEIGHT));
                rest = least(rest, (uint8_t)(rest - BN_T5_WEIGHT));
                to[(size_t)r * row + i] = bn_t5_codes[rest];
                fifth[i] = (uint8_t)(fifth[i] | ((from[i] - rest) & 3 << 2 * r));
            }
        }
    }
    for (size_t i = 0; i < steps % BN_T5_FIVE * row; i++) {
        to[i] = from[i];
    }
}

static void add_piece(const bn_dot_args *a, const uint8_t *panel, const int8_t *q, size_t steps,
                      int32_t *acc)
{
    uint8_t codes[PIECE * BN_SUPER / BN_PANEL * BN_VECTOR];
    int32_t sum[BN_SUPER];

    expand(panel, steps, a->panels * BN_VECTOR, codes);
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
