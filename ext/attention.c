/* How attention is shared out: a task is some heads, or some rows of a head that has many.  It lays out the
 * keys and values of a head as the kernel reads them, which costs little beside what the rows then compute,
 * and meanwhile asks for those of the next head: its rows lie apart, which nothing in the CPU foresees
 * (32 x 128 tokens, 12 heads of 32: 6.1 ms with, 7.2 without). */
#include "attention.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

enum {
    TASKS = 64, /* into which many heads are put together */
    TASK_ROWS = 8 * BN_ATTENTION_ROWS,
    LINE = 64 / sizeof(float), /* of the cache */
    AHEAD = 1 << 16 /* floats of a head that the second-level cache has room for, beside those at work */
};

#if defined(__GNUC__)
#define BN_READ_AHEAD(p) __builtin_prefetch(p, 0, 2)
#define BN_WRITE_AHEAD(p) __builtin_prefetch(p, 1, 2)
#else
#define BN_READ_AHEAD(p) ((void)(p))
#define BN_WRITE_AHEAD(p) ((void)(p))
#endif

typedef struct {
    const bn_attention_call *call;
    bn_attention_fn *attend;
    bn_transpose_fn *transpose;
    size_t padded;            /* tokens, in whole panels of keys */
    size_t value_stride;      /* from value to value as the kernel reads them */
    int is_in_place;          /* values are read where they are */
    size_t mask_rows;         /* that are laid out: those of a block, or the one that all have */
    size_t task_heads;        /* heads in a task, or 1: */
    size_t parts, task_rows;  /* tasks of a head, and rows in one */
    int is_ahead;             /* whether to ask for the next head */
    atomic_int is_out_of_memory;
} job;

/* One head of one batch. */
typedef struct {
    const float *q, *k, *v, *mask;
    float *y;
} head;

/* What a task works in. */
typedef struct {
    float *keys, *values, *scores, *masks;
} workspace;

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static head find_head(const bn_attention_call *c, size_t index)
{
    const size_t b = index / c->heads, h = index % c->heads;
    return (head){
        .q = c->q + b * c->q_strides.batch + h * c->q_strides.head,
        .k = c->k + b * c->k_strides.batch + h * c->k_strides.head,
        .v = c->v + b * c->v_strides.batch + h * c->v_strides.head,
        .mask = c->mask + b * c->mask_strides.batch + h * c->mask_strides.head,
        .y = c->y + b * c->y_strides.batch + h * c->y_strides.head,
    };
}

static void lay_out_keys(const job *j, const float *k, float *keys)
{
    const bn_attention_call *c = j->call;

    for (size_t first = 0; first < c->tokens; first += BN_KEYS, keys += BN_KEYS * c->width) {
        const size_t rows = smaller(c->tokens - first, BN_KEYS);
        if (rows < BN_KEYS) {
            memset(keys, 0, BN_KEYS * c->width * sizeof *keys);
        }
        j->transpose(&(bn_transpose_args){
            .x = k + first * c->k_strides.row,
            .y = keys,
            .x_stride = c->k_strides.row,
            .y_stride = BN_KEYS,
            .rows = rows,
            .cols = c->width,
        });
    }
}

static void lay_out_values(const job *j, const float *v, float *values)
{
    const bn_attention_call *c = j->call;

    for (size_t t = 0; t < c->tokens; t++, v += c->v_strides.row, values += j->value_stride) {
        memcpy(values, v, c->value_width * sizeof *values);
        memset(values + c->value_width, 0, (j->value_stride - c->value_width) * sizeof *values);
    }
}

static void lay_out_masks(const job *j, const float *mask, float *masks, size_t rows)
{
    const bn_attention_call *c = j->call;

    for (size_t row = 0; row < rows; row++, mask += c->mask_strides.row, masks += j->padded) {
        for (size_t t = 0; t < c->tokens; t++) {
            masks[t] = mask[t * c->mask_token_stride];
        }
        for (size_t t = c->tokens; t < j->padded; t++) {
            masks[t] = -INFINITY;
        }
    }
}

static void read_ahead(const float *from, size_t stride, size_t first, size_t end, size_t width)
{
    for (size_t row = first; row < end; row++) {
        for (size_t i = 0; i < width; i += LINE) {
            BN_READ_AHEAD(from + row * stride + i);
        }
    }
}

/* Asks for as many rows of a head as are computed meanwhile. */
static void ask_for(const bn_attention_call *c, const head *h, size_t first, size_t end)
{
    const size_t last = smaller(end, c->tokens);

    read_ahead(h->k, c->k_strides.row, first, last, c->width);
    read_ahead(h->v, c->v_strides.row, first, last, c->value_width);
    read_ahead(h->q, c->q_strides.row, first, end, c->width);
    for (size_t row = first; row < end; row++) {
        for (size_t i = 0; i < c->value_width; i += LINE) {
            BN_WRITE_AHEAD(h->y + row * c->y_strides.row + i);
        }
    }
}

