/* A whole packed layer: rows are prepared once (quantized, or copied in float), then tasks multiply
 * ranges of super-panels with ranges of rows.
 *
 * The order of float operations in an output depends on nothing but the layer, so results are the same
 * bits for every split into tasks. */
#include "matmul.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "dispatch.h"
#include "kernel.h"
#include "panel.h"

struct bn_matmul {
    size_t n, k, planes, parts; /* parts: rows of int8 per row of activations; 0 for float ones */
    bn_groups groups;
    int bits;
    float step;
    uint8_t *panels;   /* planes of bn_panel_bytes each */
    float *scale;      /* (planes, super-panels, groups, 64) */
    float *zero_point; /* the same shape, or NULL: all are 1 */
    int32_t *code_sum; /* the same shape, or NULL where parts < 2 */
    float *bias;       /* (super-panels, 64) */
    bn_dot_fn *dot;
    bn_dotf_fn *dotf;
    bn_actq_fn *actq;
    bn_scale_fn *scale_acc;
    bn_widen_fn *widen;
    bn_narrow_fn *narrow;
};

/* ---- create ---------------------------------------------------------------------------------- */

static const char *check(const bn_matmul_desc *d)
{
    if (d->n == 0 || d->k == 0) {
        return "N and K must be at least 1";
    }
    if (d->planes < 1 || d->planes > BN_MAX_PLANES) {
        return "weight must have 1 to 4 planes";
    }
    if (d->scale_rows != 1 && d->scale_rows != d->n) {
        return "scale must have 1 or N rows";
    }
    if (d->activation_bits != 8 && d->activation_bits != 16 && d->activation_bits != 32) {
        return "activation_bits must be 8, 16 or 32";
    }
    if (d->activation_scale != 0.0f &&
        !(d->activation_scale >= FLT_MIN && d->activation_scale <= 1.0f / FLT_MIN)) {
        return "activation_scale must be 0 or a positive number";
    }
    if (d->activation_bits != 32 && bn_make_groups(d->k, d->block_size).length > BN_MAX_GROUP) {
        return "more than 262144 inputs share a scale, their sums would not fit 32 bits; use blocks";
    }
    return NULL;
}

static size_t table_size(const bn_matmul *layer)
{
    return layer->planes * bn_super_panels(layer->n) * layer->groups.count * BN_SUPER;
}

/* (planes, rows, groups) to (planes, super-panels, groups, 64); outputs past n get 0. */
static float *spread(const bn_matmul *layer, const float *from, size_t rows)
{
    const size_t supers = bn_super_panels(layer->n);
    const size_t groups = layer->groups.count;
    float *table = calloc(table_size(layer), sizeof *table);

    for (size_t plane = 0; table && plane < layer->planes; plane++) {
        for (size_t output = 0; output < layer->n; output++) {
            const float *row = from + (plane * rows + (rows == 1 ? 0 : output)) * groups;
            float *to = table + (plane * supers + output / BN_SUPER) * groups * BN_SUPER;
            for (size_t g = 0; g < groups; g++) {
                to[g * BN_SUPER + output % BN_SUPER] = row[g];
            }
        }
    }
    return table;
}

/* Zero points of 1 are left out where the difference of the integer sums fits 32 bits: with 8 bits
 * always, 2 * 128 * 2^18 = 2^26; with 16 bits up to 2 * 32768 * 32767 < 2^31. */
static int zero_points_are_implied(const bn_matmul *layer, const bn_matmul_desc *d)
{
    const size_t count = d->planes * d->scale_rows * layer->groups.count;

    if (layer->parts == 2 && layer->groups.length > 32767) {
        return 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (d->zero_point[i] != 1.0f) {
            return 0;
        }
    }
    return 1;
}

