/* Canonical bytes, or panels from a file, to panels.
 *
 * Method  The `panel` kernel turns 64 rows of i2s into a super-panel.  Where no group is padded it reads
 *         them where they lie; other rows, and those of other formats, are brought to padded i2s rows
 *         first, 64 at a time so that they stay in cache.  Sums of codes are products with ones, so that
 *         they too come from a kernel.  Tasks are runs of super-panels. */
#include "panel.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "kernel.h"

static const char NOT_FILLED[] =
    "weight: a code past N or K is not 1, the bytes are corrupt or of another layout";
static const char NO_MEMORY[] = "out of memory for the packed weights";

/* Bytes of panels in a task: some 200 us of work, many times what it takes to start a thread. */
enum { TASK_BYTES = 1 << 20, FOUR_ONES = 0x55 };
#define ALL_ONES UINT32_C(0x55555555) /* sixteen codes 1 */

typedef struct {
    const bn_panel_source *source;
    uint8_t *panels;
    int32_t *code_sum;
    bn_panel_fn *panel;
    bn_dot_fn *dot;
    size_t task_supers;
    _Atomic(const char *) reason; /* why one task failed */
} job;

/* What a task works with. */
typedef struct {
    uint8_t *rows;   /* (64, padded / 4) */
    uint8_t *codes;  /* (k) */
    uint8_t *padded; /* (padded), the padding filled with 1 */
    int8_t *ones;    /* (padded) */
} scratch;

static int is_padded(const bn_groups *g)
{
    return g->padded != g->k;
}

/* Whether all padding comes after the last input. */
static int is_dense(const bn_groups *g)
{
    return g->count == 1 || g->stride == g->length;
}

/* One output's row as padded i2s.  Returns NULL, or why it is not canonical. */
static const char *stage(const bn_panel_source *s, const uint8_t *row, const scratch *t, uint8_t *to)
{
    const bn_groups *g = &s->groups;

    if (s->format == BN_FORMAT_i2s && is_dense(g)) {
        const size_t bytes = bn_row_bytes(g->k);
        memcpy(to, row, bytes);
        memset(to + bytes, FOUR_ONES, g->padded / 4 - bytes);
        return bn_i2s_check(row, g->k);
    }
    uint8_t *codes = is_dense(g) ? t->padded : t->codes;
    const char *reason = bn_formats[s->format].unpack(row, g->k, codes);
    for (size_t i = 0; codes == t->codes && i < g->count; i++) {
        memcpy(t->padded + i * g->stride, t->codes + i * g->length, bn_group_length(g, i));
    }
    bn_pack_i2s(t->padded, g->padded, to);
    return reason;
}

/* A super-panel of canonical rows. */
static const char *from_rows(const job *j, size_t super, const scratch *t)
{
    const bn_panel_source *s = j->source;
    const bn_groups *g = &s->groups;
    const size_t width = bn_super_width(s->n, super), steps = g->padded / BN_STEP;
    const size_t row_bytes = bn_formats[s->format].row_bytes(g->k);
    const size_t first = super * BN_SUPER, outputs = width * BN_PANEL;
    const size_t real = s->n - first < outputs ? s->n - first : outputs;
    const uint8_t *rows = s->weight + first * row_bytes;
    bn_panel_args args = {rows, j->panels + bn_super_offset(super, g, 2), row_bytes, width, steps};

    if (s->format != BN_FORMAT_i2s || is_padded(g) || real < outputs) {
        args.rows = t->rows;
        args.row_stride = g->padded / 4;
        for (size_t i = 0; i < real; i++) {
            const char *reason = stage(s, rows + i * row_bytes, t, t->rows + i * args.row_stride);
            if (reason) {
                return reason;
            }
        }
        memset(t->rows + real * args.row_stride, FOUR_ONES, (outputs - real) * args.row_stride);
    }
    j->panel(&args);
    return NULL;
}

/* Whether outputs from `real` on, and inputs past k, have code 1. */
static int is_filled_with_ones(const uint8_t *panel, size_t real, const bn_groups *g)
{
    const size_t steps = g->padded / BN_STEP, used = 2 * (g->k % BN_STEP);
    const uint32_t past_k = used == 0 ? 0 : bn_transpose_fields(UINT32_MAX << used);
    uint32_t other = 0;

    /* with all 64 outputs only the last step can have padding */
    for (size_t step = real < BN_SUPER ? 0 : used > 0 ? steps - 1 : steps; step < steps; step++) {
        for (size_t output = 0; output < BN_SUPER; output++) {
            const uint32_t w = bn_load_word(panel + (step * BN_SUPER + output) * 4) ^ ALL_ONES;
            other |= output >= real ? w : step + 1 == steps ? w & past_k : 0;
        }
    }
    return other == 0;
}

