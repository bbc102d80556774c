/* The exact least-squares scale of one group of weights: reference.least_squares, with less sorting.
 *
 * Formula   For given t the best s is A / B with A = sum(t w), B = sum(t^2); it takes A^2 / B off the
 *           error.  As s falls from infinity, a weight joins level +-1 at s = 2|w| and, of four levels,
 *           level 2 at s = 2w / 3.  A sweep over these events in order meets the optimum.
 * Method    With three levels the optimum is a fixed point c = S(c / 2), where S(x) is the mean of the
 *           |w| > x.  S never falls as x grows, so from lower <= c <= upper follows
 *           S(lower / 2) <= c <= S(upper / 2): a few rounds leave few weights in doubt, which are then
 *           sorted and swept.  Bounds move outwards by one float, which is more than their rounding. */
#include "least_squares.h"

#include <math.h>
#include <string.h>

#include "half.h"

enum {
    LANES = 8,
    ROUNDS = 3, /* leave about 3 % of normally distributed weights in doubt */
    FEW = 24 /* keys that are sorted faster by insertion */
};

/* A key is the pattern of |w| with the sign below it, so keys sort by |w|. */
static uint32_t make_key(float w)
{
    const uint32_t bits = bn_float_bits(w);
    return bits << 1 | bits >> 31;
}

static double key_magnitude(uint32_t key)
{
    return (double)bn_float_from_bits(key >> 1);
}

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

/* Goes on from `s` with the events of sorted keys, for scales of one sign: a weight is positive when
 * the last bit of its key is `sign`.  Returns the sums of greatest gain. */
static sums sweep(sums s, const uint32_t *keys, size_t count, int levels, uint32_t sign)
{
    sums best = s;
    size_t one = count, two = levels == 4 ? count : 0; /* weights not yet at level +-1, at level 2 */
    for (;;) {
        while (two > 0 && ((keys[two - 1] & 1) != sign || keys[two - 1] >> 1 == 0))
            two--;
        if (one == 0 && two == 0)
            return best;
        const double to_one = one > 0 ? key_magnitude(keys[one - 1]) : -1;
        const double to_two = two > 0 ? key_magnitude(keys[two - 1]) : -1;
        if (3 * to_one >= to_two) {
            s.a += to_one;
            s.b += 1;
            one--;
        } else {
            s.a += to_two;
            s.b += 3;
            two--;
        }
        if (gain(s) > gain(best))
            best = s;
    }
}

static float four_levels(const float *w, size_t count, uint32_t *keys)
{
    const sums none = {0, 0};
    for (size_t i = 0; i < count; i++)
        keys[i] = make_key(w[i]);
    sort_keys(keys, keys + count, count);
    const sums plus = sweep(none, keys, count, 4, 0);
    const sums minus = sweep(none, keys, count, 4, 1);
    return (float)(gain(minus) > gain(plus) ? -minus.a / minus.b : plus.a / plus.b);
}

/* The pattern of |w|: magnitudes compare as these integers do. */
static int32_t pattern(float w)
{
    return (int32_t)(bn_float_bits(w) & 0x7fffffffu);
}

/* Sum and number of the |w| of a pattern above a threshold. */
static sums sum_above(const float *w, size_t count, int32_t threshold)
{
    double a[LANES] = {0};
    int32_t b[LANES] = {0};
    const size_t whole = count - count % LANES;
    for (size_t i = 0; i < whole; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            const int32_t mask = -(pattern(w[i + j]) > threshold);
            a[j] += (double)bn_float_from_bits((uint32_t)(pattern(w[i + j]) & mask));
            b[j] -= mask;
        }
    for (size_t i = whole; i < count; i++)
        if (pattern(w[i]) > threshold) {
            a[0] += (double)fabsf(w[i]);
            b[0]++;
        }
    sums s = {0, 0};
    for (size_t j = 0; j < LANES; j++) {
        s.a += a[j];
        s.b += (double)b[j];
    }
    return s;
}

static float three_levels(const float *w, size_t count, uint32_t *keys)
{
    int32_t most = 0;
    for (size_t i = 0; i < count; i++)
        most = pattern(w[i]) > most ? pattern(w[i]) : most;
    if (most == 0)
        return 0;
    /* Weights above `high` are in level +-1, those not above `low` in level 0. */
    int32_t low = -1, high = pattern(0.5f * bn_float_from_bits((uint32_t)most)) + 1;
    sums above_low = sum_above(w, count, low), above_high = sum_above(w, count, high);
    for (int round = 0; round < ROUNDS && above_low.b != above_high.b; round++) {
        low = pattern((float)(above_low.a / above_low.b / 2)) - 1;
        high = pattern((float)(above_high.a / above_high.b / 2)) + 1;
        above_low = sum_above(w, count, low);
        above_high = sum_above(w, count, high);
    }
    size_t doubtful = 0;
    for (size_t i = 0; i < count; i++) {
        keys[doubtful] = make_key(w[i]);
        doubtful += (size_t)((pattern(w[i]) > low) & (pattern(w[i]) <= high));
    }
    sort_keys(keys, keys + count, doubtful);
    const sums best = sweep(above_high, keys, doubtful, 3, 0);
    return (float)(best.a / best.b);
}

float bn_best_scale(const float *w, size_t count, int levels, uint32_t *keys)
{
    return levels == 4 ? four_levels(w, count, keys) : three_levels(w, count, keys);
}
