/* From weights to codes and scales, and back.
 *
 * Each function reads rows first .. last - 1 of a matrix and writes the results of these rows only, so
 * that threads can share the work and the result does not depend on how.  They return 0, or -1 when
 * memory is short.  reference/weights.py defines what each computes,
 * kernel.h in which order sums are taken. */
#ifndef BN_QUANTIZE_H
#define BN_QUANTIZE_H

#include "fit.h"

/* The planes chosen so far: step[p][row][group], with one row for all outputs or n rows. */
typedef struct {
    const bn_step *steps; /* (planes, rows, ceil(k / block_size)) */
    size_t planes, rows;
    size_t block_size;    /* a multiple of 4; 0 means all of k */
} bn_grid;

/* Sum of |r|, least and greatest r of each group of a row, where r is what the planes leave of w. */
int bn_moments(const bn_weight *w, const bn_grid *grid, size_t first, size_t last,
               double *moments /* (n, groups, 3) */);

/* a = sum of w f t and b = sum of t^2 of each group of a row, for the last plane of the grid and what
 * the planes before leave of w.  The best scale for these t is f a / b when f is 1 or -1. */
int bn_products(const bn_weight *w, const bn_grid *grid, size_t first, size_t last,
                double *products /* (n, groups, 2) */);

/* Adds r to bins by the upper 16 bits of its float pattern: how many, and the sum of the lower 16. */
enum { BN_BINS = 1 << 16 };
int bn_histogram(const bn_weight *w, const bn_grid *grid, size_t first, size_t last,
                 uint64_t *count /* (BN_BINS) */, uint64_t *low /* (BN_BINS) */);

/* The same by the lower 16 bits, for the bins that have a slot >= 0. */
int bn_histogram_low(const bn_weight *w, const bn_grid *grid, const int32_t *slot /* (BN_BINS) */,
                     size_t first, size_t last, uint64_t *count /* (slots, BN_BINS) */);

/* W = sum over planes of scale (code - zero_point). */
typedef struct {
    const uint8_t *weight;    /* (planes, n, ceil(k / 4)) */
    const float *scale;       /* (planes, rows, groups) */
    const float *zero_point;  /* the same shape */
    size_t n, k, planes, rows;
    size_t block_size;        /* as in bn_grid */
    uint32_t isas;            /* as in bn_weight */
} bn_packed;

void bn_dequantize(const bn_packed *packed, size_t first, size_t last,
                   float *out /* (last - first, k) */);

/* How decoded rows differ from w. */
typedef struct {
    double error, signal; /* sums of (w - decoded)^2 and w^2 */
    size_t zeros;         /* values decoded to 0 */
    int different;        /* whether some value differs from w even when rounded to the type of w */
} bn_difference;

/* Writes the codes of all planes as canonical bytes to `weight`, and decodes each row while it is near:
 * `packed` is what the planes will be read as, weight among it. */
int bn_assign(const bn_weight *w, const bn_grid *grid, size_t first, size_t last,
              uint8_t *weight /* (planes, n, ceil(k / 4)) */, const bn_packed *packed,
              bn_difference *difference);

/* Fits `planes` planes to each row by a rule, each to what the planes before leave, and writes their steps.
 * *held is 0 if a scale is no normal number of the rule's type; then not all is written. */
int bn_fit(const bn_weight *w, const bn_rule *rule, size_t planes, size_t block_size, size_t first,
           size_t last, bn_step *steps /* (planes, n, groups) */, int *held);

/* bn_fit and bn_assign in one: each row is read once.  `scale`, with a row for each output, is that of
 * `packed`, too. */
int bn_quantize(const bn_weight *w, const bn_rule *rule, size_t first, size_t last,
                float *scale /* (planes, n, groups) */, uint8_t *weight, const bn_packed *packed,
                bn_difference *difference, int *held);

/* The same for q = clamp(rint(w factor)) to `bits` bits, written as planes of the base-4 digits of
 * q + 2^(bits - 1), highest first. */
int bn_assign_integer(const bn_weight *w, const float *factor /* (rows, groups) */, size_t rows,
                      int bits, size_t first, size_t last,
                      uint8_t *weight /* (bits / 2, n, ceil(k / 4)) */, const bn_packed *packed,
                      bn_difference *difference);

#endif
