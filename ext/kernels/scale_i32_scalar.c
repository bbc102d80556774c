/* scale, scalar: the definition of the op in plain C. */
#include "kernel.h"

static float exact_term(const bn_scale_args *a, size_t row, size_t g, size_t lane)
{
    const double zero_point = a->zero_point ? (double)a->zero_point[g * BN_SUPER + lane] : a->zero;
    const int32_t *acc = a->acc + (row * a->parts * a->groups + g) * BN_SUPER + lane;
    const double product =
        a->parts == 1 ? acc[0]
                      : 256.0 * acc[0] + acc[a->groups * BN_SUPER] +
                            128.0 * a->code_sum[g * BN_SUPER + lane];

    return (float)(product - zero_point * (double)a->sum[row * a->sum_stride + g]);
}

void bn_scale_i32_scalar(const bn_scale_args *a)
{
    for (size_t row = 0; row < a->rows; row++) {
        float *y = a->y + row * a->y_stride;
        for (size_t lane = 0; lane < a->panels * BN_PANEL; lane++) {
            y[lane] = a->before ? a->before[row * BN_SUPER + lane] : 0.0f;
        }
        for (size_t g = 0; g < a->groups; g++) {
            for (size_t lane = 0; lane < a->panels * BN_PANEL; lane++) {
                const float scale = a->factor[row] * a->scale[g * BN_SUPER + lane];
                y[lane] += exact_term(a, row, g, lane) * scale;
            }
        }
        for (size_t lane = 0; a->bias && lane < a->panels * BN_PANEL; lane++) {
            y[lane] = y[lane] * a->rescale[row] + a->bias[lane];
        }
    }
}
