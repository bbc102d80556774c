#include "selfcheck.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

/* 14 steps in groups of 9 and 5; rows for two tiles of AMX and some more. */
enum { STEPS = 14, GROUP_STEPS = 9, GROUPS = 2, ROWS = 37, K = STEPS * BN_STEP };
enum { WIDEST = 4 }; /* vectors in place of one, in panels of wider weights */
enum { ACC = ROWS * GROUPS * BN_SUPER };

/* Inputs of the kernels, and where a kernel and the scalar one write; kernels read no more of an input than
 * there is, and each gets what it needs from the one buffer of its type. */
typedef struct {
    uint8_t codes[STEPS * BN_SUPER / BN_PANEL * BN_VECTOR * WIDEST];
    int8_t q[ROWS * K];
    float x[ROWS * K], positive[GROUPS * BN_SUPER], signs[K];
    uint16_t halves[K];
    int64_t sums[ROWS * GROUPS];
    int32_t acc[ACC], code_sum[GROUPS * BN_SUPER];
    union {
        int32_t acc[ACC];
        float values[ACC];
        uint16_t halves[K];
        struct {
            int8_t q[2 * K];
            int64_t sum[GROUPS];
            float inv_s;
        } row;
    } out[2]; /* of the kernel, of the scalar one */
    float mask[2 * BN_KEYS], scores[BN_ATTENTION_ROWS * 2 * BN_KEYS];
    bn_tiles_fn *tiles;
} bench;

static uint32_t next_random(uint32_t *state)
{
    *state = *state * UINT32_C(1664525) + UINT32_C(1013904223);
    return *state >> 16;
}

static void fill(bench *b)
{
    uint32_t state = 1;

    for (size_t i = 0; i < sizeof b->codes; i++) {
        b->codes[i] = (uint8_t)next_random(&state);
    }
    for (size_t i = 0; i < ROWS * K; i++) {
        b->q[i] = (int8_t)(next_random(&state) % 256 - 128);
        b->x[i] = (float)(int)(next_random(&state) % 64) - 31.5f; /* all sums are exact */
    }
    for (size_t i = 0; i < GROUPS * BN_SUPER; i++) {
        b->positive[i] = (float)(next_random(&state) + 1) / 65536.0f;
        b->code_sum[i] = (int32_t)next_random(&state);
    }
    for (size_t i = 0; i < K; i++) {
        b->signs[i] = next_random(&state) % 2 ? 1.0f : -1.0f;
        b->halves[i] = (uint16_t)(next_random(&state) & 0xBFFF); /* finite */
    }
    for (size_t i = 0; i < ROWS * GROUPS; i++) {
        b->sums[i] = (int64_t)next_random(&state) - 32768;
    }
    for (size_t i = 0; i < ACC; i++) {
        b->acc[i] = (int32_t)next_random(&state) - 32768;
    }
}

/* What the last two calls wrote is the same; clears it for the next two. */
static int is_same(bench *b)
{
    const int same = memcmp(&b->out[0], &b->out[1], sizeof b->out[0]) == 0;
    memset(b->out, 0, sizeof b->out);
    return same;
}

/* ---- One check for each op --------------------------------------------------------------------- */

static void run_dot(bench *b, bn_any_fn *fn, int32_t *acc, size_t rows, size_t panels)
{
    ((bn_dot_fn *)fn)(&(bn_dot_args){
        .panel = b->codes,
        .q = b->q,
        .acc = acc,
        .q_stride = K,
        .rows = rows,
        .panels = panels,
        .steps = STEPS,
        .group_steps = GROUP_STEPS,
    });
}

/* A row's sums do not depend on how many rows there are. */
static int check_dot(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    bn_tiles_args tiles = {.back = 0};
    int same = 1;

    b->tiles(&tiles);
    for (size_t panels = 1; panels <= 4; panels++) {
        run_dot(b, scalar, b->out[1].acc, ROWS, panels);
        for (size_t rows = 1; rows <= ROWS; rows++) {
            memset(b->out[0].acc, 0, sizeof b->out[0].acc);
            run_dot(b, kernel, b->out[0].acc, rows, panels);
            same &= memcmp(b->out[0].acc, b->out[1].acc,
                           rows * GROUPS * BN_SUPER * sizeof(int32_t)) == 0;
        }
        (void)is_same(b);
    }
    tiles.back = 1;
    b->tiles(&tiles);
    return same;
}

