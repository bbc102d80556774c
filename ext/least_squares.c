/* The exact least-squares scale of one group of weights: reference.least_squares, with less sorting.
 *
 * Formula   For given t the best s is A / B with A = sum(t w), B = sum(t^2); it takes A^2 / B off the
 *           error.  As s falls from infinity, a weight joins level +-1 at s = 2|w|, which adds |w| to A
 *           and 1 to B; of four levels, it joins level 2 at s = 2w / 3, which adds w and 3.  A sweep
 *           over these events in order meets the optimum.
 * Method    What an event at s adds to A is s / 2 times what it adds to B.  So A / B is a mean of the
 *           s / 2 of events, and the optimum is a fixed point c = S(c), where S(x) is that mean over the
 *           events at s > x.  S never falls as x grows, so from lower <= c <= upper follows
 *           S(lower) <= c <= S(upper): a few rounds leave few events in doubt, which are then sorted
 *           and swept.  Bounds move outwards by one float, which is more than their rounding.
 * Numbers   Floats that are not negative compare as their patterns do, and all others have negative
 *           patterns: so all comparisons are of int32. */
#include "least_squares.h"

#include <string.h>

#include "half.h"

enum {
    LANES = 8,
    ROUNDS = 3, /* leave about 3 % of normally distributed weights in doubt */
    FEW = 32 /* keys that are sorted faster by insertion */
};

static void sort_few(uint32_t *keys, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        const uint32_t key = keys[i];
        size_t j = i;
        for (; j > 0 && keys[j - 1] > key; j--)
            keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* Sorts lowest first: four stable passes by byte, those with a single value skipped. */
static void sort_keys(uint32_t *keys, uint32_t *spare, size_t count)
{
    if (count <= FEW) {
        sort_few(keys, count);
        return;
    }
    size_t start[4][256] = {{0}};
    for (size_t i = 0; i < count; i++)
        for (unsigned pass = 0; pass < 4; pass++)
            start[pass][keys[i] >> 8 * pass & 255]++;
    uint32_t *from = keys, *to = spare;
    for (unsigned pass = 0; pass < 4; pass++) {
        size_t *next = start[pass];
        if (next[from[0] >> 8 * pass & 255] == count)
            continue;
        for (size_t value = 0, sum = 0; value < 256; value++) {
            const size_t here = next[value];
            next[value] = sum;
            sum += here;
        }
        for (size_t i = 0; i < count; i++)
            to[next[from[i] >> 8 * pass & 255]++] = from[i];
        uint32_t *swap = from;
        from = to;
        to = swap;
    }
    if (from != keys)
        memcpy(keys, from, count * sizeof *keys);
}

typedef struct {
    double a, b; /* sum(t w), sum(t^2) */
} sums;

static double gain(sums s)
{
    return s.b > 0 ? s.a * s.a / s.b : -1;
}

/* Weights as integers: their patterns, those of their magnitudes or those of their negatives. */
typedef struct {
    uint32_t keep, flip; /* bits */
} view;

static inline int32_t pattern(float w, view v)
{
    return (int32_t)((bn_float_bits(w) & v.keep) ^ v.flip);
}

static inline double magnitude(int32_t pattern)
{
    return (double)bn_float_from_bits((uint32_t)pattern);
}

/* The patterns that events have which lie at a scale: of weights that join level +-1, and level 2. */
typedef struct {
    int32_t one, two;
} bound;

static bound bound_at(double scale, int32_t outwards)
{
    const view same = {UINT32_MAX, 0};
    const int32_t two = pattern((float)(1.5 * scale), same) + outwards;
    return (bound){pattern((float)(0.5 * scale), same) + outwards, two < 0 ? 0 : two};
}

/* Weights, and how they count for scales of one sign: all may join level +-1, those of the sign level 2. */
typedef struct {
    const float *w;
    size_t count;
    view one, two;
    int levels;
} group;

/* Sum and number of the values of a view above a threshold. */
static sums sum_above(const group *g, view v, int32_t threshold)
{
    double a[LANES] = {0};
    int32_t b[LANES] = {0};
    const size_t whole = g->count - g->count % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            const int32_t value = pattern(g->w[i + j], v);
            const int32_t mask = -(value > threshold);
            a[j] += magnitude(value & mask);
            b[j] -= mask;
        }
    for (size_t i = whole; i < g->count; i++)
        if (pattern(g->w[i], v) > threshold) {
            a[0] += magnitude(pattern(g->w[i], v));
            b[0]++;
        }
    sums s = {0, 0};
    for (size_t j = 0; j < LANES; j++) {
        s.a += a[j];
        s.b += (double)b[j];
    }
    return s;
}