static const char *fill(bn_matmul *layer, const bn_matmul_desc *d)
{
    const char *no_memory = "out of memory for the packed weights";
    const size_t supers = bn_super_panels(d->n);
    const size_t plane_bytes = bn_panel_bytes(d->n, &layer->groups);

    layer->panels = bn_panel_alloc(d->planes * plane_bytes);
    layer->scale = spread(layer, d->scale, d->scale_rows);
    layer->bias = calloc(supers * BN_SUPER, sizeof *layer->bias);
    if (!layer->panels || !layer->scale || !layer->bias) {
        return no_memory;
    }
    if (d->bias) {
        memcpy(layer->bias, d->bias, d->n * sizeof *d->bias);
    }
    if (!zero_points_are_implied(layer, d)) {
        layer->zero_point = spread(layer, d->zero_point, d->scale_rows);
        if (!layer->zero_point) {
            return no_memory;
        }
    }
    if (layer->parts == 2) {
        layer->code_sum = malloc(table_size(layer) * sizeof *layer->code_sum);
        if (!layer->code_sum) {
            return no_memory;
        }
    }
    for (size_t plane = 0; plane < d->planes; plane++) {
        const char *reason = bn_panel_build(
            d->weight + plane * d->n * bn_row_bytes(d->k), d->n, &layer->groups,
            layer->panels + plane * plane_bytes,
            layer->code_sum ? layer->code_sum + plane * (table_size(layer) / d->planes) : NULL);
        if (reason) {
            return reason;
        }
    }
    return NULL;
}

static bn_any_fn *find(const char *op, const char *format, uint32_t isas)
{
    return bn_find(op, format, isas)->fn; /* every op has a scalar kernel, and isas has scalar */
}

