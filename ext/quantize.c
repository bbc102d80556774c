/* Weights to codes and scales, in passes over the rows of a matrix; see quantize.h.
 *
 * A pass that needs what earlier planes left of the weights computes it again from their steps: that
 * is cheaper than to keep it, and needs no memory.  Sums run in eight lanes of a fixed order. */
#include "quantize.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "formats.h"
#include "half.h"
#include "layout.h"
#include "least_squares.h"

enum { LANES = 8 };

/* A cursor over the groups of rows, with the grid's planes taken off. */
typedef struct {
    bn_rows rows;
    const bn_grid *grid;
    bn_groups groups;
} cursor;

static int open_cursor(cursor *c, const bn_weight *w, const bn_grid *grid, size_t first, size_t last)
{
    c->grid = grid;
    c->groups = bn_make_groups(w->k, grid->block_size);
    return bn_rows_open(&c->rows, w, first, last);
}

static const bn_step *step_of(const bn_grid *grid, const bn_groups *groups, size_t plane, size_t row)
{
    const size_t at = plane * grid->rows + (grid->rows == 1 ? 0 : row);
    return grid->steps + at * groups->count;
}

static inline float level(float w, const bn_step *s)
{
    const float scaled = w * s->factor;
    return (float)((scaled > s->low) + (scaled > s->high) - (scaled < -s->low));
}

/* Takes the levels of one plane off a row. */
static void take_off(float *w, const bn_groups *groups, const bn_step *steps)
{
    for (size_t g = 0; g < groups->count; g++) {
        const bn_step step = steps[g];
        const size_t length = bn_group_length(groups, g);
        for (size_t i = 0; i < length; i++)
            w[i] -= step.scale * level(w[i], &step);
        w += length;
    }
}

static float *next_row(cursor *c, size_t row, size_t planes)
{
    float *w = bn_rows_next(&c->rows, row);
    for (size_t p = 0; p < planes; p++)
        take_off(w, &c->groups, step_of(c->grid, &c->groups, p, row));
    return w;
}

static double sum_lanes(const double lane[LANES])
{
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

static void group_moments(const float *w, size_t count, double *moments)
{
    double sum[LANES] = {0};
    float least[LANES], most[LANES];
    size_t i = 0;
    for (size_t j = 0; j < LANES; j++)
        least[j] = most[j] = w[0];
    for (; i + LANES <= count; i += LANES)
        for (size_t j = 0; j < LANES; j++) {
            sum[j] += (double)fabsf(w[i + j]);
            least[j] = w[i + j] < least[j] ? w[i + j] : least[j];
            most[j] = w[i + j] > most[j] ? w[i + j] : most[j];
        }
    for (; i < count; i++) {
        sum[i % LANES] += (double)fabsf(w[i]);
        least[0] = w[i] < least[0] ? w[i] : least[0];
        most[0] = w[i] > most[0] ? w[i] : most[0];
    }
    for (size_t j = 1; j < LANES; j++) {
        least[0] = least[j] < least[0] ? least[j] : least[0];
        most[0] = most[j] > most[0] ? most[j] : most[0];
    }
    moments[0] = sum_lanes(sum);
    moments[1] = (double)least[0];
    moments[2] = (double)most[0];
}

int bn_moments(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *moments)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    moments += first * c.groups.count * 3;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes);
        for (size_t g = 0; g < c.groups.count; g++, moments += 3) {
            const size_t length = bn_group_length(&c.groups, g);
            group_moments(x, length, moments);
            x += length;
        }
    }
    bn_rows_close(&c.rows);
    return 0;
}

static void group_products(const float *w, size_t count, const bn_step *step, double *products)
{
    double a[LANES] = {0}, b[LANES] = {0};
    for (size_t i = 0; i < count; i++) {
        const float t = level(w[i], step);
        a[i % LANES] += (double)(w[i] * step->factor) * (double)t;
        b[i % LANES] += (double)(t * t);
    }
    products[0] = sum_lanes(a);
    products[1] = sum_lanes(b);
}

