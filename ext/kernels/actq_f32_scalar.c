/* actq, scalar: the definition of the op in plain C. */
#include "kernel.h"
#include "row_scale.h"

/* Half to even for |value| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction. */
static int round_even(float value)
{
    const float magic = 12582912.0f;
    return (int)((value + magic) - magic);
}

static int quantize(float x, const bn_row_scale *scale)
{
    const float value = x * scale->s;
    return round_even(value < scale->low ? scale->low : value > scale->high ? scale->high : value);
}

static void store(const bn_actq_args *a, size_t at, int q)
{
    if (a->bits == 8) {
        a->q[at] = (int8_t)q;
    } else {
        a->q[at] = (int8_t)((q - (q & 255)) / 256);
        a->q[a->q_stride + at] = (int8_t)((q & 255) - 128);
    }
}

void bn_actq_f32_scalar(const bn_actq_args *a)
{
    uint32_t absmax = 0;

    for (size_t k = 0; k < a->groups.k; k++) {
        const uint32_t bits = bn_float_bits(a->x[k]) & (uint32_t)BN_ABS_BITS;
        absmax = bits > absmax ? bits : absmax;
    }
    const bn_row_scale scale = bn_make_row_scale(a, absmax);
    if (!scale.finite) {
        return;
    }
    for (size_t g = 0; g < a->groups.count; g++) {
        const float *x = a->x + g * a->groups.length;
        const size_t length = bn_group_length(&a->groups, g);
        int64_t sum = 0;

        for (size_t i = 0; i < bn_round_up(length, BN_STEP); i++) {
            const int q = i < length ? quantize(x[i], &scale) : 0;
            store(a, g * a->groups.stride + i, q);
            sum += q;
        }
        a->sum[g] = sum;
    }
}
