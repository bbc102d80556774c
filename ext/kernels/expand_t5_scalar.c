/* expand, in plain C. */
#include "t5.h"

static uint8_t least(uint8_t a, uint8_t b)
{
    return a < b ? a : b;
}

void bn_expand_t5_scalar(const bn_expand_args *a)
{
    const size_t row = a->panels * BN_VECTOR;
    const uint8_t *from = a->from;
    uint8_t *to = a->to;

    for (size_t five = 0; five < a->steps / BN_T5_FIVE; five++, to += BN_T5_FIVE * row) {
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
    for (size_t i = 0; i < a->steps % BN_T5_FIVE * row; i++) {
        to[i] = from[i];
    }
}
