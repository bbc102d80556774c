/* Two passes over a batch: sums by column, which give the mean, then powers about it and the histogram. */
#include "observe.h"

#include <math.h>

enum { LANES = 4 };

static void add_columns(const float *x, size_t k, double *sum, double *abs_sum)
{
    for (size_t i = 0; i < k; i++) {
        sum[i] += (double)x[i];
        abs_sum[i] += (double)fabsf(x[i]);
    }
}

static double mean_of(const float *x, size_t count)
{
    double lane[LANES] = {0};
    for (size_t i = 0; i < count; i++)
        lane[i % LANES] += (double)x[i];
    return (lane[0] + lane[1] + lane[2] + lane[3]) / (double)count;
}

bn_observed bn_observe(const float *x, size_t rows, size_t k, double *sum, double *abs_sum,
                       double bins_per_unit, int64_t *histogram, size_t bins)
{
    const size_t count = rows * k;
    const double middle = (double)(bins / 2);
    double power[3][LANES] = {{0}};
    bn_observed o = {mean_of(x, count), 0, 0, 0};
    for (size_t row = 0; row < rows; row++)
        add_columns(x + row * k, k, sum, abs_sum);
    for (size_t i = 0; i < count; i++) {
        const double apart = (double)x[i] - o.mean, square = apart * apart;
        power[0][i % LANES] += square;
        power[1][i % LANES] += square * apart;
        power[2][i % LANES] += square * square;
        /* not negative, so that cutting it off is floor */
        histogram[(size_t)((double)x[i] * bins_per_unit + middle)]++;
    }
    for (size_t lane = 0; lane < LANES; lane++) {
        o.second += power[0][lane];
        o.third += power[1][lane];
        o.fourth += power[2][lane];
    }
    return o;
}
