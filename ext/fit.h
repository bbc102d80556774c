/* How the weights of a group choose their step: reference.fit_group. */
#ifndef BN_FIT_H
#define BN_FIT_H

#include "weight.h"

typedef enum { BN_ROUND_ABSMEAN, BN_ROUND_TWN, BN_ROUND_MSE } bn_rounding;

typedef struct {
    bn_rounding rounding;
    int levels;                /* 3 or 4 */
    bn_weight_type scale_type; /* scales are rounded to it before codes are chosen */
} bn_rule;

/* absmean and twn, for `count` weights of these moments (kernel.h, op moments).  The step of twn lacks the
 * scale, for which bn_finish_twn wants the products. */
bn_step bn_step_of_moments(const bn_rule *rule, const double moments[3], size_t count);
bn_step bn_finish_twn(const bn_rule *rule, bn_step step, const double products[2]);

/* The nearest level of a scale, which is rounded first. */
bn_step bn_nearest_step(const bn_rule *rule, float scale);

/* a = sum of w f t and b = sum of t^2, summed in lanes as kernel.h tells.  The best scale for these t is
 * f a / b when f is 1 or -1. */
void bn_group_products(const float *w, size_t count, const bn_step *step, double products[2]);

/* Fits the groups of a row. */
typedef struct {
    bn_rule rule;
    bn_groups groups;
    bn_moments_fn *moments;
    bn_optimum_fn *optimum;
    void *room;
} bn_fitter;

/* Returns 0, or -1 when memory is short. */
int bn_fitter_open(bn_fitter *fitter, const bn_rule *rule, bn_groups groups, uint32_t isas);

/* Writes the steps (groups) of a row w (k).  Returns 0 if some scale is no normal number of the rule's type:
 * then it is NaN. */
int bn_fit_row(const bn_fitter *fitter, const float *w, bn_step *steps);

void bn_fitter_close(bn_fitter *fitter);

#endif