/* Rows of a head, a block at a time; `next` is the head that comes after it, or NULL. */
static void attend(const job *j, const head *h, const head *next, size_t from, size_t end,
                   const workspace *work)
{
    const bn_attention_call *c = j->call;
    const size_t block = smaller(end - from, BN_ATTENTION_ROWS);

    lay_out_keys(j, h->k, work->keys);
    if (!j->is_in_place) {
        lay_out_values(j, h->v, work->values);
    }
    for (size_t row = from; row < end; row += block) {
        const size_t first = smaller(row, end - block); /* the last block may overlap another */
        if (row == from || c->mask_strides.row > 0) {
            lay_out_masks(j, h->mask + first * c->mask_strides.row, work->masks, smaller(block, j->mask_rows));
        }
        j->attend(&(bn_attention_args){
            .q = h->q + first * c->q_strides.row,
            .keys = work->keys,
            .values = j->is_in_place ? h->v : work->values,
            .mask = work->masks,
            .scores = work->scores,
            .y = h->y + first * c->y_strides.row,
            .q_stride = c->q_strides.row,
            .value_stride = j->value_stride,
            .mask_stride = c->mask_strides.row > 0 ? j->padded : 0,
            .y_stride = c->y_strides.row,
            .rows = block,
            .tokens = c->tokens,
            .width = c->width,
            .value_width = c->value_width,
            .scale = c->scale,
            .nan_to_zero = c->nan_to_zero,
        });
        if (next != NULL) {
            ask_for(c, next, row, smaller(row + block, end));
        }
    }
}

static void run_task(void *arg, size_t index)
{
    job *j = arg;
    const bn_attention_call *c = j->call;
    const size_t first = index / j->parts * j->task_heads;
    const size_t last = smaller(first + j->task_heads, c->batches * c->heads);
    const size_t from = index % j->parts * j->task_rows, end = smaller(from + j->task_rows, c->rows);
    const size_t keys = j->padded * c->width;
    const size_t values = j->is_in_place ? 0 : bn_round_up(c->tokens * j->value_stride, LINE);
    const size_t scores = BN_ATTENTION_ROWS * j->padded, masks = j->mask_rows * j->padded;
    float *memory = malloc((LINE + keys + values + scores + masks) * sizeof *memory);

    if (memory == NULL) {
        atomic_store(&j->is_out_of_memory, 1);
        return;
    }
    workspace work;
    work.keys = memory + (LINE - (uintptr_t)memory / sizeof *memory % LINE);
    work.values = work.keys + keys;
    work.scores = work.values + values;
    work.masks = work.scores + scores;
    head h = find_head(c, first);
    for (size_t i = first; i < last; i++) {
        const head next = find_head(c, smaller(i + 1, last - 1));
        attend(j, &h, i + 1 < last && j->is_ahead ? &next : NULL, from, end, &work);
        h = next;
    }
    free(memory);
}

/* The sum over no tokens. */
static void clear(const bn_attention_call *c)
{
    for (size_t index = 0; index < c->batches * c->heads; index++) {
        float *y = find_head(c, index).y;
        for (size_t row = 0; row < c->rows; row++) {
            memset(y + row * c->y_strides.row, 0, c->value_width * sizeof *y);
        }
    }
}

/* Values need not be laid out where they fill whole vectors and lie side by side, or are read but once. */
static int are_values_in_place(const bn_attention_call *c)
{
    return c->value_width % BN_VALUES == 0 &&
           (c->v_strides.row == c->value_width || c->rows <= BN_ATTENTION_ROWS);
}

const char *bn_attention_run(const bn_attention_call *call, uint32_t isas, bn_threads threads)
{
    const size_t heads = call->batches * call->heads;

    if (heads * call->rows * call->value_width == 0) {
        return NULL;
    }
    if (call->tokens == 0) {
        clear(call);
        return NULL;
    }
    const size_t parts = (call->rows + TASK_ROWS - 1) / TASK_ROWS;
    const size_t task_heads = parts > 1 || heads < TASKS ? 1 : heads / TASKS;
    const size_t block = smaller(call->rows, BN_ATTENTION_ROWS);
    const int is_in_place = are_values_in_place(call);
    const size_t floats = call->tokens * (call->width + call->value_width);
    job j = {
        .call = call,
        .attend = (bn_attention_fn *)bn_find("attention", "f32", isas)->fn,
        .transpose = (bn_transpose_fn *)bn_find("transpose", "f32", isas)->fn,
        .padded = bn_round_up(call->tokens, BN_KEYS),
        .value_stride = is_in_place ? call->v_strides.row : bn_round_up(call->value_width, BN_VALUES),
        .is_in_place = is_in_place,
        .mask_rows = call->mask_strides.row > 0 ? block : 1,
        .task_heads = task_heads,
        .parts = parts,
        .task_rows = bn_round_up((call->rows + parts - 1) / parts, BN_ATTENTION_ROWS),
        .is_ahead = floats <= AHEAD,
    };
    atomic_init(&j.is_out_of_memory, 0);
    bn_run_tasks(threads, run_task, (heads + task_heads - 1) / task_heads * parts, &j);
    return atomic_load(&j.is_out_of_memory) ? "out of memory" : NULL;
}