/* A super-panel that is one in the file: its padding is checked, and where it is wider than it need be
 * it is copied without. */
static const char *from_panels(const job *j, size_t super)
{
    const bn_panel_source *s = j->source;
    const bn_groups *g = &s->groups;
    const size_t bytes = bn_super_width(s->n, super) * BN_VECTOR, steps = g->padded / BN_STEP;
    const size_t left = s->n - super * BN_SUPER, real = left < BN_SUPER ? left : BN_SUPER;
    const uint8_t *from = s->weight + bn_super_offset(super, g, 2);

    if (!is_filled_with_ones(from, real, g)) {
        return NOT_FILLED;
    }
    for (size_t step = 0; j->panels && step < steps; step++) {
        memcpy(j->panels + bn_super_offset(super, g, 2) + step * bytes,
               from + step * BN_SUPER / BN_PANEL * BN_VECTOR, bytes);
    }
    return NULL;
}

static void sum_codes(const job *j, size_t super, const int8_t *ones)
{
    const bn_panel_source *s = j->source;
    const bn_groups *g = &s->groups;
    int32_t *sum = j->code_sum + super * g->count * BN_SUPER;

    memset(sum, 0, g->count * BN_SUPER * sizeof *sum);
    j->dot(&(bn_dot_args){.panel = (j->panels ? j->panels : s->weight) + bn_super_offset(super, g, 2),
                          .q = ones,
                          .acc = sum,
                          .q_stride = g->padded,
                          .rows = 1,
                          .panels = bn_super_width(s->n, super),
                          .steps = g->padded / BN_STEP,
                          .group_steps = g->stride / BN_STEP});
}

static void build(void *arg, size_t index)
{
    job *j = arg;
    const bn_groups *g = &j->source->groups;
    const size_t supers = bn_super_panels(j->source->n);
    const size_t row = g->padded / 4;
    const size_t first = index * j->task_supers, last = first + j->task_supers;
    uint8_t *memory = malloc(BN_SUPER * row + g->k + 2 * g->padded);

    if (!memory) {
        atomic_store(&j->reason, NO_MEMORY);
        return;
    }
    const scratch t = {memory, memory + BN_SUPER * row, memory + BN_SUPER * row + g->k,
                       (int8_t *)memory + BN_SUPER * row + g->k + g->padded};
    memset(t.padded, 1, g->padded);
    memset(t.ones, 1, g->padded);
    for (size_t super = first; super < last && super < supers; super++) {
        const char *reason = j->source->is_panels ? from_panels(j, super) : from_rows(j, super, &t);
        if (reason) {
            atomic_store(&j->reason, reason);
            break;
        }
        if (j->code_sum) {
            sum_codes(j, super, t.ones);
        }
    }
    free(memory);
}

const char *bn_panel_build(const bn_panel_source *source, uint8_t *panels, int32_t *code_sum)
{
    const size_t supers = bn_super_panels(source->n);
    job j = {
        .source = source,
        .panels = panels,
        .code_sum = code_sum,
        .panel = (bn_panel_fn *)bn_find("panel", "i2s", source->isas)->fn,
        .dot = (bn_dot_fn *)bn_find("dot", "i2s", source->isas)->fn,
        .task_supers = TASK_BYTES / (source->groups.padded / 4 * BN_SUPER) + 1,
    };
    atomic_init(&j.reason, NULL);
    bn_run_tasks(source->threads, build, (supers - 1) / j.task_supers + 1, &j);
    return atomic_load(&j.reason);
}

bool bn_panel_serves(const bn_panel_source *s)
{
    const size_t last = bn_super_panels(s->n) - 1;
    return s->is_panels && bn_super_width(s->n, last) == BN_SUPER / BN_PANEL &&
           (uintptr_t)s->weight % BN_VECTOR == 0;
}

const char *bn_panel_rows(const bn_panel_source *s, uint8_t *rows)
{
    const bn_groups *g = &s->groups;
    const size_t row_bytes = bn_row_bytes(g->k);

    for (size_t super = 0; super < bn_super_panels(s->n); super++) {
        const size_t left = s->n - super * BN_SUPER, real = left < BN_SUPER ? left : BN_SUPER;
        const uint8_t *panel = s->weight + bn_super_offset(super, g, 2);
        if (!is_filled_with_ones(panel, real, g)) {
            return NOT_FILLED;
        }
        for (size_t output = 0; output < real; output++, rows += row_bytes) {
            for (size_t at = 0; at < row_bytes; at += 4) {
                uint8_t word[4];
                bn_store_word(word, bn_transpose_fields(bn_load_word(panel + at * BN_SUPER + output * 4)));
                memcpy(rows + at, word, row_bytes - at < 4 ? row_bytes - at : 4);
            }
        }
    }
    return NULL;
}
