/* Making a packed layer: its description is checked, its tables and panels are laid out for the
 * kernels, and the kernels are chosen, once. */
#include "matmul.h"

#include <float.h>
#include <stdlib.h>

#include "cpu.h"
#include "dispatch.h"
#include "layer.h"
#include "merge.h"
#include "panel.h"
#include "t5.h"

static const char no_memory[] = "out of memory for the packed weights";

static bn_any_fn *find(const char *op, const char *format, uint32_t isas)
{
    return bn_find(op, format, isas)->fn; /* every op has a scalar kernel, and isas has scalar */
}

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
    if (d->is_panels && d->block_size < d->k && d->block_size % BN_STEP != 0) {
        return "block_size must be a multiple of 16 where the weight is panels";
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

/* New memory for a table of the layer, or NULL. */
static void *make(bn_matmul *layer, int table, size_t count, size_t size)
{
    layer->held[table] = count <= SIZE_MAX / 2 / size ? bn_shared_new(count * size) : NULL;
    return bn_shared_bytes(layer->held[table]);
}

/* (planes, rows, groups), or NULL for ones, to (planes, super-panels, groups, 64); outputs past n
 * get 0.  Returns 0 where there is no memory. */
static int spread(bn_matmul *layer, int table, const float *from, size_t rows)
{
    const size_t groups = layer->groups.count;
    float *to = make(layer, table, table_size(layer), sizeof *to);

    for (size_t plane = 0; to && plane < layer->planes; plane++) {
        for (size_t output = 0; output < bn_super_panels(layer->n) * BN_SUPER; output++) {
            const size_t at = (plane * rows + (rows == 1 ? 0 : output)) * groups;
            float *first = to + bn_table_offset(layer, plane, output / BN_SUPER) + output % BN_SUPER;
            for (size_t g = 0; g < groups; g++) {
                first[g * BN_SUPER] = output >= layer->n ? 0.0f : from ? from[at + g] : 1.0f;
            }
        }
    }
    return to != NULL;
}

static int copy_bias(bn_matmul *layer, const float *bias)
{
    const size_t count = bn_super_panels(layer->n) * BN_SUPER;
    float *to = make(layer, BN_BIAS, count, sizeof *to);

    for (size_t i = 0; to && i < count; i++) {
        to[i] = bias && i < layer->n ? bias[i] : 0.0f;
    }
    return to != NULL;
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
    if (!spread(layer, BN_SCALE, d->scale, d->scale_rows) || !copy_bias(layer, d->bias)) {
        return no_memory;
    }
    if (has_one_zero_point(layer, d)) {
        layer->zero = d->zero_point ? (int32_t)d->zero_point[0] : 1;
        return NULL;
    }
    return spread(layer, BN_ZERO_POINT, d->zero_point, d->zero_point_rows) ? NULL : no_memory;
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

/* Bytes of a plane of the weight. */
static size_t weight_bytes(const bn_matmul_desc *d, const bn_groups *groups)
{
    return d->is_panels ? bn_panel_bytes(bn_round_up(d->n, BN_SUPER), groups, 2)
                        : d->n * bn_formats[d->format].row_bytes(d->k);
}

static bn_panel_source plane_of(const bn_matmul *layer, const bn_matmul_desc *d, uint32_t isas,
                                size_t plane)
{
    return (bn_panel_source){
        .format = d->format,
        .is_panels = d->is_panels,
        .weight = d->weight + plane * weight_bytes(d, &layer->groups),
        .n = d->n,
        .groups = layer->groups,
        .isas = isas,
        .threads = d->threads,
    };
}

/* Panels of merged planes.  Where the weight is panels, they become rows first. */
static const char *merge_panels(const bn_matmul *layer, const bn_matmul_desc *d, const bn_merge *merge,
                                uint32_t isas, uint8_t *panels, int32_t *code_sum)
{
    const size_t rows_bytes = d->n * bn_row_bytes(d->k);
    uint8_t *rows = d->is_panels ? malloc(d->planes * rows_bytes) : NULL;
    const char *reason = d->is_panels && !rows ? no_memory : NULL;

    for (size_t plane = 0; rows && !reason && plane < d->planes; plane++) {
        const bn_panel_source source = plane_of(layer, d, isas, plane);
        reason = bn_panel_rows(&source, rows + plane * rows_bytes);
    }
    if (!reason) {
        reason = bn_merge_build(merge, d->format, rows ? rows : d->weight, d->n, &layer->groups,
                                isas, d->threads, panels, code_sum);
    }
    free(rows);
    return reason;
}

/* The panels of all planes: made, or where they are in the file. */
static const char *fill_panels(bn_matmul *layer, const bn_matmul_desc *d, const bn_merge *merge,
                               uint32_t isas)
{
    const size_t plane_bytes = bn_panel_bytes(d->n, &layer->groups, layer->code_bits);
    const bn_panel_source first = plane_of(layer, d, isas, 0);
    const int in_place = layer->code_bits == 2 && bn_panel_serves(&first);
    uint8_t *panels = in_place ? NULL : make(layer, BN_PANELS, layer->planes, plane_bytes);
    int32_t *code_sum = NULL;
    const char *reason = NULL;

    if (layer->parts == 2) {
        code_sum = make(layer, BN_CODE_SUM, table_size(layer), sizeof *code_sum);
    }
    if ((!in_place && !panels) || (layer->parts == 2 && !code_sum)) {
        return no_memory;
    }
    layer->panels = in_place ? d->weight : panels;
    if (layer->code_bits != 2) {
        return merge_panels(layer, d, merge, isas, panels, code_sum);
    }
    for (size_t plane = 0; !reason && plane < d->planes; plane++) {
        const bn_panel_source source = plane_of(layer, d, isas, plane);
        reason = bn_panel_build(&source, panels ? panels + plane * plane_bytes : NULL,
                                code_sum ? code_sum + bn_table_offset(layer, plane, 0) : NULL);
    }
    return reason;
}

static const char *fill(bn_matmul *layer, const bn_matmul_desc *d, const bn_merge *merge, uint32_t isas)
{
    const char *reason = layer->code_bits == 2 ? fill_tables(layer, d)
                                               : fill_merged_tables(layer, d, merge);
    return reason ? reason : fill_panels(layer, d, merge, isas);
}

/* Five ternary codes in a byte, as they are in the file, where a kernel multiplies them as fast as memory
 * gives them.  AMX has none: its tiles are made from fields of 2 bits, and with many rows five in a byte would
 * cost it some 10 % more work for each; whether one row gains as much there was never measured. */
static void squeeze(bn_matmul *layer, uint32_t isas)
{
    const bn_groups *g = &layer->groups;
    bn_shared *panels = layer->held[BN_PANELS];

    if (!panels || layer->code_bits != 2 || layer->parts == 0 || layer->planes > 1 || g->count > 1 ||
        bn_find("dot", "t5", isas)->isa == BN_ISA_scalar ||
        bn_find("dot", "i2s", isas)->isa == BN_ISA_amx) {
        return;
    }
    bn_shared_cut(panels, bn_squeeze_panels(bn_shared_bytes(panels), layer->n, g));
    layer->column = bn_t5_vectors(g->padded / BN_STEP) * BN_VECTOR;
    layer->dot = (bn_dot_fn *)find("dot", "t5", isas);
}

/* From here on nothing of the layer is written, and equal layers hold the same. */
static void share(bn_matmul *layer)
{
    for (int table = 0; table < BN_TABLES; table++) {
        if (layer->held[table]) {
            layer->held[table] = bn_share(layer->held[table]);
        }
    }
    if (layer->held[BN_PANELS]) {
        layer->panels = bn_shared_bytes(layer->held[BN_PANELS]);
    }
    layer->scale = bn_shared_bytes(layer->held[BN_SCALE]);
    layer->zero_point = bn_shared_bytes(layer->held[BN_ZERO_POINT]);
    layer->code_sum = bn_shared_bytes(layer->held[BN_CODE_SUM]);
    layer->bias = bn_shared_bytes(layer->held[BN_BIAS]);
}

/* AMX is at 2500 products per ns with many rows, where VNNI is at 500; where neither is here, tasks
 * only take longer. */
static size_t find_pace(const char *format, uint32_t isas)
{
    return bn_find("dot", format, isas)->isa == BN_ISA_amx ? 5 : 1;
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
    layer->column = bn_column_bytes(&layer->groups, layer->code_bits);
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

    reason = fill(layer, desc, &merge, isas);
    if (reason) {
        bn_matmul_destroy(layer);
        return reason;
    }
    if (desc->format == BN_FORMAT_t5) {
        squeeze(layer, isas);
    }
    share(layer);
    *out = layer;
    return NULL;
}

void bn_matmul_destroy(bn_matmul *layer)
{
    if (!layer) {
        return;
    }
    for (int table = 0; table < BN_TABLES; table++) {
        bn_shared_release(layer->held[table]);
    }
    free(layer);
}
