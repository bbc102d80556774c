/* What the SIMD kernels of scale share: the sum over groups.  The header of the instruction set
 * (simd_*.h) comes before it.
 *
 * Numbers  Where there is one zero point for all, a term is an integer of 32 bits, taken modulo 2^32
 *          and rounded once by the conversion.  Otherwise it is computed in double as kernel.h says.
 *          Products and sums are separate instructions (-ffp-contract=off holds for intrinsics too),
 *          so the bits are those of the scalar kernel. */
#ifndef BN_SCALE_GROUPS_H
#define BN_SCALE_GROUPS_H

#include "kernel.h"

/* A vector of sums of (code - zero) q: `acc` are those of code * q, `sum` is that of q, and the
 * outputs are those of a->zero_point and a->code_sum from `at` on. */
typedef bn_floats bn_term_fn(const bn_scale_args *a, const int32_t *acc, int64_t sum, size_t at);

/* `vectors` vectors of all rows from lane `from` on: their sums are independent of one another,
 * which covers the latency of the one of each.  `alone`: there is one group, and it has the bias. */
BN_INLINE void bn_add_groups(const bn_scale_args *args, size_t from, const size_t vectors, const int alone,
                             bn_term_fn *term)
{
    const bn_scale_args a = *args; /* stores to y cannot change it: nothing is loaded again */
    const size_t groups = alone ? 1 : a.groups;

    for (size_t row = 0; row < a.rows; row++) {
        const bn_floats factor = bn_all(a.factor[row]);
        const int32_t *acc = a.acc + row * a.parts * groups * BN_SUPER + from;
        float *y = a.y + row * a.y_stride + from;
        bn_floats total[4];

#pragma GCC unroll 4
        for (size_t i = 0; i < vectors; i++) {
            const size_t at = row * BN_SUPER + from + i * BN_FLOATS;
            total[i] = a.before && !alone ? bn_load_floats(a.before + at) : bn_all(0.0f);
        }
        for (size_t g = 0; g < groups; g++) {
            const int64_t sum = a.sum[row * a.sum_stride + g];
#pragma GCC unroll 4
            for (size_t i = 0; i < vectors; i++) {
                const size_t lane = g * BN_SUPER + i * BN_FLOATS;
                const bn_floats scale = bn_mul(factor, bn_load_floats(a.scale + lane + from));
                total[i] = bn_add(total[i], bn_mul(term(&a, acc + lane, sum, lane + from), scale));
            }
        }
#pragma GCC unroll 4
        for (size_t i = 0; i < vectors; i++) {
            if (alone || a.bias) {
                total[i] = bn_mul(total[i], bn_all(a.rescale[row]));
                total[i] = bn_add(total[i], bn_load_floats(a.bias + from + i * BN_FLOATS));
            }
            bn_store_floats(y + i * BN_FLOATS, total[i]);
        }
    }
}

/* All outputs: four vectors at a time, and the last panels one by one. */
BN_INLINE void bn_add_all_groups(const bn_scale_args *a, bn_term_fn *term)
{
    const size_t end = a->panels * BN_PANEL;
    const int alone = a->groups == 1 && !a->before && a->bias;
    size_t from = 0;

    for (; from + 4 * BN_FLOATS <= end; from += 4 * BN_FLOATS) {
        if (alone) {
            bn_add_groups(a, from, 4, 1, term);
        } else {
            bn_add_groups(a, from, 4, 0, term);
        }
    }
    for (; from < end; from += BN_PANEL) {
        bn_add_groups(a, from, BN_PANEL / BN_FLOATS, 0, term);
    }
}

#endif
