/* Decoding rows that were just packed, to see how they differ from the weights they were made of. */
#ifndef BN_CHECK_H
#define BN_CHECK_H

#include "quantize.h"

typedef struct {
    const bn_packed *packed;
    bn_groups groups;
    bn_decode_fn *decode;
    bn_compare_fn *compare;
    bn_weight_type type;
    float *decoded; /* (k) */
    bn_difference difference;
} bn_check;

/* Returns 0, or -1 when memory is short.  `type` is that of the weights. */
int bn_check_open(bn_check *check, const bn_packed *packed, bn_weight_type type);

/* Adds one row, whose weights are w, to the difference. */
void bn_check_row(bn_check *check, const float *w, size_t row);

void bn_check_close(bn_check *check);

#endif
