/* What all SIMD kernels of dot and dotf share: cutting a super-panel and rows into strips.
 *
 * A strip is a few steps of one group, for as many rows and vectors side by side as a kernel keeps
 * in registers.  A kernel is one function that multiplies a strip; here it is called with constant
 * rows and panels, so that each shape becomes a loop of its own without branches. */
#ifndef BN_STRIPS_H
#define BN_STRIPS_H

#include <string.h>

#include "kernel.h"

typedef struct {
    const uint8_t *panel; /* (steps, panels, step_bytes) */
    size_t panel_stride;  /* bytes from step to step */
    const void *x;        /* (rows, x_stride) int8_t or float */
    size_t x_stride;
    size_t steps;
    void *acc; /* (rows, acc_stride) int32_t or float; of a row 16 * panels are written, */
    size_t acc_stride;
    int fresh; /* or, unless fresh, added to */
} bn_strip;

typedef void bn_strip_fn(const bn_strip *s, const int rows, const int panels);

/* The arguments of dot and of dotf. */
typedef struct {
    const uint8_t *panel;
    const char *x;
    char *acc;
    size_t x_size, x_stride, rows, panels, steps, group_steps;
    size_t step_bytes; /* of 16 outputs x 16 inputs */
    size_t longest;    /* steps that a strip may have */
    int is_t5;         /* five steps take the room of four */
} bn_strips;

enum {
    BN_ACC_SIZE = 4,
    BN_PREFETCH = 4096 /* bytes of a panel read ahead; with 1024, 33 of 39 GB/s (AVX512-VNNI) */
};

/* Keeps a sum in one register at this point.  Without it gcc 12 adds up products in trees of its
 * own or moves sums about, runs out of registers and spills: one row with AVX512-VNNI took 1.75
 * times as long. */
#if defined(__GNUC__)
#define BN_KEEP(vector) __asm__("" : "+v"(vector))
#else
#define BN_KEEP(vector) ((void)0)
#endif

/* Four activations of 8 bits, to be broadcast. */
static inline int32_t bn_load_four(const int8_t *q)
{
    int32_t four;
    memcpy(&four, q, sizeof four);
    return four;
}

/* All groups of `rows` rows from `first` on, for `panels` of the vectors that stand side by side
 * from `from` on. */
BN_INLINE void bn_all_groups(const bn_strips *a, bn_strip_fn *strip, size_t first, size_t from,
                             const int rows, const int panels)
{
    const size_t groups = (a->steps - 1) / a->group_steps + 1;
    bn_strip s = {
        .panel = a->panel + from * a->step_bytes,
        .panel_stride = a->panels * a->step_bytes,
        .x = a->x + first * a->x_stride * a->x_size,
        .x_stride = a->x_stride,
        .acc = a->acc + (first * groups * BN_SUPER + from * BN_PANEL) * BN_ACC_SIZE,
        .acc_stride = groups * BN_SUPER,
    };

    for (size_t g = 0; g < groups; g++) {
        const size_t left = a->steps - g * a->group_steps;
        const size_t end = left < a->group_steps ? left : a->group_steps;

        for (size_t step = 0; step < end; step += a->longest) {
            s.steps = end - step < a->longest ? end - step : a->longest;
            s.fresh = step == 0;
            strip(&s, rows, panels);
            s.panel += (a->is_t5 ? bn_t5_vectors(s.steps) : s.steps) * s.panel_stride;
            s.x = (const char *)s.x + s.steps * BN_STEP * a->x_size;
        }
        s.acc = (char *)s.acc + BN_SUPER * BN_ACC_SIZE;
    }
}

/* All vectors of `rows` rows: 4, 2 or 1 side by side, so that there are at most `sums` products of
 * a row and a vector at once. */
BN_INLINE void bn_all_panels(const bn_strips *a, bn_strip_fn *strip, size_t first, const int rows,
                             const int sums)
{
    size_t from = 0;

    if (4 * rows <= sums && a->panels == 4) {
        bn_all_groups(a, strip, first, 0, rows, 4);
        return;
    }
    if (2 * rows <= sums && 4 * rows > sums) {
        for (; from + 2 <= a->panels; from += 2) {
            bn_all_groups(a, strip, first, from, rows, 2);
        }
    }
    for (; from < a->panels; from++) {
        bn_all_groups(a, strip, first, from, rows, 1);
    }
}

/* How many of the rows that are left are next: 4 (8), and at the end up to `most` (4, 6 or 8), since
 * one row alone takes the time of two. */
static inline size_t bn_next_rows(size_t left, const size_t most)
{
    if (left <= most) {
        return left;
    }
    return most < 8 ? 4 : left < 12 ? left - 4 : 8;
}

/* All rows, up to `most` at once.  sums as above. */
BN_INLINE void bn_all_rows(const bn_strips *a, bn_strip_fn *strip, const size_t most,
                           const int sums)
{
    for (size_t row = 0, rows; row < a->rows; row += rows) {
        rows = bn_next_rows(a->rows - row, most);
        if (most == 8 && rows == 8) {
            bn_all_panels(a, strip, row, 8, sums);
        } else if (most == 8 && rows == 7) {
            bn_all_panels(a, strip, row, 7, sums);
        } else if (most >= 6 && rows == 6) {
            bn_all_panels(a, strip, row, 6, sums);
        } else if (most >= 6 && rows == 5) {
            bn_all_panels(a, strip, row, 5, sums);
        } else if (rows == 4) {
            bn_all_panels(a, strip, row, 4, sums);
        } else if (rows == 3) {
            bn_all_panels(a, strip, row, 3, sums);
        } else if (rows == 2) {
            bn_all_panels(a, strip, row, 2, sums);
        } else {
            bn_all_panels(a, strip, row, 1, sums);
        }
    }
}

static inline bn_strips bn_dot_strips(const bn_dot_args *a, int bits, size_t longest)
{
    return (bn_strips){a->panel,    (const char *)a->q, (char *)a->acc, sizeof *a->q,
                       a->q_stride, a->rows,            a->panels,      a->steps,
                       a->group_steps, bn_step_bytes(bits), longest, 0};
}

static inline bn_strips bn_dotf_strips(const bn_dotf_args *a, size_t longest)
{
    return (bn_strips){a->panel,    (const char *)a->x, (char *)a->acc, sizeof *a->x,
                       a->x_stride, a->rows,            a->panels,      a->steps,
                       a->group_steps, BN_VECTOR, longest, 0};
}

#endif
