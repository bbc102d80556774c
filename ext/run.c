/* Running a packed layer: its work is shared out.  With few rows all are prepared first, and then tasks multiply
 * ranges of super-panels with ranges of rows; with many a task does both for rows of its own.
 *
 * The order of float operations in an output depends on nothing but the layer, so results are the
 * same bits for every split into tasks. */
#include <stdlib.h>

#include "call.h"

typedef struct {
    bn_call call;
    float *wide;                   /* (prepare tasks, k) float32 copies of float16 rows, or NULL */
    size_t prepare_rows;           /* rows in a task of prepare() */
    size_t task_supers, task_rows; /* super-panels and rows in a task of multiply() */
    size_t row_tasks;              /* tasks that share the same super-panels */
} work;

static bn_range nth(size_t index, size_t length, size_t end)
{
    const size_t first = index * length;
    return (bn_range){first, end - first < length ? end : first + length};
}

static void prepare(void *arg, size_t index)
{
    const work *w = arg;
    float *wide = w->wide ? w->wide + index * w->call.layer->k : NULL;
    bn_prepare(&w->call, nth(index, w->prepare_rows, w->call.m), wide);
}

static void multiply(void *arg, size_t index)
{
    const work *w = arg;
    bn_multiply(&w->call, nth(index % w->row_tasks, w->task_rows, w->call.m),
                nth(index / w->row_tasks, w->task_supers, bn_super_panels(w->call.layer->n)));
}

static void prepare_and_multiply(void *arg, size_t index)
{
    prepare(arg, index);
    multiply(arg, index);
}

/* ---- Sharing out ---- */

/* Rough time of one super-panel with `rows` rows in ns, at 500 products per ns; reading and
 * unpacking the codes costs about as much as three rows.  Slower machines only get longer tasks.
 */
static size_t estimate_ns(const bn_matmul *layer, size_t rows)
{
    const size_t parts = layer->parts ? layer->parts : 8;
    return layer->planes * layer->groups.padded / 8 * (rows * parts / layer->pace + 3);
}

enum { INLINE_NS = 20000, TASK_NS = 8000, ROW_TASK_NS = 25000, PREPARE_VALUES = 1 << 15 };
enum { CACHED = 16 << 20 }; /* bytes of weights that stay in a cache while one task after the other reads them */

/* Tasks of rows, where there are enough for all threads: what a core quantizes is still in its cache when it
 * multiplies, it waits for no other, and what comes before and after in a graph shares out rows as well.  Float sums
 * of one row alone have an order of their own, so their tasks must not depend on threads. */
static int split_by_rows(work *w, size_t threads)
{
    const bn_matmul *layer = w->call.layer;
    const size_t weights = layer->planes * (bn_round_up(layer->n, BN_PANEL) / BN_PANEL) * layer->column;
    const size_t rows = 2 * BN_ROW_BLOCK * layer->pace; /* enough to wait for no weights */
    const size_t rounds = threads && layer->parts ? w->call.m / rows / threads : 0;

    if (rounds == 0 || weights > CACHED) {
        return 0;
    }
    const size_t tasks = threads * (rounds < 2 ? 2 : rounds);
    w->task_rows = w->prepare_rows = (w->call.m - 1) / tasks + 1;
    w->task_supers = bn_super_panels(layer->n);
    return 1;
}

static void split_by_supers(work *w)
{
    const bn_matmul *layer = w->call.layer;
    const size_t supers = bn_super_panels(layer->n);
    const size_t per_row = (estimate_ns(layer, BN_ROW_BLOCK) + BN_ROW_BLOCK - 1) / BN_ROW_BLOCK;
    const size_t rows = bn_round_up(ROW_TASK_NS / per_row + 1, BN_ROW_BLOCK);

    w->task_rows = rows < w->call.m ? rows : w->call.m;
    w->task_supers = TASK_NS / estimate_ns(layer, w->task_rows) + 1;
    if (w->task_supers > supers) {
        w->task_supers = supers;
    }
    w->prepare_rows = PREPARE_VALUES / layer->k + 1;
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

static void lay_out(work *w, arena *a, size_t prepare_tasks)
{
    bn_call *c = &w->call;
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
        w->wide = take(a, prepare_tasks * layer->k, sizeof *w->wide);
    }
}

const char *bn_matmul_run(const bn_matmul *layer, const void *x, void *y, size_t m,
                          bn_float_type type, bn_threads threads)
{
    work w = {.call = {.layer = layer, .x = x, .y = y, .type = type, .m = m}};
    arena a = {NULL, 0};

    if (m == 0) {
        return NULL;
    }
    const int by_rows = split_by_rows(&w, threads.run ? threads.count : 1);
    if (!by_rows) {
        split_by_supers(&w);
    }
    const size_t supers = bn_super_panels(layer->n);
    const size_t prepare_tasks = (m - 1) / w.prepare_rows + 1;
    w.row_tasks = (m - 1) / w.task_rows + 1;
    const size_t tasks = ((supers - 1) / w.task_supers + 1) * w.row_tasks;

    lay_out(&w, &a, prepare_tasks);
    a.memory = malloc(a.used); /* in a running model warm pages: none was faulted in from 1 to 4096 rows */
    if (!a.memory) {
        return "out of memory for the quantized activations";
    }
    a.used = 0;
    lay_out(&w, &a, prepare_tasks);

    if (supers * estimate_ns(layer, m) < INLINE_NS) {
        threads.run = NULL;
    }
    if (by_rows) {
        bn_run_tasks(threads, prepare_and_multiply, tasks, &w);
    } else {
        bn_run_tasks(threads, prepare, prepare_tasks, &w);
        bn_run_tasks(threads, multiply, tasks, &w);
    }
    free(a.memory);
    return NULL;
}
