/* Rounding to the levels of a grid: parameters by alternating least squares, codes by error feedback. */
#include "grid.h"

#include <math.h>
#include <string.h>

void bn_sort_levels(const bn_levels *levels, const float *theta, bn_sorted *sorted)
{
    for (size_t l = 0; l < levels->count; l++) {
        float value = 0;
        for (size_t p = 0; p < levels->params; p++)
            value += levels->coefficient[l * levels->params + p] * theta[p];
        size_t i = l;
        for (; i > 0 && sorted->value[i - 1] > value; i--) {
            sorted->value[i] = sorted->value[i - 1];
            sorted->index[i] = sorted->index[i - 1];
        }
        sorted->value[i] = value;
        sorted->index[i] = (uint8_t)l;
    }
}

/* Position of the nearest of `count` rising values; of two as near the lower one. */
static inline size_t nearest(const float *value, size_t count, float w)
{
    size_t first = 0; /* value[first] <= w, or first is 0 */
    for (size_t left = count; left > 1;) {
        const size_t half = left / 2;
        first = value[first + half] <= w ? first + half : first;
        left -= half;
    }
    return first + 1 < count && value[first + 1] - w < w - value[first] ? first + 1 : first;
}

/* Solves a x = b for a positive semidefinite a by elimination; a direction without weight stays 0. */
static void solve(double a[BN_GRID_PARAMS][BN_GRID_PARAMS], double *b, size_t n, float *x)
{
    const double tiny = 1e-9;
    double diagonal[BN_GRID_PARAMS];
    for (size_t i = 0; i < n; i++)
        diagonal[i] = a[i][i];
    for (size_t i = 0; i < n; i++) {
        if (a[i][i] <= tiny * diagonal[i]) {
            a[i][i] = 0;
            continue;
        }
        for (size_t j = i + 1; j < n; j++) {
            const double factor = a[j][i] / a[i][i];
            for (size_t c = i; c < n; c++)
                a[j][c] -= factor * a[i][c];
            b[j] -= factor * b[i];
        }
    }
    for (size_t i = n; i-- > 0;) {
        double rest = b[i];
        for (size_t c = i + 1; c < n; c++)
            rest -= a[i][c] * (double)x[c];
        x[i] = a[i][i] > 0 ? (float)(rest / a[i][i]) : 0;
    }
}

/* Returns the weighted error of the nearest levels; `better` gets the parameters that suit them best. */
static double fit_round(const bn_levels *levels, const float *w, const float *importance, size_t count,
                        const float *theta, float *better)
{
    bn_sorted sorted;
    double weight[BN_GRID_LEVELS] = {0}, sum[BN_GRID_LEVELS] = {0}, error = 0;
    bn_sort_levels(levels, theta, &sorted);
    for (size_t i = 0; i < count; i++) {
        const size_t at = nearest(sorted.value, levels->count, w[i]);
        const double apart = (double)w[i] - (double)sorted.value[at];
        error += (double)importance[i] * apart * apart;
        weight[sorted.index[at]] += (double)importance[i];
        sum[sorted.index[at]] += (double)importance[i] * (double)w[i];
    }
    double a[BN_GRID_PARAMS][BN_GRID_PARAMS] = {{0}}, b[BN_GRID_PARAMS] = {0};
    for (size_t l = 0; l < levels->count; l++) {
        const float *c = levels->coefficient + l * levels->params;
        for (size_t p = 0; p < levels->params; p++) {
            b[p] += (double)c[p] * sum[l];
            for (size_t q = 0; q < levels->params; q++)
                a[p][q] += (double)c[p] * (double)c[q] * weight[l];
        }
    }
    solve(a, b, levels->params, better);
    return error;
}

void bn_fit_grid(const bn_levels *levels, const float *w, const float *importance, size_t count,
                 const float *start, size_t starts, size_t rounds, float *theta)
{
    double least = INFINITY;
    for (size_t s = 0; s < starts; s++) {
        float now[BN_GRID_PARAMS], next[BN_GRID_PARAMS];
        memcpy(now, start + s * levels->params, levels->params * sizeof *now);
        for (size_t round = 0; round <= rounds; round++) {
            const double error = fit_round(levels, w, importance, count, now, next);
            if (error < least) {
                least = error;
                memcpy(theta, now, levels->params * sizeof *now);
            }
            memcpy(now, next, sizeof now);
        }
    }
}

void bn_feedback(const bn_sorted *sorted, size_t levels, const int32_t *group, const float *feedback,
                 size_t count, const float *base, float *state, uint8_t *index, float *error)
{
    for (size_t j = 0; j < count; j++) {
        const bn_sorted *here = &sorted[group[j]];
        const size_t at = nearest(here->value, levels, state[j]);
        const float off = here->value[at] - base[j];
        const float *to = feedback + j * count;
        index[j] = here->index[at];
        error[j] = off;
        if (off != 0)
            for (size_t i = j + 1; i < count; i++)
                state[i] -= off * to[i];
    }
}
