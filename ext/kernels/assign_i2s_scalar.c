/* assign, scalar: the definition of the op in plain C. */
#include "kernel.h"

static int level(float w, const bn_step *s)
{
    const float scaled = w * s->factor;
    return (scaled > s->low) + (scaled > s->high) - (scaled < -s->low);
}

/* Codes of up to four weights; those that are missing are 1. */
static uint8_t pack_few(const float *w, size_t count, const bn_step *step)
{
    unsigned byte = 0x55;
    for (unsigned i = 0; i < count; i++) {
        byte += (unsigned)(level(w[i], step) * (1 << 2 * i));
    }
    return (uint8_t)byte;
}

void bn_assign_i2s_scalar(const bn_assign_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t start = g * a->groups.length;
        const size_t length = bn_group_length(&a->groups, g);
        const bn_step step = a->steps[g];
        const float *w = a->w + start;

        for (size_t i = 0; a->packed != NULL && i < length; i += 4) {
            a->packed[(start + i) / 4] = pack_few(w + i, length - i < 4 ? length - i : 4, &step);
        }
        for (size_t i = 0; a->rest != NULL && i < length; i++) {
            a->rest[start + i] = w[i] - step.scale * (float)level(w[i], &step);
        }
    }
}
