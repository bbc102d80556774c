/* Weights to codes and scales, in passes over the rows of a matrix; see quantize.h.
 *
 * A pass that needs what earlier planes left of the weights computes it again from their steps: that
 * is cheaper than to keep it, and needs no memory. */
#include "quantize.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "dispatch.h"
#include "formats.h"
#include "half.h"
#include "layout.h"

/* A cursor over the groups of rows, with the grid's planes taken off. */
typedef struct {
    bn_rows rows;
    const bn_grid *grid;
    bn_groups groups;
    bn_assign_fn *assign;
    float *rest; /* (k) what the planes leave of a row */
} cursor;

static int open_cursor(cursor *c, const bn_weight *w, const bn_grid *grid, size_t first, size_t last)
{
    c->grid = grid;
    c->groups = bn_make_groups(w->k, grid->block_size);
    c->assign = (bn_assign_fn *)bn_find("assign", "i2s", w->isas)->fn;
    c->rest = malloc(w->k * sizeof *c->rest);
    if (c->rest == NULL)
        return -1;
    if (bn_rows_open(&c->rows, w, first, last)) {
        free(c->rest);
        return -1;
    }
    return 0;
}

static void close_cursor(cursor *c)
{
    bn_rows_close(&c->rows);
    free(c->rest);
}

static const bn_step *step_of(const cursor *c, size_t plane, size_t row)
{
    const size_t at = plane * c->grid->rows + (c->grid->rows == 1 ? 0 : row);
    return c->grid->steps + at * c->groups.count;
}

/* What `planes` planes leave of a row. */
static const float *next_row(cursor *c, size_t row, size_t planes)
{
    const float *w = bn_rows_next(&c->rows, row);
    for (size_t p = 0; p < planes; p++) {
        c->assign(&(bn_assign_args){w, step_of(c, p, row), NULL, c->rest, c->groups});
        w = c->rest;
    }
    return w;
}

int bn_moments(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *moments)
{
    bn_moments_fn *kernel = (bn_moments_fn *)bn_find("moments", "f32", w->isas)->fn;
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes);
        kernel(&(bn_moments_args){x, moments + row * c.groups.count * 3, c.groups});
    }
    close_cursor(&c);
    return 0;
}

int bn_products(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *products)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    products += first * c.groups.count * 2;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes - 1);
        const bn_step *steps = step_of(&c, grid->planes - 1, row);
        for (size_t g = 0; g < c.groups.count; g++, products += 2) {
            const size_t length = bn_group_length(&c.groups, g);
            bn_group_products(x, length, &steps[g], products);
            x += length;
        }
    }
    close_cursor(&c);
    return 0;
}

int bn_histogram(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, uint64_t *count,
                 uint64_t *low)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes);
        for (size_t i = 0; i < w->k; i++) {
            const uint32_t bits = bn_float_bits(x[i]);
            count[bits >> 16]++;
            low[bits >> 16] += bits & 0xffffu;
        }
    }
    close_cursor(&c);
    return 0;
}

int bn_histogram_low(const bn_weight *w, const bn_grid *grid, const int32_t *slot, size_t first,
                     size_t last, uint64_t *count)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes);
        for (size_t i = 0; i < w->k; i++) {
            const uint32_t bits = bn_float_bits(x[i]);
            if (slot[bits >> 16] >= 0)
                count[(size_t)slot[bits >> 16] * BN_BINS + (bits & 0xffffu)]++;
        }
    }
    close_cursor(&c);
    return 0;
}

int bn_assign(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, uint8_t *weight,
              const bn_packed *packed, bn_difference *difference)
{
    const size_t row_bytes = bn_row_bytes(w->k);
    bn_check check;
    cursor c;
    if (bn_check_open(&check, packed, w->type))
        return -1;
    if (open_cursor(&c, w, grid, first, last)) {
        bn_check_close(&check);
        return -1;
    }
    for (size_t row = first; row < last; row++) {
        const float *x = bn_rows_next(&c.rows, row), *left = x;
        for (size_t p = 0; p < grid->planes; p++) {
            uint8_t *bytes = weight + (p * w->n + row) * row_bytes;
            float *rest = p + 1 < grid->planes ? c.rest : NULL;
            c.assign(&(bn_assign_args){left, step_of(&c, p, row), bytes, rest, c.groups});
            left = c.rest;
        }
        bn_check_row(&check, x, row);
    }
    *difference = check.difference;
    close_cursor(&c);
    bn_check_close(&check);
    return 0;
}

/* A cursor over rows that fits steps to each. */
typedef struct {
    cursor at;
    bn_fitter fitter;
    size_t planes;
    bn_step *steps; /* (planes, groups) of a row */
} fitting;

static int open_fitting(fitting *f, const bn_weight *w, const bn_rule *rule, const bn_grid *grid,
                        size_t first, size_t last)
{
    if (open_cursor(&f->at, w, grid, first, last))
        return -1;
    f->planes = grid->planes;
    f->steps = malloc(grid->planes * f->at.groups.count * sizeof *f->steps);
    if (f->steps == NULL || bn_fitter_open(&f->fitter, rule, f->at.groups, w->isas)) {
        free(f->steps);
        close_cursor(&f->at);
        return -1;
    }
    return 0;
}

