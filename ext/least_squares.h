/* The exact least-squares scale of one group of weights. */
#ifndef BN_LEAST_SQUARES_H
#define BN_LEAST_SQUARES_H

#include <stddef.h>
#include <stdint.h>

/* Returns the scale s that minimizes the sum of (w - s t)^2 over all t in {-1, 0, 1} (levels 3) or
 * {-1, 0, 1, 2} (levels 4, s of either sign).  keys has room for 4 * count. */
float bn_best_scale(const float *w, size_t count, int levels, uint32_t *keys);

#endif
