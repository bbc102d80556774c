/* compare, scalar: the definition of the op in plain C. */
#include "kernel.h"

void bn_compare_f32_scalar(bn_compare_args *a)
{
    double error[BN_LANES] = {0}, signal[BN_LANES] = {0};
    size_t zeros = 0;

    for (size_t i = 0; i < a->count; i++) {
        const double w = (double)a->w[i], delta = w - (double)a->decoded[i];
        error[i % BN_LANES] += delta * delta;
        signal[i % BN_LANES] += w * w;
        zeros += a->decoded[i] == 0;
    }
    a->error = bn_sum_lanes(error);
    a->signal = bn_sum_lanes(signal);
    a->zeros = zeros;
}
