/* decode, scalar: the definition of the op in plain C. */
#include "kernel.h"

void bn_decode_i2s_scalar(const bn_decode_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t start = g * a->groups.length;
        const size_t stop = start + bn_group_length(&a->groups, g);
        const float scale = a->scale[g], zero_point = a->zero_point[g];

        for (size_t i = start; i < stop; i++) {
            const int code = a->packed[i / 4] >> 2 * (i % 4) & 3;
            const float value = ((float)code - zero_point) * scale;
            a->out[i] = a->add ? a->out[i] + value : value;
        }
    }
}
