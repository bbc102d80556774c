/* One run of a packed layer, and its two halves: rows.c prepares rows of activations, block.c multiplies them
 * with super-panels.  run.c shares both out. */
#ifndef BN_CALL_H
#define BN_CALL_H

#include "layer.h"

enum { BN_ROW_BLOCK = 32 }; /* rows multiplied at once: their products fit the stack and the first-level cache */

/* The rows as the kernels want them. */
typedef struct {
    const bn_matmul *layer;
    const void *x;
    void *y;
    bn_float_type type;
    size_t m;

    int8_t *q;     /* (m * parts, padded), or NULL with float activations */
    int64_t *sum;  /* (m, groups) sums of q */
    float *inv_s;  /* (m) factors of the products; NaN for a row that is not finite */
    float *xf;     /* (m, padded) float activations, or NULL */
    float *xf_sum; /* (m, groups) sums of xf */
} bn_call;

typedef struct {
    size_t first, end;
} bn_range;

/* Quantizes rows of x, or copies them in float.  `wide` is room for one, of k, where x is float16. */
void bn_prepare(const bn_call *call, bn_range rows, float *wide);

/* Multiplies rows that are prepared with super-panels of the weights, and writes y. */
void bn_multiply(const bn_call *call, bn_range rows, bn_range supers);

#endif