int bn_products(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, double *products)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    products += first * c.groups.count * 2;
    for (size_t row = first; row < last; row++) {
        const float *x = next_row(&c, row, grid->planes - 1);
        const bn_step *steps = step_of(grid, &c.groups, grid->planes - 1, row);
        for (size_t g = 0; g < c.groups.count; g++, products += 2) {
            const size_t length = bn_group_length(&c.groups, g);
            group_products(x, length, &steps[g], products);
            x += length;
        }
    }
    bn_rows_close(&c.rows);
    return 0;
}

int bn_least_squares(const bn_weight *w, const bn_grid *grid, int levels, size_t first, size_t last,
                     float *scale)
{
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    uint32_t *keys = malloc(2 * c.groups.length * sizeof *keys);
    scale += first * c.groups.count;
    for (size_t row = first; row < last && keys != NULL; row++) {
        const float *x = next_row(&c, row, grid->planes);
        for (size_t g = 0; g < c.groups.count; g++) {
            const size_t length = bn_group_length(&c.groups, g);
            *scale++ = bn_best_scale(x, length, levels, keys);
            x += length;
        }
    }
    bn_rows_close(&c.rows);
    free(keys);
    return keys == NULL ? -1 : 0;
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
    bn_rows_close(&c.rows);
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
    bn_rows_close(&c.rows);
    return 0;
}

/* Writes the codes of one row and plane, and leaves in w what they do not cover. */
static void assign_row(float *w, const bn_groups *groups, const bn_step *steps, uint8_t *codes)
{
    for (size_t g = 0; g < groups->count; g++) {
        const bn_step step = steps[g];
        const size_t length = bn_group_length(groups, g);
        for (size_t i = 0; i < length; i++)
            codes[i] = (uint8_t)(int)(level(w[i], &step) + 1.0f);
        codes += length;
        w += length;
    }
}

int bn_assign(const bn_weight *w, const bn_grid *grid, size_t first, size_t last, uint8_t *packed)
{
    const size_t row_bytes = bn_row_bytes(w->k);
    cursor c;
    if (open_cursor(&c, w, grid, first, last))
        return -1;
    uint8_t *codes = malloc(w->k);
    for (size_t row = first; row < last && codes != NULL; row++) {
        float *x = bn_rows_next(&c.rows, row);
        for (size_t p = 0; p < grid->planes; p++) {
            const bn_step *steps = step_of(grid, &c.groups, p, row);
            assign_row(x, &c.groups, steps, codes);
            bn_pack_i2s(codes, w->k, packed + (p * w->n + row) * row_bytes);
            if (p + 1 < grid->planes)
                take_off(x, &c.groups, steps);
        }
    }
    bn_rows_close(&c.rows);
    free(codes);
    return codes == NULL ? -1 : 0;
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

int bn_assign_integer(const bn_weight *w, const float *factor, size_t rows, size_t block_size,
                      int bits, size_t first, size_t last, uint8_t *packed)
{
    const bn_groups groups = bn_make_groups(w->k, block_size);
    const size_t row_bytes = bn_row_bytes(w->k);
    bn_rows source;
    if (bn_rows_open(&source, w, first, last))
        return -1;
    uint8_t *digits = malloc(2 * w->k);
    for (size_t row = first; row < last && digits != NULL; row++) {
        const float *x = bn_rows_next(&source, row);
        uint8_t *codes = digits + w->k;
        round_row(x, &groups, factor + (rows == 1 ? 0 : row) * groups.count, bits, digits);
        for (int shift = bits - 2, p = 0; shift >= 0; shift -= 2, p++) {
            for (size_t i = 0; i < w->k; i++)
                codes[i] = digits[i] >> shift & 3;
            bn_pack_i2s(codes, w->k, packed + ((size_t)p * w->n + row) * row_bytes);
        }
    }
    bn_rows_close(&source);
    free(digits);
    return digits == NULL ? -1 : 0;
}