/* The sums of all events above a bound. */
static sums joined(const group *g, bound above)
{
    sums s = sum_above(g, g->one, above.one);
    if (g->levels == 4) {
        const sums two = sum_above(g, g->two, above.two);
        s.a += two.a;
        s.b += 3 * two.b;
    }
    return s;
}

/* Writes the values of a view above `low` up to `high`, sorted; keys has room for 2 * count. */
static size_t sorted_between(const group *g, view v, int32_t low, int32_t high, uint32_t *keys)
{
    size_t found = 0;
    for (size_t i = 0; i < g->count; i++) {
        const int32_t value = pattern(g->w[i], v);
        keys[found] = (uint32_t)value;
        found += (size_t)((value > low) & (value <= high));
    }
    sort_keys(keys, keys + g->count, found);
    return found;
}

/* Goes on from `s` with sorted events.  Returns the sums of greatest gain. */
static sums sweep(sums s, const uint32_t *one, size_t ones, const uint32_t *two, size_t twos)
{
    sums best = s;
    while (ones > 0 || twos > 0) {
        const double to_one = ones > 0 ? magnitude((int32_t)one[ones - 1]) : -1;
        const double to_two = twos > 0 ? magnitude((int32_t)two[twos - 1]) : -1;
        if (3 * to_one >= to_two) {
            s.a += to_one;
            s.b += 1;
            ones--;
        } else {
            s.a += to_two;
            s.b += 3;
            twos--;
        }
        if (gain(s) > gain(best))
            best = s;
    }
    return best;
}

/* The sums of the best scale of one sign for weights of which the largest magnitude is `most`. */
static sums best_sums(const group *g, double most, uint32_t *keys)
{
    bound low = {-1, 0}, high = bound_at(most, 1);
    sums above_low = joined(g, low), above_high = joined(g, high);
    for (int round = 0; round < ROUNDS && above_high.b > 0 && above_low.b != above_high.b; round++) {
        low = bound_at(above_low.a / above_low.b, -1);
        high = bound_at(above_high.a / above_high.b, 1);
        above_low = joined(g, low);
        above_high = joined(g, high);
    }
    uint32_t *two = keys + 2 * g->count;
    const size_t ones = sorted_between(g, g->one, low.one, high.one, keys);
    const size_t twos = g->levels == 4 ? sorted_between(g, g->two, low.two, high.two, two) : 0;
    return sweep(above_high, keys, ones, two, twos);
}

float bn_best_scale(const float *w, size_t count, int levels, uint32_t *keys)
{
    const view size = {0x7fffffffu, 0};
    group g = {w, count, size, {UINT32_MAX, 0}, levels};
    int32_t most = 0;
    for (size_t i = 0; i < count; i++)
        most = pattern(w[i], size) > most ? pattern(w[i], size) : most;
    if (most == 0)
        return 0;
    const sums plus = best_sums(&g, magnitude(most), keys);
    if (levels == 3)
        return (float)(plus.a / plus.b);
    g.two.flip = 0x80000000u;
    const sums minus = best_sums(&g, magnitude(most), keys);
    return (float)(gain(minus) > gain(plus) ? -minus.a / minus.b : plus.a / plus.b);
}
