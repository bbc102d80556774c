/* Attention in float32: softmax(scale * q k^T + mask) v for each head of each batch, without ever holding
 * all scores.  Where a tensor lies is told by strides, in floats. */
#ifndef BN_ATTENTION_H
#define BN_ATTENTION_H

#include "kernel.h"
#include "parallel.h"

/* From one batch, row (a token of q and y, or of k and v) and head to the next; an element's stride is 1. */
typedef struct {
    size_t batch, row, head;
} bn_head_strides;

typedef struct {
    const float *q; /* (batches, rows, heads, width) */
    const float *k; /* (batches, tokens, heads, width) */
    const float *v; /* (batches, tokens, heads, value_width) */
    const float *mask;
    float *y; /* (batches, rows, heads, value_width) */
    bn_head_strides q_strides, k_strides, v_strides, y_strides;
    bn_head_strides mask_strides; /* 0 where the mask is the same for all */
    size_t mask_token_stride;     /* 1 or 0 */
    size_t batches, rows, heads, tokens, width, value_width;
    float scale;
    int nan_to_zero; /* a row whose weights would be NaN has zeros instead */
} bn_attention_call;

/* Computes y with the kernels of the set `isas`, on any number of threads with the same bits.  Without
 * tokens y is zeros.  Returns NULL, or the reason why there is no result. */
const char *bn_attention_run(const bn_attention_call *call, uint32_t isas, bn_threads threads);

#endif
