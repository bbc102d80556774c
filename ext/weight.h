/* Weights as they come in a model: a matrix of any strides, in one of three float types.
 *
 * Everything that quantizes reads them through bn_rows, a row at a time as float32, so there is never
 * a float32 copy of the matrix. */
#ifndef BN_WEIGHT_H
#define BN_WEIGHT_H

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

typedef enum { BN_WEIGHT_FLOAT32, BN_WEIGHT_FLOAT16, BN_WEIGHT_BFLOAT16 } bn_weight_type;

typedef struct {
    const char *data;      /* element (0, 0), not necessarily aligned */
    ptrdiff_t row_stride;  /* bytes from one output to the next; any sign, or 0 */
    ptrdiff_t col_stride;  /* bytes from one input to the next */
    size_t n, k;           /* outputs, inputs */
    bn_weight_type type;
    uint32_t isas;         /* instruction sets that may be used, scalar among them */
} bn_weight;

/* A cursor over rows first .. last - 1. */
typedef struct {
    const bn_weight *w;
    bn_widen_fn *widen;
    bn_transpose_fn *transpose;
    float *buffer;         /* (rows, stride) rows loaded together; NULL: rows are read where they are */
    size_t stride;
    int whole;             /* rows lie whole in memory, and are loaded one at a time */
    size_t loaded, next;   /* otherwise the buffer holds rows from `loaded` to `next` - 1 */
    size_t last;           /* rows of the cursor end here */
} bn_rows;

/* Returns 0, or -1 when memory is short. */
int bn_rows_open(bn_rows *rows, const bn_weight *w, size_t first, size_t last);

/* The k values of a row, valid until the next call.  Ask for the rows of the cursor in order, each
 * once. */
const float *bn_rows_next(bn_rows *rows, size_t row);

void bn_rows_close(bn_rows *rows);

/* Rounds float32 values to the type of a matrix. */
void bn_weight_round(bn_weight_type type, float *values, size_t count);

/* Counts NaN and infinity in rows first .. last - 1; where[0..1] is the (row, column) of the first. */
int bn_weight_nonfinite(const bn_weight *w, size_t first, size_t last, size_t *count,
                        size_t where[2]);

/* Finds the magnitude s of each 32 inputs of a row that are all -s, 0 or s; s is 0 for zeros alone.
 * Writes rows first .. last - 1 of magnitude (n, ceil(k / 32)).  Stops and sets *ternary to 0 at the
 * first 32 inputs that have no such s. */
enum { BN_MAGNITUDE_BLOCK = 32 };
int bn_weight_magnitudes(const bn_weight *w, size_t first, size_t last, float *magnitude,
                         int *ternary);

#endif
