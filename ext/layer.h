/* What is inside a bn_matmul: made by matmul.c, used by run.c, rows.c and block.c. */
#ifndef BN_LAYER_H
#define BN_LAYER_H

#include "kernel.h"
#include "matmul.h"
#include "share.h"

/* What equal layers hold in common. */
enum { BN_PANELS, BN_SCALE, BN_ZERO_POINT, BN_CODE_SUM, BN_BIAS, BN_TABLES };

struct bn_matmul {
    size_t n, k, parts; /* parts: rows of int8 per row of activations; 0 for float ones */
    size_t planes;      /* in panels: 1 where those of the file are merged (merge.h) */
    bn_groups groups;
    int bits, code_bits; /* of activations, and of codes in panels */
    float step;
    size_t column;           /* bytes of 16 outputs of a plane in panels */
    const uint8_t *panels;   /* planes of 16 outputs after 16 (layout.h) */
    const float *scale;      /* (planes, super-panels, groups, 64) */
    const float *zero_point; /* the same shape, or NULL: all are zero */
    int32_t zero;
    const int32_t *code_sum; /* the same shape, or NULL where parts < 2 */
    const float *bias;       /* (super-panels, 64) */
    bn_shared *held[BN_TABLES]; /* what these point into */
    size_t pace; /* rows that dot multiplies in the time of one with AVX512-VNNI */
    bn_dot_fn *dot;
    bn_tiles_fn *tiles;
    bn_dotf_fn *dotf;
    bn_actq_fn *actq;
    bn_scale_fn *scale_acc;
    bn_widen_fn *widen;
    bn_narrow_fn *narrow;
};

/* Entries before those of super-panel `super` of a plane in scale, zero_point and code_sum. */
static inline size_t bn_table_offset(const bn_matmul *layer, size_t plane, size_t super)
{
    return (plane * bn_super_panels(layer->n) + super) * layer->groups.count * BN_SUPER;
}

#endif
