/* dot with codes of 4 and 8 bits, in plain C.
 *
 * Method   A lane of 32 bits meets its four activations one field of 4 inputs after the other.
 * Numbers  32 bits hold the sums of a group (BN_MAX_WIDE_GROUP in layout.h). */
#ifndef BN_DOT_WIDE_SCALAR_H
#define BN_DOT_WIDE_SCALAR_H

#include "dot_scalar.h"

/* The code of output `lane` for input 4 * field + j, of the codes of a step. */
static inline int bn_wide_code(const uint8_t *step, int lane, int field, int j, const int bits)
{
    const int byte = 4 * lane + j;
    if (bits == 4) {
        return step[field / 2 * BN_VECTOR + byte] >> 4 * (field % 2) & 15;
    }
    return step[field * BN_VECTOR + byte];
}

BN_INLINE void bn_wide_step(const uint8_t *step, const int8_t *q, int32_t *acc, const int bits)
{
    for (int lane = 0; lane < BN_PANEL; lane++) {
        for (int field = 0; field < 4; field++) {
            for (int j = 0; j < 4; j++) {
                acc[lane] += bn_wide_code(step, lane, field, j, bits) * q[4 * field + j];
            }
        }
    }
}

BN_INLINE const uint8_t *bn_add_wide_group(const bn_dot_args *a, const uint8_t *panel, const int8_t *q,
                                           size_t steps, int32_t *acc, const int bits)
{
    for (size_t step = 0; step < steps; step++, q += BN_STEP) {
        for (size_t i = 0; i < a->panels; i++, panel += bn_step_bytes(bits)) {
            bn_wide_step(panel, q, acc + i * BN_PANEL, bits);
        }
    }
    return panel;
}

#endif
