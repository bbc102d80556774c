/* moments, scalar: the definition of the op in plain C. */
#include <math.h>

#include "kernel.h"

static void group_moments(const float *w, size_t count, double *moments)
{
    double sum[BN_LANES] = {0};
    float least = w[0], most = w[0];

    for (size_t i = 0; i < count; i++) {
        sum[i % BN_LANES] += (double)fabsf(w[i]);
        least = w[i] < least ? w[i] : least;
        most = w[i] > most ? w[i] : most;
    }
    moments[0] = bn_sum_lanes(sum);
    moments[1] = (double)least;
    moments[2] = (double)most;
}

void bn_moments_f32_scalar(const bn_moments_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t length = bn_group_length(&a->groups, g);
        group_moments(a->w + g * a->groups.length, length, a->moments + 3 * g);
    }
}
