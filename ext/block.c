/* Products of prepared rows with super-panels, block by block: integers or floats of each group, then their sums
 * in the one order that kernel.h states. */
#include <string.h>

#include "call.h"

enum { ACC_BLOCKS = 128 }; /* groups times rows whose products are held at once */

/* What multiply_block() is about to add to y (rows, 64): some groups of one plane of one super-panel. */
typedef struct {
    size_t super, plane, row, rows, group, groups;
} block;

/* Where a block's data is. */
typedef struct {
    const uint8_t *panel;
    size_t width;  /* vectors side by side */
    size_t column; /* first padded input */
    size_t steps;
    size_t table; /* offset into scale, zero_point and code_sum */
} place;

static const uint8_t *super_panel(const bn_matmul *layer, size_t plane, size_t super)
{
    const size_t panels = bn_round_up(layer->n, BN_PANEL) / BN_PANEL;
    return layer->panels + (plane * panels + super * (BN_SUPER / BN_PANEL)) * layer->column;
}

static place locate(const bn_matmul *layer, const block *b)
{
    const bn_groups *g = &layer->groups;
    const size_t column = b->group * g->stride;
    const size_t last = b->group + b->groups;
    const size_t end = last == g->count ? g->padded : last * g->stride;
    place p;

    p.width = bn_super_width(layer->n, b->super);
    p.column = column;
    p.steps = (end - column) / BN_STEP;
    p.panel = super_panel(layer, b->plane, b->super) +
              column / BN_STEP * p.width * bn_step_bytes(layer->code_bits);
    p.table = bn_table_offset(layer, b->plane, b->super) + b->group * BN_SUPER;
    return p;
}

/* Are the rows of y that a block makes 16 outputs at a time all in the caller's matrix? */
static int fits(const bn_call *c, const block *b)
{
    const size_t left = c->layer->n - b->super * BN_SUPER;
    return c->type == BN_FLOAT32 && (left >= BN_SUPER || left % BN_PANEL == 0);
}

/* What a block adds to y; what the last one adds, with the bias, goes to the caller's matrix if it
 * fits. */
static void add_integer(const bn_call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const bn_groups *g = &layer->groups;
    const place p = locate(layer, b);
    const size_t first = b->super * BN_SUPER;
    const int is_first = b->plane == 0 && b->group == 0;
    const int is_last = b->plane + 1 == layer->planes && b->group + b->groups == g->count;
    const int is_direct = is_last && fits(c, b);
    float ones[BN_ROW_BLOCK];
    int32_t acc[ACC_BLOCKS * BN_SUPER];

    for (size_t i = 0; i < b->rows; i++) {
        ones[i] = 1.0f;
    }
    layer->dot(&(bn_dot_args){
        .panel = p.panel,
        .q = c->q + b->row * layer->parts * g->padded + p.column,
        .acc = acc,
        .q_stride = g->padded,
        .rows = b->rows * layer->parts,
        .panels = p.width,
        .steps = p.steps,
        .group_steps = g->stride / BN_STEP,
    });
    layer->scale_acc(&(bn_scale_args){
        .acc = acc,
        .sum = c->sum + b->row * g->count + b->group,
        .code_sum = layer->code_sum ? layer->code_sum + p.table : NULL,
        .scale = layer->scale + p.table,
        .zero_point = layer->zero_point ? layer->zero_point + p.table : NULL,
        .zero = layer->zero,
        .factor = g->count == 1 ? c->inv_s + b->row : ones,
        .before = is_first ? NULL : y,
        .bias = is_last ? layer->bias + first : NULL,
        .rescale = g->count == 1 ? ones : c->inv_s + b->row,
        .y = is_direct ? (float *)c->y + b->row * layer->n + first : y,
        .y_stride = is_direct ? layer->n : BN_SUPER,
        .rows = b->rows,
        .parts = layer->parts,
        .groups = b->groups,
        .sum_stride = g->count,
        .panels = p.width,
    });
}

/* y += scale * (product + (1 - zero_point) * sum), where product is the sum of (code - 1) x; `at` is
 * the group's place in the tables. */
