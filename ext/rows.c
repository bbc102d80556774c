/* Rows of activations as the kernels want them: quantized, or padded in float. */
#include <math.h>

#include "call.h"

/* One row of float activations: padded like q, with its sums. */
static void copy_row(const bn_call *c, const float *x, size_t row)
{
    const bn_groups *groups = &c->layer->groups;
    float check_sum = 0.0f;

    for (size_t g = 0; g < groups->count; g++) {
        const size_t length = bn_group_length(groups, g);
        const float *from = x + g * groups->length;
        float *to = c->xf + row * groups->padded + g * groups->stride;
        double sum = 0.0;

        for (size_t i = 0; i < length; i++) {
            to[i] = from[i];
            sum += (double)from[i];
            check_sum += from[i] * 0.0f; /* NaN as soon as a value is not finite */
        }
        for (size_t i = length; i < bn_round_up(length, BN_STEP); i++) {
            to[i] = 0.0f;
        }
        c->xf_sum[row * groups->count + g] = (float)sum;
    }
    c->inv_s[row] = isnan(check_sum) ? NAN : 1.0f;
}

void bn_prepare(const bn_call *c, bn_range rows, float *wide)
{
    const bn_matmul *layer = c->layer;

    for (size_t row = rows.first; row < rows.end; row++) {
        const float *x = wide;
        if (c->type == BN_FLOAT16) {
            layer->widen(&(bn_widen_args){
                .x = (const uint16_t *)c->x + row * layer->k, .y = wide, .count = layer->k});
        } else {
            x = (const float *)c->x + row * layer->k;
        }
        if (layer->parts == 0) {
            copy_row(c, x, row);
            continue;
        }
        layer->actq(&(bn_actq_args){
            .x = x,
            .q = c->q + row * layer->parts * layer->groups.padded,
            .sum = c->sum + row * layer->groups.count,
            .inv_s = c->inv_s + row,
            .groups = layer->groups,
            .q_stride = layer->groups.padded,
            .step = layer->step,
            .bits = layer->bits,
        });
    }
}
