/* What the dot kernels in plain C share: the groups of each row, whose sums begin at 0. */
#ifndef BN_DOT_SCALAR_H
#define BN_DOT_SCALAR_H

#include <string.h>

#include "kernel.h"

/* Adds the products of `steps` steps, a whole group, to acc (16 * panels); returns the end of its panel. */
typedef const uint8_t *bn_add_group_fn(const bn_dot_args *a, const uint8_t *panel, const int8_t *q,
                                       size_t steps, int32_t *acc);

BN_INLINE void bn_dot_scalar(const bn_dot_args *a, bn_add_group_fn *add)
{
    int32_t *acc = a->acc;

    for (size_t row = 0; row < a->rows; row++) {
        const uint8_t *panel = a->panel;
        for (size_t step = 0; step < a->steps; step += a->group_steps, acc += BN_SUPER) {
            const size_t left = a->steps - step;
            const int8_t *q = a->q + row * a->q_stride + step * BN_STEP;

            memset(acc, 0, a->panels * BN_PANEL * sizeof *acc);
            panel = add(a, panel, q, left < a->group_steps ? left : a->group_steps, acc);
        }
    }
}

#endif
