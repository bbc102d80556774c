/* What the optimum kernels share: the search, which each gets the two loops over weights for.
 *
 * Formula   For given t the best s is A / B with A = sum(t w), B = sum(t^2); it takes A^2 / B off the
 *           error.  As s falls from infinity, a weight joins level +-1 at s = 2|w|, which adds |w| to A
 *           and 1 to B; of four levels, it joins level 2 at s = 2w / 3, which adds w and 3.  A sweep
 *           over these events in order meets the optimum.
 * Method    What an event at s adds to A is s / 2 times what it adds to B.  So A / B is a mean of the
 *           s / 2 of events, and the optimum is a fixed point c = S(c), where S(x) is that mean over the
 *           events at s > x.  S never falls as x grows, so from lower <= c <= upper follows
 *           S(lower) <= c <= S(upper): a few rounds, each one pass for both bounds, leave few events in
 *           doubt, which are then sorted and swept.  Bounds move outwards by one float, which is more
 *           than their rounding.
 * Numbers   Floats that are not negative compare as their patterns do, and all others have negative
 *           patterns: so all comparisons are of int32.  Sums have one order, so that every kernel goes
 *           the same way and ends at the same bits. */
#ifndef BN_OPTIMUM_H
#define BN_OPTIMUM_H

#include "half.h"
#include "kernel.h"

enum {
    BN_SUM_LANES = 16,  /* value i of a group is added in lane i % 16 */
    BN_FEW_EVENTS = 12, /* in doubt: to sort them costs less than another round */
    BN_INSERTED = 32    /* keys that are sorted faster by insertion */
};

/* Weights as integers: their patterns, those of their magnitudes or those of their negatives. */
typedef struct {
    uint32_t keep, flip; /* bits */
} bn_view;

typedef struct {
    double a, b; /* sum(t w), sum(t^2) */
} bn_sums;

/* Sum and number of the values of a view above low, then above high; low <= high. */
typedef void bn_sum_above_fn(const float *w, size_t count, bn_view v, int32_t low, int32_t high,
                             bn_sums above[2]);

/* Writes the values of a view above low up to high; keys has room for count + 16.  Returns how many. */
typedef size_t bn_between_fn(const float *w, size_t count, bn_view v, int32_t low, int32_t high,
                             uint32_t *keys);

typedef struct {
    bn_sum_above_fn *sum_above;
    bn_between_fn *between;
} bn_search;

static inline double bn_sum_of_lanes(const double lane[BN_SUM_LANES])
{
    double half[BN_LANES];
    for (int i = 0; i < BN_LANES; i++)
        half[i] = lane[i] + lane[BN_LANES + i];
    return bn_sum_lanes(half);
}

static inline int32_t bn_pattern(float w, bn_view v)
{
    return (int32_t)((bn_float_bits(w) & v.keep) ^ v.flip);
}

static inline double bn_magnitude(int32_t pattern)
{
    return (double)bn_float_from_bits((uint32_t)pattern);
}

