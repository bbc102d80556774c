/* Planes in integer ratio as one plane of wider codes.
 *
 * The planes of a 4-bit weight have the scales 4s and s, those of an 8-bit one 64s, 16s, 4s and s:
 *     sum of r_p s (code_p - zero_point_p) = s (code - zero_point)
 * with code = sum of r_p code_p and zero_point = sum of r_p zero_point_p.  One product with code then
 * does what each plane would need one for, and is rounded once.  It is part of the definition of
 * the op when planes are merged (docs/design.md), so a layer has the same result wherever it runs. */
#ifndef BN_MERGE_H
#define BN_MERGE_H

#include "layout.h"
#include "matmul.h"

typedef struct {
    uint8_t ratio[BN_MAX_PLANES]; /* r_p, of which planes are used */
    size_t planes;
    int bits; /* of a merged code, 4 or 8; 2: the planes stay apart */
} bn_merge;

/* How the planes of a valid layer are merged.  They are where
 *   - there are at least 2, and activations have 8 or 16 bits;
 *   - each scale is exactly r_p times that of the last plane, with integers r_p >= 1 that are the same for
 *     all outputs and groups, and whose sum is at most 85, so that a code is at most 3 * 85 = 255;
 *   - each zero point is a multiple of 1/2 and at most 128 in magnitude, so that their sum is exact;
 *   - no group is longer than BN_MAX_WIDE_GROUP. */
bn_merge bn_find_merge(const bn_matmul_desc *desc);

/* zero_point (zero_point_rows, groups) gets those of the merged plane, all 1 in a desc without them. */
void bn_merge_zero_points(const bn_matmul_desc *desc, const bn_merge *merge, float *zero_point);

/* Panels of merged planes: weight is (planes, n, row_bytes) canonical bytes, threads share the
 * work, and the rest is as in bn_panel_build, but that padding and outputs past n have code 0. */
const char *bn_merge_build(const bn_merge *merge, bn_format format, const uint8_t *weight, size_t n,
                           const bn_groups *groups, uint32_t isas, bn_threads threads,
                           uint8_t *panels, int32_t *code_sum);

#endif
