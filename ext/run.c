/* Running a packed layer: rows are prepared once (quantized, or copied in float), then tasks
 * multiply ranges of super-panels with ranges of rows; or both at once, where there are rows enough.
 *
 * The order of float operations in an output depends on nothing but the layer, so results are the
 * same bits for every split into tasks. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "layer.h"

/* Rows of activations handled at once: their products fit the stack and the first-level cache. */
enum { ROW_BLOCK = 32, ACC_BLOCKS = 128 };

/* One call of bn_matmul_run: the rows as the kernels want them, and how the work is split. */
typedef struct {
    const bn_matmul *layer;
    const void *x;
    void *y;
    bn_float_type type;
    size_t m;

    int8_t *q;     /* (m * parts, padded), or NULL with float activations */
    int64_t *sum;  /* (m, groups) sums of q */
    float *inv_s;  /* (m) factors of the products; NaN for a row that is not finite */
    float *xf;     /* (m, padded) float activations, or NULL */
    float *xf_sum; /* (m, groups) sums of xf */
    float *wide;   /* (prepare tasks, k) float32 copies of float16 rows, or NULL */

    size_t prepare_rows;           /* rows in a task of prepare() */
    size_t task_supers, task_rows; /* super-panels and rows in a task of multiply() */
    size_t row_tasks;              /* tasks that share the same super-panels */
    int by_rows;                   /* tasks of both are the same rows, and multiply() takes all super-panels */
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
static int fits(const call *c, const block *b)
{
    const size_t left = c->layer->n - b->super * BN_SUPER;
    return c->type == BN_FLOAT32 && (left >= BN_SUPER || left % BN_PANEL == 0);
}

/* What a block adds to y; what the last one adds, with the bias, goes to the caller's matrix if it
 * fits. */
static void add_integer(const call *c, const block *b, float *y)
{
    const bn_matmul *layer = c->layer;
    const bn_groups *g = &layer->groups;
    const place p = locate(layer, b);
    const size_t first = b->super * BN_SUPER;
    const int is_first = b->plane == 0 && b->group == 0;
    const int is_last = b->plane + 1 == layer->planes && b->group + b->groups == g->count;
    const int is_direct = is_last && fits(c, b);
    float ones[ROW_BLOCK];
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

static void add_float(const call *c, const block *b, float *y)
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
static void store(const call *c, const block *b, const float *y)
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
static void finish_float(const call *c, const block *b, float *y)
{
    const float *bias = c->layer->bias + b->super * BN_SUPER;

    for (size_t i = 0; i < b->rows; i++) {
        for (size_t lane = 0; lane < BN_SUPER; lane++) {
            float *value = y + i * BN_SUPER + lane;
            *value = *value * c->inv_s[b->row + i] + bias[lane];
        }
    }
}

/* One super-panel, at most ROW_BLOCK rows. */
static void multiply_block(const call *c, block b)
{
    const bn_matmul *layer = c->layer;
    const size_t acc_rows = b.rows * (layer->parts ? layer->parts : 1);
    const size_t most = ACC_BLOCKS / acc_rows;
    float y[ROW_BLOCK * BN_SUPER];

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
    if (left == ROW_BLOCK + 1) {
        return ROW_BLOCK - 4;
    }
    return left < ROW_BLOCK ? left : ROW_BLOCK;
}

static void multiply(void *arg, size_t index)
{
    const call *c = arg;
    const size_t first_super = index / c->row_tasks * c->task_supers;
    const size_t first_row = index % c->row_tasks * c->task_rows;
    const size_t supers = bn_super_panels(c->layer->n);
    const size_t last_super = first_super + c->task_supers;
    const size_t end = first_row + c->task_rows < c->m ? first_row + c->task_rows : c->m;
    bn_tiles_args tiles = {.back = 0};
    block b = {0};

    c->layer->tiles(&tiles);
    for (b.super = first_super; b.super < last_super && b.super < supers; b.super++) {
        for (b.row = first_row; b.row < end; b.row += b.rows) {
            b.rows = block_rows(end - b.row);
            multiply_block(c, b);
        }
    }
    tiles.back = 1;
    c->layer->tiles(&tiles);
}

static void prepare_and_multiply(void *arg, size_t index)
{
    prepare(arg, index);
    multiply(arg, index);
}

/* ---- splitting the work ---------------------------------------------------------------------- */

/* Rough time of one super-panel with `rows` rows in ns, at 500 products per ns; reading and
 * unpacking the codes costs about as much as three rows.  Slower machines only get longer tasks.
 */
static size_t estimate_ns(const bn_matmul *layer, size_t rows)
{
    const size_t parts = layer->parts ? layer->parts : 8;
    return layer->planes * layer->groups.padded / 8 * (rows * parts / layer->pace + 3);
}

enum { INLINE_NS = 20000, TASK_NS = 8000, ROW_TASK_NS = 25000, PREPARE_VALUES = 1 << 15 };

/* Rows for each thread, where there are enough: a task prepares some and multiplies them with all super-panels, so
 * that what a core quantizes is still in its cache and it waits for no other.  What comes before and after in a graph
 * shares out rows as well.  Float sums of one row alone have an order of their own, so their tasks must not depend
 * on threads. */
static int split_by_rows(call *c, size_t threads)
{
    const size_t rows = 2 * ROW_BLOCK * c->layer->pace; /* many enough to wait for no weights, even from memory */
    const size_t rounds = threads && c->layer->parts ? c->m / rows / threads : 0;

    if (rounds == 0) {
        return 0;
    }
    const size_t tasks = threads * (rounds < 2 ? 2 : rounds);
    c->task_rows = c->prepare_rows = (c->m - 1) / tasks + 1;
    c->row_tasks = (c->m - 1) / c->task_rows + 1;
    c->task_supers = bn_super_panels(c->layer->n);
    return 1;
}

static void split_by_supers(call *c)
{
    const bn_matmul *layer = c->layer;
    const size_t supers = bn_super_panels(layer->n);
    const size_t per_row = (estimate_ns(layer, ROW_BLOCK) + ROW_BLOCK - 1) / ROW_BLOCK;
    const size_t most = ROW_TASK_NS / per_row + 1;
    const size_t rows = bn_round_up(most, ROW_BLOCK);

    c->task_rows = rows < c->m ? rows : c->m;
    c->row_tasks = (c->m - 1) / c->task_rows + 1;
    c->task_supers = TASK_NS / estimate_ns(layer, c->task_rows) + 1;
    if (c->task_supers > supers) {
        c->task_supers = supers;
    }
    c->prepare_rows = PREPARE_VALUES / layer->k + 1;
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

static void lay_out(call *c, arena *a, size_t prepare_tasks)
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
                          bn_float_type type, bn_threads threads)
{
    call c = {.layer = layer, .x = x, .y = y, .type = type, .m = m};
    arena a = {NULL, 0};

    if (m == 0) {
        return NULL;
    }
    c.by_rows = split_by_rows(&c, threads.run ? threads.count : 1);
    if (!c.by_rows) {
        split_by_supers(&c);
    }
    const size_t supers = bn_super_panels(layer->n);
    const size_t prepare_tasks = (m - 1) / c.prepare_rows + 1;
    const size_t tasks = ((supers - 1) / c.task_supers + 1) * c.row_tasks;

    lay_out(&c, &a, prepare_tasks);
    a.memory = malloc(a.used); /* in a running model warm pages: none was faulted in from 1 to 4096 rows */
    if (!a.memory) {
        return "out of memory for the quantized activations";
    }
    a.used = 0;
    lay_out(&c, &a, prepare_tasks);

    if (supers * estimate_ns(layer, m) < INLINE_NS) {
        threads.run = NULL;
    }
    if (c.by_rows) {
        bn_run_tasks(threads, prepare_and_multiply, tasks, &c);
    } else {
        bn_run_tasks(threads, prepare, prepare_tasks, &c);
        bn_run_tasks(threads, multiply, tasks, &c);
    }
    free(a.memory);
    return NULL;
}
