/* optimum, scalar: optimum.h with its two loops in plain C. */
#include "optimum.h"

/* Adds up to a value to each lane; `lanes` is a constant but at the end of a group. */
BN_INLINE void add(const float *w, size_t lanes, bn_view v, int32_t bound, double *a, int32_t *b)
{
    for (size_t i = 0; i < lanes; i++) {
        const int32_t value = bn_pattern(w[i], v);
        const int32_t mask = -(value > bound);
        a[i] += bn_magnitude(value & mask);
        b[i] -= mask;
    }
}

static void sum_above(const float *w, size_t count, bn_view v, int32_t low, int32_t high, bn_sums above[2])
{
    const int32_t bound[2] = {low, high};
    const size_t whole = count - count % BN_SUM_LANES;

    for (int i = 0; i < 2; i++) {
        double a[BN_SUM_LANES] = {0};
        int32_t b[BN_SUM_LANES] = {0}, all = 0;
        for (size_t at = 0; at < whole; at += BN_SUM_LANES) {
            add(w + at, BN_SUM_LANES, v, bound[i], a, b);
        }
        add(w + whole, count - whole, v, bound[i], a, b);
        for (int lane = 0; lane < BN_SUM_LANES; lane++) {
            all += b[lane];
        }
        above[i] = (bn_sums){bn_sum_of_lanes(a), (double)all};
    }
}

static size_t between(const float *w, size_t count, bn_view v, int32_t low, int32_t high, uint32_t *keys)
{
    size_t found = 0;

    for (size_t i = 0; i < count; i++) {
        const int32_t value = bn_pattern(w[i], v);
        keys[found] = (uint32_t)value;
        found += (size_t)((value > low) & (value <= high));
    }
    return found;
}

void bn_optimum_f32_scalar(const bn_optimum_args *a)
{
    bn_optimum(a, (bn_search){sum_above, between});
}