static inline void bn_sort_few(uint32_t *keys, size_t count)
{
    for (size_t i = 1; i < count; i++) {
        const uint32_t key = keys[i];
        size_t j = i;
        for (; j > 0 && keys[j - 1] > key; j--)
            keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* Sorts lowest first: four stable passes by byte, which end where they began. */
static inline void bn_sort_keys(uint32_t *keys, uint32_t *spare, size_t count)
{
    if (count <= BN_INSERTED) {
        bn_sort_few(keys, count);
        return;
    }
    size_t start[4][256] = {{0}};
    for (size_t i = 0; i < count; i++)
        for (unsigned pass = 0; pass < 4; pass++)
            start[pass][keys[i] >> 8 * pass & 255]++;
    for (unsigned pass = 0; pass < 4; pass++) {
        size_t *next = start[pass];
        for (size_t value = 0, sum = 0; value < 256; value++) {
            const size_t here = next[value];
            next[value] = sum;
            sum += here;
        }
        for (size_t i = 0; i < count; i++)
            spare[next[keys[i] >> 8 * pass & 255]++] = keys[i];
        uint32_t *swap = keys;
        keys = spare;
        spare = swap;
    }
}

static inline double bn_gain(bn_sums s)
{
    return s.b > 0 ? s.a * s.a / s.b : -1;
}

/* The patterns that events have which lie at a scale: of weights that join level +-1, and level 2. */
typedef struct {
    int32_t one, two;
} bn_bound;

static inline bn_bound bn_bound_at(double scale, int32_t outwards)
{
    const int32_t one = (int32_t)bn_float_bits((float)(0.5 * scale)) + outwards;
    const int32_t two = (int32_t)bn_float_bits((float)(1.5 * scale)) + outwards;
    return (bn_bound){one, two < 0 ? 0 : two};
}

/* Weights, and how they count for scales of one sign: all may join level +-1, those of the sign level 2. */
typedef struct {
    const float *w;
    size_t count;
    bn_view one, two;
    int levels;
} bn_weights;

/* The sums of all events above each of two bounds. */
BN_INLINE void bn_joined(const bn_weights *g, bn_bound low, bn_bound high, bn_search by, bn_sums above[2])
{
    by.sum_above(g->w, g->count, g->one, low.one, high.one, above);
    if (g->levels == 4) {
        bn_sums two[2];
        by.sum_above(g->w, g->count, g->two, low.two, high.two, two);
        for (int i = 0; i < 2; i++) {
            above[i].a += two[i].a;
            above[i].b += 3 * two[i].b;
        }
    }
}

/* Goes on from `s` with sorted events.  Returns the sums of greatest gain. */
static inline bn_sums bn_sweep(bn_sums s, const uint32_t *one, size_t ones, const uint32_t *two, size_t twos)
{
    bn_sums best = s;
    double most = bn_gain(s);
    while (ones > 0 || twos > 0) {
        const double to_one = ones > 0 ? bn_magnitude((int32_t)one[ones - 1]) : -1;
        const double to_two = twos > 0 ? bn_magnitude((int32_t)two[twos - 1]) : -1;
        if (3 * to_one >= to_two) {
            s.a += to_one;
            s.b += 1;
            ones--;
        } else {
            s.a += to_two;
            s.b += 3;
            twos--;
        }
        if (bn_gain(s) > most) {
            most = bn_gain(s);
            best = s;
        }
    }
    return best;
}

/* The sums of the best scale of one sign for weights of which the largest magnitude is `most`.  Rounds go on
 * while they decide something, which is at least one event each. */
BN_INLINE bn_sums bn_best_sums(const bn_weights *g, double most, uint32_t *keys, bn_search by)
{
    bn_bound low = {-1, 0}, high = bn_bound_at(most, 1);
    bn_sums above[2];
    bn_joined(g, low, high, by, above);
    for (double before = above[0].b + 1, doubt = above[0].b - above[1].b;
         above[1].b > 0 && doubt > BN_FEW_EVENTS && doubt < before; doubt = above[0].b - above[1].b) {
        before = doubt;
        low = bn_bound_at(above[0].a / above[0].b, -1);
        high = bn_bound_at(above[1].a / above[1].b, 1);
        bn_joined(g, low, high, by, above);
    }
    const size_t room = g->count + BN_SUM_LANES;
    uint32_t *two = keys + room;
    size_t twos = 0;
    const size_t ones = by.between(g->w, g->count, g->one, low.one, high.one, keys);
    if (g->levels == 4)
        twos = by.between(g->w, g->count, g->two, low.two, high.two, two);
    bn_sort_keys(keys, keys + 2 * room, ones);
    bn_sort_keys(two, keys + 2 * room, twos);
    return bn_sweep(above[1], keys, ones, two, twos);
}

BN_INLINE float bn_best_scale(const float *w, size_t count, int levels, uint32_t *keys, bn_search by)
{
    const bn_view size = {0x7fffffffu, 0};
    bn_weights g = {w, count, size, {UINT32_MAX, 0}, levels};
    int32_t most = 0;
    for (size_t i = 0; i < count; i++)
        most = bn_pattern(w[i], size) > most ? bn_pattern(w[i], size) : most;
    if (most == 0)
        return 0;
    const bn_sums plus = bn_best_sums(&g, bn_magnitude(most), keys, by);
    if (levels == 3)
        return (float)(plus.a / plus.b);
    g.two.flip = 0x80000000u;
    const bn_sums minus = bn_best_sums(&g, bn_magnitude(most), keys, by);
    return (float)(bn_gain(minus) > bn_gain(plus) ? -minus.a / minus.b : plus.a / plus.b);
}

BN_INLINE void bn_optimum(const bn_optimum_args *a, bn_search by)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t length = bn_group_length(&a->groups, g);
        a->scale[g] = bn_best_scale(a->w + g * a->groups.length, length, a->levels, a->keys, by);
    }
}

#endif