const char *bn_matmul_create(const bn_matmul_desc *desc, uint32_t isas, bn_matmul **out)
{
    const char *reason = check(desc);
    bn_matmul *layer = reason ? NULL : calloc(1, sizeof *layer);

    *out = NULL;
    if (!layer) {
        return reason ? reason : "out of memory";
    }
    layer->n = desc->n;
    layer->k = desc->k;
    layer->planes = desc->planes;
    layer->parts = desc->activation_bits == 32 ? 0 : (size_t)desc->activation_bits / 8;
    layer->groups = bn_make_groups(desc->k, desc->block_size);
    layer->bits = desc->activation_bits;
    layer->step = desc->activation_scale;

    isas |= UINT32_C(1) << BN_ISA_scalar;
    layer->dot = (bn_dot_fn *)find("dot", "i2s", isas);
    layer->dotf = (bn_dotf_fn *)find("dotf", "i2s", isas);
    layer->actq = (bn_actq_fn *)find("actq", "f32", isas);
    layer->scale_acc = (bn_scale_fn *)find("scale", "i32", isas);
    layer->widen = (bn_widen_fn *)find("widen", "f16", isas);
    layer->narrow = (bn_narrow_fn *)find("narrow", "f16", isas);

    reason = fill(layer, desc);
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

/* ---- run ------------------------------------------------------------------------------------- */

/* Rows of activations handled at once: their products fit the stack and the first-level cache. */
enum { ROW_BLOCK = 16, ACC_BLOCKS = 64 };

/* One call of bn_matmul_run: the rows as the kernels want them, and how the work is split. */
typedef struct {
    const bn_matmul *layer;
    const void *x;
    void *y;
    bn_float_type type;
    size_t m;

    int8_t *q;      /* (m * parts, padded), or NULL with float activations */
    int64_t *sum;   /* (m, groups) sums of q */
    float *inv_s;   /* (m) what the products are multiplied with; NaN for a row that is not finite */
    float *xf;      /* (m, padded) float activations, or NULL */
    float *xf_sum;  /* (m, groups) sums of xf */
    float *wide;    /* (prepare tasks, k) float32 copies of float16 rows, or NULL */

    size_t prepare_rows;               /* rows in a task of prepare() */
    size_t task_supers, task_rows;     /* super-panels and rows in a task of multiply() */
    size_t row_tasks;                  /* tasks that share the same super-panels */
} call;

/* One row of float activations: padded like q, with its sums. */
static void copy_row(const call *c, const float *x, size_t row)
{
    const bn_groups *groups = &c->layer->groups;
    float check_sum = 0.0f;

    for (size_t g = 0; g < groups->count; g++) {
        const size_t length = bn_group_length(groups, g);
        const float *from = x + g * groups->length;
        float *to = c->xf + row * groups->padded + g * groups->stride;
        double sum = 0.0;

        for (size_t i = 0; i < length; i++) {
            to[i] = from[i];
            sum += (double)from[i];
            check_sum += from[i] * 0.0f; /* NaN as soon as a value is not finite */
        }
        for (size_t i = length; i < bn_round_up(length, BN_STEP); i++) {
            to[i] = 0.0f;
        }
        c->xf_sum[row * groups->count + g] = (float)sum;
    }
    c->inv_s[row] = isnan(check_sum) ? NAN : 1.0f;
}

static void prepare(void *arg, size_t index)
{
    const call *c = arg;
    const bn_matmul *layer = c->layer;
    const size_t end = (index + 1) * c->prepare_rows < c->m ? (index + 1) * c->prepare_rows : c->m;

    for (size_t row = index * c->prepare_rows; row < end; row++) {
        const float *x;
        if (c->type == BN_FLOAT16) {
            float *wide = c->wide + index * layer->k;
            layer->widen(&(bn_widen_args){
                .x = (const uint16_t *)c->x + row * layer->k, .y = wide, .count = layer->k});
            x = wide;
        } else {
            x = (const float *)c->x + row * layer->k;
        }
        if (layer->parts == 0) {
            copy_row(c, x, row);
            continue;
        }
        layer->actq(&(bn_actq_args){
            .x = x,
            .q = c->q + row * layer->parts * layer->groups.padded,
            .sum = c->sum + row * layer->groups.count,
            .inv_s = c->inv_s + row,
            .groups = layer->groups,
            .q_stride = layer->groups.padded,
            .step = layer->step,
            .bits = layer->bits,
        });
    }
}

/* What multiply() is about to add to y (rows, 64): some groups of one plane of one super-panel. */
typedef struct {
    size_t super, plane, row, rows, group, groups;
} block;

static void add_integer(const call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const bn_groups *g = &layer->groups;
    const size_t width = bn_super_width(layer->n, b->super);
    const size_t first = b->group * g->stride;
    const size_t end = b->group + b->groups == g->count ? g->padded : first + b->groups * g->stride;
    const size_t table =
        ((b->plane * bn_super_panels(layer->n) + b->super) * g->count + b->group) * BN_SUPER;
    float ones[ROW_BLOCK];
    int32_t acc[ACC_BLOCKS * BN_SUPER];

    for (size_t i = 0; i < b->rows; i++) {
        ones[i] = 1.0f;
    }
    layer->dot(&(bn_dot_args){
        .panel = layer->panels + b->plane * bn_panel_bytes(layer->n, g) +
                 bn_super_offset(b->super, g) + first / BN_STEP * width * BN_VECTOR,
        .q = c->q + b->row * layer->parts * g->padded + first,
        .acc = acc,
        .q_stride = g->padded,
        .rows = b->rows * layer->parts,
        .panels = width,
        .steps = (end - first) / BN_STEP,
        .group_steps = g->stride / BN_STEP,
    });
    layer->scale_acc(&(bn_scale_args){
        .acc = acc,
        .sum = c->sum + b->row * g->count + b->group,
        .code_sum = layer->code_sum ? layer->code_sum + table : NULL,
        .scale = layer->scale + table,
        .zero_point = layer->zero_point ? layer->zero_point + table : NULL,
        .factor = g->count == 1 ? c->inv_s + b->row : ones,
        .y = y,
        .rows = b->rows,
        .parts = layer->parts,
        .groups = b->groups,
        .sum_stride = g->count,
        .panels = width,
    });
}

/* y += scale * (sum of (code - 1) x + (1 - zero_point) * sum of x) */
static void add_float(const call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const bn_groups *g = &layer->groups;
    const size_t width = bn_super_width(layer->n, b->super);
    const size_t first = b->group * g->stride;
    const size_t end = b->group + b->groups == g->count ? g->padded : first + b->groups * g->stride;
    const size_t table =
        ((b->plane * bn_super_panels(layer->n) + b->super) * g->count + b->group) * BN_SUPER;
    float acc[ACC_BLOCKS * BN_SUPER];

    layer->dotf(&(bn_dotf_args){
        .panel = layer->panels + b->plane * bn_panel_bytes(layer->n, g) +
                 bn_super_offset(b->super, g) + first / BN_STEP * width * BN_VECTOR,
        .x = c->xf + b->row * g->padded + first,
        .acc = acc,
        .x_stride = g->padded,
        .rows = b->rows,
        .panels = width,
        .steps = (end - first) / BN_STEP,
        .group_steps = g->stride / BN_STEP,
    });
    for (size_t row = 0; row < b->rows; row++) {
        for (size_t i = 0; i < b->groups; i++) {
            const float *scale = layer->scale + table + i * BN_SUPER;
            const float *zero_point = layer->zero_point ? layer->zero_point + table + i * BN_SUPER : NULL;
            const float *product = acc + (row * b->groups + i) * BN_SUPER;
            const float sum = c->xf_sum[(b->row + row) * g->count + b->group + i];
            for (size_t lane = 0; lane < width * BN_PANEL; lane++) {
                const float offset = zero_point ? (1.0f - zero_point[lane]) * sum : 0.0f;
                y[row * BN_SUPER + lane] += scale[lane] * (product[lane] + offset);
            }
        }
    }
}

/* y (rows, 64) to the caller's matrix: the row's scale where the groups have their own, and bias. */
static void finish(const call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const size_t first = b->super * BN_SUPER;
    const size_t width = layer->n - first < BN_SUPER ? layer->n - first : BN_SUPER;
    const int rescale = layer->groups.count > 1 || layer->parts == 0;

    for (size_t i = 0; i < b->rows; i++) {
        const float factor = rescale ? c->inv_s[b->row + i] : 1.0f;
        const size_t at = (b->row + i) * layer->n + first;
        float *row = y + i * BN_SUPER;
        for (size_t lane = 0; lane < BN_SUPER; lane++) {
            row[lane] = row[lane] * factor + layer->bias[first + lane];
        }
        if (c->type == BN_FLOAT16) {
            layer->narrow(
                &(bn_narrow_args){.x = row, .y = (uint16_t *)c->y + at, .count = width});
        } else {
            memcpy((float *)c->y + at, row, width * sizeof *row);
        }
    }
}

/* One super-panel, at most ROW_BLOCK rows. */
static void multiply_block(const call *c, size_t super, size_t row, size_t rows)
{
    const bn_matmul *layer = c->layer;
    const size_t acc_rows = rows * (layer->parts ? layer->parts : 1);
    const size_t most = ACC_BLOCKS / acc_rows;
    float y[ROW_BLOCK * BN_SUPER];
    block b = {.super = super, .row = row, .rows = rows};

    memset(y, 0, rows * BN_SUPER * sizeof *y);
    for (b.plane = 0; b.plane < layer->planes; b.plane++) {
        for (b.group = 0; b.group < layer->groups.count; b.group += b.groups) {
            const size_t left = layer->groups.count - b.group;
            b.groups = left < most ? left : most;
            if (layer->parts) {
                add_integer(c, &b, y);
            } else {
                add_float(c, &b, y);
            }
        }
    }
    finish(c, &b, y);
}

static void multiply(void *arg, size_t index)
{
    const call *c = arg;
    const size_t first_super = index / c->row_tasks * c->task_supers;
    const size_t first_row = index % c->row_tasks * c->task_rows;
    const size_t supers = bn_super_panels(c->layer->n);

    for (size_t super = first_super; super < first_super + c->task_supers && super < supers; super++) {
        const size_t end = first_row + c->task_rows < c->m ? first_row + c->task_rows : c->m;
        for (size_t row = first_row; row < end; row += ROW_BLOCK) {
            multiply_block(c, super, row, end - row < ROW_BLOCK ? end - row : ROW_BLOCK);
        }
    }
}

/* ---- splitting the work ---------------------------------------------------------------------- */

/* Rough time of one super-panel with `rows` rows in ns, at 500 products per ns; reading and unpacking the
 * codes costs about as much as three rows.  Slower machines only get longer tasks. */
static size_t estimate_ns(const bn_matmul *layer, size_t rows)
{
    const size_t parts = layer->parts ? layer->parts : 8;
    return layer->planes * layer->groups.padded / 8 * (rows * parts + 3);
}

enum { INLINE_NS = 20000, TASK_NS = 8000, ROW_TASK_NS = 25000, PREPARE_VALUES = 1 << 15 };

static void split(call *c)
{
    const bn_matmul *layer = c->layer;
    const size_t supers = bn_super_panels(layer->n);
    const size_t per_row = (estimate_ns(layer, ROW_BLOCK) + ROW_BLOCK - 1) / ROW_BLOCK;
    const size_t rows = bn_round_up(ROW_TASK_NS / per_row + 1, ROW_BLOCK);

    c->task_rows = rows < c->m ? rows : c->m;
    c->row_tasks = (c->m - 1) / c->task_rows + 1;
    c->task_supers = TASK_NS / estimate_ns(layer, c->task_rows) + 1;
    if (c->task_supers > supers) {
        c->task_supers = supers;
    }
    c->prepare_rows = PREPARE_VALUES / layer->k + 1;
}

static void run_all(bn_parallel_for *parallel_for, void *context, void (*task)(void *, size_t),
                    size_t count, call *c)
{
    if (parallel_for && count > 1) {
        parallel_for(context, task, count, c);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        task(c, i);
    }
}

/* Hands out pieces of one allocation; a first pass with memory == NULL measures. */
typedef struct {
    char *memory;
    size_t used;
} arena;

static void *take(arena *a, size_t count, size_t size)
{
    void *piece = a->memory ? a->memory + a->used : NULL;
    a->used += bn_round_up(count * size, BN_VECTOR);
    return piece;
}

static void place(call *c, arena *a, size_t prepare_tasks)
{
    const bn_matmul *layer = c->layer;
    const size_t padded = layer->groups.padded;

    c->inv_s = take(a, c->m, sizeof *c->inv_s);
    if (layer->parts) {
        c->q = take(a, c->m * layer->parts * padded, sizeof *c->q);
        c->sum = take(a, c->m * layer->groups.count, sizeof *c->sum);
    } else {
        c->xf = take(a, c->m * padded, sizeof *c->xf);
        c->xf_sum = take(a, c->m * layer->groups.count, sizeof *c->xf_sum);
    }
    if (c->type == BN_FLOAT16) {
        c->wide = take(a, prepare_tasks * layer->k, sizeof *c->wide);
    }
}

const char *bn_matmul_run(const bn_matmul *layer, const void *x, void *y, size_t m,
                          bn_float_type type, bn_parallel_for *parallel_for, void *context)
{
    call c = {.layer = layer, .x = x, .y = y, .type = type, .m = m};
    arena a = {NULL, 0};

    if (m == 0) {
        return NULL;
    }
    split(&c);
    const size_t supers = bn_super_panels(layer->n);
    const size_t prepare_tasks = (m - 1) / c.prepare_rows + 1;
    const size_t tasks = ((supers - 1) / c.task_supers + 1) * c.row_tasks;

    place(&c, &a, prepare_tasks);
    a.memory = malloc(a.used);
    if (!a.memory) {
        return "out of memory for the quantized activations";
    }
    a.used = 0;
    place(&c, &a, prepare_tasks);

    if (supers * estimate_ns(layer, m) < INLINE_NS) {
        parallel_for = NULL;
    }
    run_all(parallel_for, context, prepare, prepare_tasks, &c);
    run_all(parallel_for, context, multiply, tasks, &c);
    free(a.memory);
    return NULL;
}