static void close_fitting(fitting *f)
{
    bn_fitter_close(&f->fitter);
    free(f->steps);
    close_cursor(&f->at);
}

/* Fits the planes of a row x, and writes their codes where `weight` is not NULL.  Returns 0 if a scale cannot
 * be held. */
static int fit_row(fitting *f, const float *x, size_t row, uint8_t *weight)
{
    const size_t groups = f->at.groups.count, row_bytes = bn_row_bytes(f->at.groups.k);
    for (size_t p = 0; p < f->planes; p++) {
        bn_step *steps = f->steps + p * groups;
        uint8_t *bytes = weight == NULL ? NULL : weight + (p * f->at.rows.w->n + row) * row_bytes;
        float *rest = p + 1 < f->planes ? f->at.rest : NULL;
        if (!bn_fit_row(&f->fitter, x, steps))
            return 0;
        f->at.assign(&(bn_assign_args){x, steps, bytes, rest, f->at.groups});
        x = f->at.rest;
    }
    return 1;
}

int bn_fit(const bn_weight *w, const bn_rule *rule, size_t planes, size_t block_size, size_t first,
           size_t last, bn_step *steps, int *held)
{
    fitting f;
    if (open_fitting(&f, w, rule, &(bn_grid){NULL, planes, w->n, block_size}, first, last))
        return -1;
    const size_t groups = f.at.groups.count;
    *held = 1;
    for (size_t row = first; row < last && *held; row++) {
        *held = fit_row(&f, bn_rows_next(&f.at.rows, row), row, NULL);
        for (size_t p = 0; p < planes && *held; p++)
            memcpy(steps + (p * w->n + row) * groups, f.steps + p * groups, groups * sizeof *steps);
    }
    close_fitting(&f);
    return 0;
}

int bn_quantize(const bn_weight *w, const bn_rule *rule, size_t first, size_t last, float *scale,
                uint8_t *weight, const bn_packed *packed, bn_difference *difference, int *held)
{
    const bn_grid grid = {NULL, packed->planes, w->n, packed->block_size};
    bn_check check;
    fitting f;
    if (bn_check_open(&check, packed, w->type))
        return -1;
    if (open_fitting(&f, w, rule, &grid, first, last)) {
        bn_check_close(&check);
        return -1;
    }
    const size_t groups = f.at.groups.count;
    *held = 1;
    for (size_t row = first; row < last && *held; row++) {
        const float *x = bn_rows_next(&f.at.rows, row);
        *held = fit_row(&f, x, row, weight);
        for (size_t p = 0; p < packed->planes && *held; p++)
            for (size_t g = 0; g < groups; g++)
                scale[(p * w->n + row) * groups + g] = f.steps[p * groups + g].scale;
        if (*held)
            bn_check_row(&check, x, row);
    }
    *difference = check.difference;
    close_fitting(&f);
    bn_check_close(&check);
    return 0;
}

/* q + 2^(bits - 1) of one row; adding 1.5 * 2^23 and taking it off rounds half to even. */
static void round_row(const float *w, const bn_groups *groups, const float *factor, int bits,
                      uint8_t *digits)
{
    const float half = (float)(1 << (bits - 1));
    const float magic = 12582912.0f;
    for (size_t g = 0; g < groups->count; g++) {
        const size_t length = bn_group_length(groups, g);
        for (size_t i = 0; i < length; i++) {
            const float scaled = w[i] * factor[g];
            const float above = scaled < -half ? -half : scaled;
            const float inside = above > half - 1 ? half - 1 : above;
            digits[i] = (uint8_t)(int)((inside + magic) - magic + half);
        }
        digits += length;
        w += length;
    }
}

int bn_assign_integer(const bn_weight *w, const float *factor, size_t rows, int bits, size_t first,
                      size_t last, uint8_t *weight, const bn_packed *packed,
                      bn_difference *difference)
{
    const bn_groups groups = bn_make_groups(w->k, packed->block_size);
    const size_t row_bytes = bn_row_bytes(w->k);
    uint8_t *digits = malloc(2 * w->k);
    bn_check check;
    bn_rows source;
    if (digits == NULL)
        return -1;
    uint8_t *codes = digits + w->k;
    if (bn_check_open(&check, packed, w->type)) {
        free(digits);
        return -1;
    }
    const int opened = bn_rows_open(&source, w, first, last);
    for (size_t row = first; row < last && opened == 0; row++) {
        const float *x = bn_rows_next(&source, row);
        round_row(x, &groups, factor + (rows == 1 ? 0 : row) * groups.count, bits, digits);
        for (int shift = bits - 2, p = 0; shift >= 0; shift -= 2, p++) {
            for (size_t i = 0; i < w->k; i++)
                codes[i] = digits[i] >> shift & 3;
            bn_pack_i2s(codes, w->k, weight + ((size_t)p * w->n + row) * row_bytes);
        }
        bn_check_row(&check, x, row);
    }
    *difference = check.difference;
    if (opened == 0)
        bn_rows_close(&source);
    bn_check_close(&check);
    free(digits);
    return opened;
}