static void run_dotf(bench *b, bn_any_fn *fn, float *acc, size_t rows)
{
    ((bn_dotf_fn *)fn)(&(bn_dotf_args){
        .panel = b->codes,
        .x = b->x,
        .acc = acc,
        .x_stride = K,
        .rows = rows,
        .panels = 1 + rows % 4,
        .steps = STEPS,
        .group_steps = GROUP_STEPS,
    });
}

static int check_dotf(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (size_t rows = 1; rows <= 8; rows++) {
        run_dotf(b, kernel, b->out[0].values, rows);
        run_dotf(b, scalar, b->out[1].values, rows);
        same &= is_same(b);
    }
    return same;
}

static void run_actq(bench *b, bn_any_fn *fn, int which, int bits, float step)
{
    ((bn_actq_fn *)fn)(&(bn_actq_args){
        .x = b->x,
        .q = b->out[which].row.q,
        .sum = b->out[which].row.sum,
        .inv_s = &b->out[which].row.inv_s,
        .groups = bn_make_groups(K - 7, GROUP_STEPS * BN_STEP - 3),
        .q_stride = K,
        .step = step,
        .bits = bits,
    });
}

static int check_actq(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (int i = 0; i < 4; i++) {
        run_actq(b, kernel, 0, i & 1 ? 16 : 8, i & 2 ? 0.37f : 0.0f);
        run_actq(b, scalar, 1, i & 1 ? 16 : 8, i & 2 ? 0.37f : 0.0f);
        same &= is_same(b);
    }
    return same;
}

static void run_scale(bench *b, bn_any_fn *fn, int which, size_t parts, int affine, size_t panels)
{
    ((bn_scale_fn *)fn)(&(bn_scale_args){
        .acc = b->acc,
        .sum = b->sums,
        .code_sum = b->code_sum,
        .scale = b->positive,
        .zero_point = affine ? b->positive : NULL,
        .factor = b->positive,
        .y = b->out[which].values,
        .rows = 5,
        .parts = parts,
        .groups = GROUPS,
        .sum_stride = GROUPS,
        .panels = panels,
    });
}

static int check_scale(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (int i = 0; i < 8; i++) {
        run_scale(b, kernel, 0, i & 1 ? 2 : 1, i & 2, i & 4 ? 4 : 3);
        run_scale(b, scalar, 1, i & 1 ? 2 : 1, i & 2, i & 4 ? 4 : 3);
        same &= is_same(b);
    }
    return same;
}

static int check_widen(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    for (int i = 0; i < 2; i++) {
        ((bn_widen_fn *)(i ? scalar : kernel))(
            &(bn_widen_args){.x = b->halves, .y = b->out[i].values, .count = K - 5});
    }
    return is_same(b);
}

static int check_narrow(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    for (int i = 0; i < 2; i++) {
        ((bn_narrow_fn *)(i ? scalar : kernel))(&(bn_narrow_args){
            .x = b->positive, .y = b->out[i].halves, .count = GROUPS * BN_SUPER - 5});
    }
    return is_same(b);
}

static int check_hadamard(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (size_t block = 1; K % block == 0; block *= 2) {
        for (int i = 0; i < 2; i++) {
            ((bn_hadamard_fn *)(i ? scalar : kernel))(&(bn_hadamard_args){
                .x = b->x,
                .signs = b->signs,
                .y = b->out[i].values,
                .rows = 2,
                .k = K,
                .block = block,
            });
        }
        same &= is_same(b);
    }
    return same;
}

/* Two panels of keys, the last one not full, and rows in strips and alone; the widths fill no vector. */
static int check_attention(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    enum { WIDTH = 19, VALUES = 37, TOKENS = BN_KEYS + 9, PADDED = 2 * BN_KEYS };
    static const size_t rows[] = {1, 5, 8, BN_ATTENTION_ROWS};
    int same = 1;

    for (size_t t = 0; t < PADDED; t++) {
        b->mask[t] = t < TOKENS ? (float)(t % 3) : -INFINITY;
    }
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        for (int which = 0; which < 2; which++) {
            ((bn_attention_fn *)(which ? scalar : kernel))(&(bn_attention_args){
                .q = b->x,
                .keys = b->x + 1,
                .values = b->x + 2,
                .mask = b->mask,
                .scores = b->scores,
                .y = b->out[which].values,
                .q_stride = WIDTH,
                .value_stride = 48,
                .y_stride = VALUES,
                .rows = rows[i],
                .tokens = TOKENS,
                .width = WIDTH,
                .value_width = VALUES,
                .scale = 0.001f,
                .nan_to_zero = (int)i % 2,
            });
        }
        same &= is_same(b);
    }
    return same;
}

