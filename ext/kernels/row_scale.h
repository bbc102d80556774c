/* What all actq kernels share: from the largest |x| of a row to its scales. */
#ifndef BN_ROW_SCALE_H
#define BN_ROW_SCALE_H

#include <math.h>
#include <string.h>

#include "half.h"
#include "kernel.h"

/* The bits of |x| as an integer have the order of |x| itself, with Inf and NaN above all numbers.
 * */
enum { BN_ABS_BITS = 0x7FFFFFFF, BN_INF_BITS = 0x7F800000 };

typedef struct {
    int finite;      /* 0: the row's answer is written already */
    float s;         /* multiplies x */
    float low, high; /* bounds of q */
} bn_row_scale;

/* Writes inv_s and returns the scale of a row whose largest |x| has these bits; for a row with NaN
 * or Inf writes the whole answer. */
static inline bn_row_scale bn_make_row_scale(const bn_actq_args *a, uint32_t absmax_bits)
{
    const float levels = (float)((1 << (a->bits - 1)) - 1);
    const float least = 1e-5f; /* keeps the scale of a row of zeros finite */
    const float found = bn_float_from_bits(absmax_bits);
    const float absmax = found > least ? found : least;

    if (absmax_bits >= (uint32_t)BN_INF_BITS) {
        for (int part = 0; part < a->bits / 8; part++) {
            memset(a->q + (size_t)part * a->q_stride, 0, a->groups.padded);
        }
        memset(a->sum, 0, a->groups.count * sizeof *a->sum);
        *a->inv_s = NAN;
        return (bn_row_scale){0, 0.0f, 0.0f, 0.0f};
    }
    *a->inv_s = a->step != 0.0f ? a->step : absmax / levels;
    const float s = a->step != 0.0f ? 1.0f / a->step : 1.0f / absmax * levels;
    return (bn_row_scale){1, s, -levels - 1.0f, levels};
}

#endif
