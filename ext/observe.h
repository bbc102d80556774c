/* Statistics of the rows of activations that a layer reads: what activations.py adds up over batches. */
#ifndef BN_OBSERVE_H
#define BN_OBSERVE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    double mean, second, third, fourth; /* of all values; sums of powers of the deviations from the mean */
} bn_observed;

/* Adds finite rows to the sums by column and to the histogram, and returns the moments of these rows alone.
 * Bin b counts the values x with floor(x * bins_per_unit) + bins / 2 = b; all of them must be inside. */
bn_observed bn_observe(const float *x /* (rows, k) */, size_t rows, size_t k, double *sum /* (k) */,
                       double *abs_sum /* (k) */, double bins_per_unit, int64_t *histogram /* (bins) */,
                       size_t bins);

#endif
