/* widen, scalar. */
#include "half.h"
#include "kernel.h"

void bn_widen_f16_scalar(const bn_widen_args *a)
{
    for (size_t i = 0; i < a->count; i++) {
        a->y[i] = bn_half_to_float(a->x[i]);
    }
}
