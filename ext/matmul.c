/* Making a packed layer: its description is checked, its tables and panels are laid out for the
 * kernels, and the kernels are chosen, once. */
#include "matmul.h"

#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "dispatch.h"
#include "layer.h"
#include "merge.h"
#include "panel.h"

static const char no_memory[] = "out of memory for the packed weights";

static const char *check(const bn_matmul_desc *d)
{
    if (d->n == 0 || d->k == 0) {
        return "N and K must be at least 1";
    }
    if (d->planes < 1 || d->planes > BN_MAX_PLANES) {
        return "weight must have 1 to 4 planes";
    }
    if ((d->scale_rows != 1 && d->scale_rows != d->n) ||
        (d->zero_point && d->zero_point_rows != 1 && d->zero_point_rows != d->n)) {
        return "scale and zero_point must have 1 or N rows";
    }
    if (d->activation_bits != 8 && d->activation_bits != 16 && d->activation_bits != 32) {
        return "activation_bits must be 8, 16 or 32";
    }
    if (d->activation_scale != 0.0f &&
        !(d->activation_scale >= FLT_MIN && d->activation_scale <= 1.0f / FLT_MIN)) {
        return "activation_scale must be 0 or a positive number";
    }
    if (d->activation_bits != 32 && bn_make_groups(d->k, d->block_size).length > BN_MAX_GROUP) {
        return "more than 262144 inputs share a scale, their sums do not fit 32 bits; use blocks";
    }
    return NULL;
}

static size_t table_size(const bn_matmul *layer)
{
    return bn_table_offset(layer, layer->planes, 0);
}

/* (planes, rows, groups), or NULL for ones, to (planes, super-panels, groups, 64); outputs past n
 * get 0. */
static float *spread(const bn_matmul *layer, const float *from, size_t rows)
{
    const size_t groups = layer->groups.count;
    float *table = calloc(table_size(layer), sizeof *table);

    for (size_t plane = 0; table && plane < layer->planes; plane++) {
        for (size_t output = 0; output < layer->n; output++) {
            const size_t at = (plane * rows + (rows == 1 ? 0 : output)) * groups;
            float *to = table + bn_table_offset(layer, plane, output / BN_SUPER);
            for (size_t g = 0; g < groups; g++) {
                to[g * BN_SUPER + output % BN_SUPER] = from ? from[at + g] : 1.0f;
            }
        }
    }
    return table;
}

/* One zero point for all needs no table where it is an integer, and the sums of (code - zero) q fit 32
 * bits. */
static int has_one_zero_point(const bn_matmul *layer, const bn_matmul_desc *d)
{
    const size_t count = d->planes * d->zero_point_rows * layer->groups.count;
    const float zero = d->zero_point ? d->zero_point[0] : 1.0f;
    const int top = (1 << layer->code_bits) - 1;

    if (!(zero >= 0.0f && zero <= (float)top && zero == (float)(int)zero)) {
        return 0;
    }
    const int most = 2 * (int)zero > top ? (int)zero : top - (int)zero;
    const int64_t step = (int64_t)most << (layer->parts == 2 ? 15 : 7);
    if (layer->groups.length > (size_t)(INT32_MAX / step)) {
        return 0;
    }
    for (size_t i = 0; d->zero_point && i < count; i++) {
        if (d->zero_point[i] != zero) {
            return 0;
        }
    }
    return 1;
}

static const char *fill_tables(bn_matmul *layer, const bn_matmul_desc *d)
{
    layer->scale = spread(layer, d->scale, d->scale_rows);
    layer->bias = calloc(bn_super_panels(d->n) * BN_SUPER, sizeof *layer->bias);
    if (!layer->scale || !layer->bias) {
        return no_memory;
    }
    if (d->bias) {
        memcpy(layer->bias, d->bias, d->n * sizeof *d->bias);
    }
    if (has_one_zero_point(layer, d)) {
        layer->zero = d->zero_point ? (int32_t)d->zero_point[0] : 1;
        return NULL;
    }
    layer->zero_point = spread(layer, d->zero_point, d->zero_point_rows);
    return layer->zero_point ? NULL : no_memory;
}

