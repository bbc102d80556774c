/* From weights to codes and scales, and back.
 *
 * Each function reads rows first .. last - 1 of a matrix and writes the results of these rows only, so
 * that threads can share the work and the result does not depend on how.  They return 0, or -1 when
 * memory is short.  reference.py defines what each computes,
 * kernel.h in which order sums are taken. */
#ifndef BN_QUANTIZE_H
#define BN_QUANTIZE_H

#include "weight.h"

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

/* The scale of each group of a row that minimizes the sum of (r - scale t)^2 over all t in
 * {-1, 0, 1} (levels 3) or {-1, 0, 1, 2} (levels 4, scale of either sign). */
int bn_least_squares(const bn_weight *w, const bn_grid *grid, int levels, size_t first, size_t last,
                     float *scale /* (n, groups) */);

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

/* The same for q = clamp(rint(w factor)) to `bits` bits, written as planes of the base-4 digits of
 * q + 2^(bits - 1), highest first. */
int bn_assign_integer(const bn_weight *w, const float *factor /* (rows, groups) */, size_t rows,
                      int bits, size_t first, size_t last,
                      uint8_t *weight /* (bits / 2, n, ceil(k / 4)) */, const bn_packed *packed,
                      bn_difference *difference);

#endif