static void add_group(const bn_matmul *layer, size_t at, const float *product, float sum,
                      size_t lanes, float *y)
{
    for (size_t lane = 0; lane < lanes; lane++) {
        const float zero = layer->zero_point ? layer->zero_point[at + lane] : (float)layer->zero;
        const float offset = zero == 1.0f ? 0.0f : (1.0f - zero) * sum; /* sum may be infinite */
        y[lane] += layer->scale[at + lane] * (product[lane] + offset);
    }
}

static void add_float(const bn_call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const bn_groups *g = &layer->groups;
    const place p = locate(layer, b);
    float acc[ACC_BLOCKS * BN_SUPER];

    layer->dotf(&(bn_dotf_args){
        .panel = p.panel,
        .x = c->xf + b->row * g->padded + p.column,
        .acc = acc,
        .x_stride = g->padded,
        .rows = b->rows,
        .panels = p.width,
        .steps = p.steps,
        .group_steps = g->stride / BN_STEP,
    });
    for (size_t row = 0; row < b->rows; row++) {
        for (size_t i = 0; i < b->groups; i++) {
            add_group(layer, p.table + i * BN_SUPER, acc + (row * b->groups + i) * BN_SUPER,
                      c->xf_sum[(b->row + row) * g->count + b->group + i], p.width * BN_PANEL,
                      y + row * BN_SUPER);
        }
    }
}

/* y (rows, 64) to the caller's matrix.  The loop writes each output once; for counts that are not
 * constant gcc would make the slow `rep movs` of memcpy. */
static void store(const bn_call *c, const block *b, const float *y)
{
    const bn_matmul *layer = c->layer;
    const size_t first = b->super * BN_SUPER;
    const size_t width = layer->n - first < BN_SUPER ? layer->n - first : BN_SUPER;

    for (size_t i = 0; i < b->rows; i++) {
        const float *row = y + i * BN_SUPER;
        const size_t at = (b->row + i) * layer->n + first;
        if (c->type == BN_FLOAT16) {
            layer->narrow(
                &(bn_narrow_args){.x = row, .y = (uint16_t *)c->y + at, .count = width});
            continue;
        }
        for (size_t lane = 0; lane < width; lane++) {
            ((float *)c->y)[at + lane] = row[lane];
        }
    }
}

/* The end of sums of float activations: the row's factor, which may be NaN, and bias. */
static void finish_float(const bn_call *c, const block *b, float *y)
{
    const float *bias = c->layer->bias + b->super * BN_SUPER;

    for (size_t i = 0; i < b->rows; i++) {
        for (size_t lane = 0; lane < BN_SUPER; lane++) {
            float *value = y + i * BN_SUPER + lane;
            *value = *value * c->inv_s[b->row + i] + bias[lane];
        }
    }
}

/* One super-panel, at most BN_ROW_BLOCK rows. */
static void multiply_block(const bn_call *c, block b)
{
    const bn_matmul *layer = c->layer;
    const size_t acc_rows = b.rows * (layer->parts ? layer->parts : 1);
    const size_t most = ACC_BLOCKS / acc_rows;
    float y[BN_ROW_BLOCK * BN_SUPER];

    if (!layer->parts) {
        memset(y, 0, b.rows * BN_SUPER * sizeof *y);
    }
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
    if (!layer->parts) {
        finish_float(c, &b, y);
    }
    if (!layer->parts || !fits(c, &b)) {
        store(c, &b, y);
    }
}

/* Rows of the next block when `left` are left.  A block of one row costs as much as one of two,
 * and is not left over. */
static size_t block_rows(size_t left)
{
    if (left == BN_ROW_BLOCK + 1) {
        return BN_ROW_BLOCK - 4;
    }
    return left < BN_ROW_BLOCK ? left : BN_ROW_BLOCK;
}

void bn_multiply(const bn_call *c, bn_range rows, bn_range supers)
{
    bn_tiles_args tiles = {.back = 0};
    block b = {0};

    c->layer->tiles(&tiles);
    for (b.super = supers.first; b.super < supers.end; b.super++) {
        for (b.row = rows.first; b.row < rows.end; b.row += b.rows) {
            b.rows = block_rows(rows.end - b.row);
            multiply_block(c, b);
        }
    }
    tiles.back = 1;
    c->layer->tiles(&tiles);
}
