/* narrow, scalar. */
#include "half.h"
#include "kernel.h"

void bn_narrow_f16_scalar(const bn_narrow_args *a)
{
    for (size_t i = 0; i < a->count; i++) {
        a->y[i] = bn_float_to_half(a->x[i]);
    }
}