/* The tables of merged planes are those of a layer of one plane. */
static const char *fill_merged_tables(bn_matmul *layer, const bn_matmul_desc *d,
                                      const bn_merge *merge)
{
    bn_matmul_desc one = *d;
    const char *reason;

    one.planes = 1;
    one.scale = d->scale + (d->planes - 1) * d->scale_rows * layer->groups.count;
    one.zero_point_rows = d->zero_point ? d->zero_point_rows : 1;
    float *zero_point = malloc(one.zero_point_rows * layer->groups.count * sizeof *zero_point);
    if (!zero_point) {
        return no_memory;
    }
    bn_merge_zero_points(d, merge, zero_point);
    one.zero_point = zero_point;
    reason = fill_tables(layer, &one);
    free(zero_point);
    return reason;
}

static const char *fill_panels(bn_matmul *layer, const bn_matmul_desc *d, const bn_merge *merge)
{
    const size_t plane_bytes = bn_panel_bytes(d->n, &layer->groups, layer->code_bits);
    const size_t weight_bytes = d->n * bn_formats[d->format].row_bytes(d->k);

    layer->panels = bn_panel_alloc(layer->planes * plane_bytes);
    if (layer->parts == 2) {
        layer->code_sum = malloc(table_size(layer) * sizeof *layer->code_sum);
    }
    if (!layer->panels || (layer->parts == 2 && !layer->code_sum)) {
        return no_memory;
    }
    if (layer->code_bits != 2) {
        return bn_merge_build(merge, d->format, d->weight, d->n, &layer->groups, layer->panels,
                              layer->code_sum);
    }
    for (size_t plane = 0; plane < d->planes; plane++) {
        const char *reason = bn_panel_build(
            d->format, d->weight + plane * weight_bytes, d->n, &layer->groups,
            layer->panels + plane * plane_bytes,
            layer->code_sum ? layer->code_sum + bn_table_offset(layer, plane, 0) : NULL);
        if (reason) {
            return reason;
        }
    }
    return NULL;
}

static const char *fill(bn_matmul *layer, const bn_matmul_desc *d, const bn_merge *merge)
{
    const char *reason = layer->code_bits == 2 ? fill_tables(layer, d)
                                               : fill_merged_tables(layer, d, merge);
    return reason ? reason : fill_panels(layer, d, merge);
}

/* AMX is at 2500 products per ns with many rows, where VNNI is at 500; where neither is here, tasks
 * only take longer. */
static size_t find_pace(const char *format, uint32_t isas)
{
    return bn_find("dot", format, isas)->isa == BN_ISA_amx ? 5 : 1;
}

static bn_any_fn *find(const char *op, const char *format, uint32_t isas)
{
    return bn_find(op, format, isas)->fn; /* every op has a scalar kernel, and isas has scalar */
}

const char *bn_matmul_create(const bn_matmul_desc *desc, uint32_t isas, bn_matmul **out)
{
    const char *reason = check(desc);
    const char *format;
    bn_merge merge;
    bn_matmul *layer = reason ? NULL : calloc(1, sizeof *layer);

    *out = NULL;
    if (!layer) {
        return reason ? reason : "out of memory";
    }
    layer->n = desc->n;
    layer->k = desc->k;
    merge = bn_find_merge(desc);
    format = merge.bits == 8 ? "w8" : merge.bits == 4 ? "w4" : "i2s";
    layer->planes = merge.bits == 2 ? desc->planes : 1;
    layer->code_bits = merge.bits;
    layer->parts = desc->activation_bits == 32 ? 0 : (size_t)desc->activation_bits / 8;
    layer->groups = bn_make_groups(desc->k, desc->block_size);
    layer->bits = desc->activation_bits;
    layer->step = desc->activation_scale;

    isas |= UINT32_C(1) << BN_ISA_scalar;
    layer->pace = find_pace(format, isas);
    layer->dot = (bn_dot_fn *)find("dot", format, isas);
    layer->tiles = (bn_tiles_fn *)find("tiles", "config", isas);
    layer->dotf = (bn_dotf_fn *)find("dotf", "i2s", isas);
    layer->actq = (bn_actq_fn *)find("actq", "f32", isas);
    layer->scale_acc = (bn_scale_fn *)find("scale", "i32", isas);
    layer->widen = (bn_widen_fn *)find("widen", "f16", isas);
    layer->narrow = (bn_narrow_fn *)find("narrow", "f16", isas);

    reason = fill(layer, desc, &merge);
    if (reason) {
        bn_matmul_destroy(layer);
        return reason;
    }
    *out = layer;
    return NULL;
}

void bn_matmul_destroy(bn_matmul *layer)
{
    if (!layer) {
        return;
    }
    bn_panel_free(layer->panels);
    free(layer->scale);
    free(layer->zero_point);
    free(layer->code_sum);
    free(layer->bias);
    free(layer);
}
