#include "fit.h"

#include <math.h>
#include <stdlib.h>

#include "dispatch.h"
#include "layout.h"

/* A scale as it is stored; NaN if that is neither a normal number of the type nor 0. */
static float stored(bn_weight_type type, float scale)
{
    static const float least[] = {0, 0x1p-14f, 0x1p-126f}, most[] = {INFINITY, 65504.0f, 0x1.fep127f};
    float rounded = scale;
    bn_weight_round(type, &rounded, 1);
    const float size = fabsf(rounded);
    return (size >= least[type] && size <= most[type]) || scale == 0 ? rounded : NAN;
}

bn_step bn_step_of_moments(const bn_rule *rule, const double moments[3], size_t count)
{
    const float mean = (float)(moments[0] / (double)count);
    const float sign = rule->levels == 4 && -moments[1] > moments[2] ? -1.0f : 1.0f;
    if (moments[0] == 0)
        return (bn_step){0, 0, INFINITY, 0};
    if (rule->rounding == BN_ROUND_ABSMEAN) {
        const float scale = stored(rule->scale_type, sign * (mean > 1e-5f ? mean : 1e-5f));
        return (bn_step){1.0f / scale, 0.5f, rule->levels == 4 ? 1.5f : INFINITY, scale};
    }
    const float low = 0.7f * mean;
    return (bn_step){sign, low, rule->levels == 4 ? 3.0f * low : INFINITY, 0};
}

bn_step bn_finish_twn(const bn_rule *rule, bn_step step, const double products[2])
{
    const double ones = products[1] > 1 ? products[1] : 1;
    step.scale = stored(rule->scale_type, (float)((double)step.factor * products[0] / ones));
    return step;
}

bn_step bn_nearest_step(const bn_rule *rule, float scale)
{
    const float s = stored(rule->scale_type, scale), size = fabsf(s);
    const float sign = s > 0 ? 1.0f : s < 0 ? -1.0f : s; /* NaN stays */
    return (bn_step){sign, size * 0.5f, rule->levels == 4 ? size * 1.5f : INFINITY, s};
}

void bn_group_products(const float *w, size_t count, const bn_step *step, double products[2])
{
    double a[BN_LANES] = {0}, b[BN_LANES] = {0};
    const bn_step s = *step;
    for (size_t i = 0; i < count; i += BN_LANES) {
        const size_t lanes = count - i < BN_LANES ? count - i : BN_LANES;
        for (size_t j = 0; j < lanes; j++) {
            const float scaled = w[i + j] * s.factor;
            const float t =
                (float)((scaled > s.low) + (scaled > s.high) - (scaled < -s.low));
            a[j] += (double)scaled * (double)t;
            b[j] += (double)(t * t);
        }
    }
    products[0] = bn_sum_lanes(a);
    products[1] = bn_sum_lanes(b);
}

int bn_fitter_open(bn_fitter *fitter, const bn_rule *rule, bn_groups groups, uint32_t isas)
{
    const size_t keys = bn_optimum_keys(&groups) * sizeof(uint32_t) + groups.count * sizeof(float);
    const size_t moments = 3 * groups.count * sizeof(double);
    fitter->rule = *rule;
    fitter->groups = groups;
    fitter->moments = (bn_moments_fn *)bn_find("moments", "f32", isas)->fn;
    fitter->optimum = (bn_optimum_fn *)bn_find("optimum", "f32", isas)->fn;
    fitter->room = malloc(rule->rounding == BN_ROUND_MSE ? keys : moments);
    return fitter->room == NULL ? -1 : 0;
}

static void fit_means(const bn_fitter *f, const float *w, bn_step *steps)
{
    double *moments = f->room;
    f->moments(&(bn_moments_args){w, moments, f->groups});
    for (size_t g = 0; g < f->groups.count; g++) {
        const size_t count = bn_group_length(&f->groups, g);
        steps[g] = bn_step_of_moments(&f->rule, moments + 3 * g, count);
        if (f->rule.rounding == BN_ROUND_TWN && moments[3 * g] != 0) {
            double products[2];
            bn_group_products(w + g * f->groups.length, count, &steps[g], products);
            steps[g] = bn_finish_twn(&f->rule, steps[g], products);
        }
    }
}

static void fit_optima(const bn_fitter *f, const float *w, bn_step *steps)
{
    float *scale = f->room;
    uint32_t *keys = (uint32_t *)(scale + f->groups.count);
    f->optimum(&(bn_optimum_args){w, scale, keys, f->groups, f->rule.levels});
    for (size_t g = 0; g < f->groups.count; g++)
        steps[g] = bn_nearest_step(&f->rule, scale[g]);
}

int bn_fit_row(const bn_fitter *fitter, const float *w, bn_step *steps)
{
    int held = 1;
    (fitter->rule.rounding == BN_ROUND_MSE ? fit_optima : fit_means)(fitter, w, steps);
    for (size_t g = 0; g < fitter->groups.count; g++)
        held &= !isnan(steps[g].scale);
    return held;
}

void bn_fitter_close(bn_fitter *fitter)
{
    free(fitter->room);
}