static int check_transpose(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (size_t rows = 1; rows <= ROWS; rows += 4) {
        for (int i = 0; i < 2; i++) {
            ((bn_transpose_fn *)(i ? scalar : kernel))(&(bn_transpose_args){
                .x = b->x,
                .y = b->out[i].values,
                .x_stride = K,
                .y_stride = rows + 1,
                .rows = rows,
                .cols = rows + 2,
            });
        }
        same &= is_same(b);
    }
    return same;
}

static int check_panel(bench *b, bn_any_fn *kernel, bn_any_fn *scalar)
{
    int same = 1;

    for (size_t panels = 1; panels <= 4; panels++) {
        for (int i = 0; i < 2; i++) {
            ((bn_panel_fn *)(i ? scalar : kernel))(&(bn_panel_args){
                .rows = b->codes,
                .panel = (uint8_t *)b->out[i].acc,
                .row_stride = 4 * STEPS + 1,
                .panels = panels,
                .steps = STEPS,
            });
        }
        same &= is_same(b);
    }
    return same;
}

/* Results of `tiles` are those of `dot`. */
static const struct {
    const char *op;
    int (*check)(bench *b, bn_any_fn *kernel, bn_any_fn *scalar); /* NULL where it is not run by ops */
} checks[] = {
    {"dot", check_dot},     {"dotf", check_dotf},         {"actq", check_actq},
    {"scale", check_scale}, {"widen", check_widen},       {"narrow", check_narrow},
    {"panel", check_panel}, {"hadamard", check_hadamard}, {"transpose", check_transpose},
    {"tiles", NULL},        {"assign", NULL},             {"attention", check_attention},
    {"compare", NULL},      {"decode", NULL},             {"moments", NULL},
    {"optimum", NULL},
};

/* ---- All of them ------------------------------------------------------------------------------- */

/* An op that nobody has said how to check is wrong. */
static int is_right(bench *b, const bn_kernel *kernel, const bn_kernel *scalar)
{
    for (size_t i = 0; i < sizeof checks / sizeof checks[0]; i++) {
        if (strcmp(checks[i].op, kernel->op) == 0) {
            return !checks[i].check || checks[i].check(b, kernel->fn, scalar->fn);
        }
    }
    return 0;
}

static const bn_kernel *find(const bn_kernel *kernels, size_t count, const char *op,
                             const char *format, bn_isa isa)
{
    for (size_t i = 0; i < count; i++) {
        if (kernels[i].isa == isa && strcmp(kernels[i].op, op) == 0 &&
            strcmp(kernels[i].format, format) == 0) {
            return &kernels[i];
        }
    }
    return NULL;
}

uint32_t bn_right_isas(const bn_kernel *kernels, size_t count, uint32_t isas)
{
    bench *b = isas >> 1 ? malloc(sizeof *b) : NULL;

    if (!b) {
        return isas;
    }
    memset(b, 0, sizeof *b);
    fill(b);
    for (size_t i = 0; i < count; i++) {
        const bn_kernel *kernel = &kernels[i];
        const bn_kernel *scalar = find(kernels, count, kernel->op, kernel->format, BN_ISA_scalar);
        const bn_kernel *tiles = find(kernels, count, "tiles", "config", kernel->isa);
        if (!tiles) {
            tiles = find(kernels, count, "tiles", "config", BN_ISA_scalar);
        }
        b->tiles = (bn_tiles_fn *)tiles->fn;
        if (kernel->isa != BN_ISA_scalar && (isas >> kernel->isa & 1) &&
            !is_right(b, kernel, scalar)) {
            isas &= ~(UINT32_C(1) << kernel->isa);
        }
    }
    free(b);
    return isas;
}
