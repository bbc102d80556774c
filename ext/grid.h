/* Weights to levels of a grid, with or without error feedback; reference/weights.py defines what each computes.
 *
 * A grid has `count` levels; level l of a group of weights that share `params` parameters is
 *     v[l] = sum over p of coefficient[l][p] * theta[p].
 * Ternary is {-1, 0, 1} times one scale, two ternary planes are nine pairs times two scales, and so on. */
#ifndef BN_GRID_H
#define BN_GRID_H

#include <stddef.h>
#include <stdint.h>

enum { BN_GRID_LEVELS = 256, BN_GRID_PARAMS = 4 };

typedef struct {
    const float *coefficient; /* (count, params) */
    size_t count;             /* 2 to BN_GRID_LEVELS */
    size_t params;            /* 1 to BN_GRID_PARAMS */
} bn_levels;

/* Finds parameters of one group of weights: the best of some starting points after some rounds of
 *     each weight takes its nearest level; the parameters solve the weighted least squares for these.
 * importance[i] weighs the square of what weight i is off. */
void bn_fit_grid(const bn_levels *levels, const float *w, const float *importance, size_t count,
                 const float *start /* (starts, params) */, size_t starts, size_t rounds,
                 float *theta /* (params) */);

/* The levels of a group in rising order. */
typedef struct {
    float value[BN_GRID_LEVELS];
    uint8_t index[BN_GRID_LEVELS];
} bn_sorted;

void bn_sort_levels(const bn_levels *levels, const float *theta, bn_sorted *sorted);

/* One row through `count` columns in order: column j takes the level nearest to state[j], which leaves
 * error[j] = level - base[j] and takes error[j] * feedback[j][i] off state[i] for all i > j. */
void bn_feedback(const bn_sorted *sorted /* (groups) */, size_t levels, const int32_t *group /* (count) */,
                 const float *feedback /* (count, count) */, size_t count, const float *base,
                 float *state, uint8_t *index, float *error);

#endif
