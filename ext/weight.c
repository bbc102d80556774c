/* Reading weights of any type and strides as rows of float32, see weight.h. */
#include "weight.h"

#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "layout.h"

enum { CACHE_LINE = 64 };

static size_t item_size(bn_weight_type type)
{
    return type == BN_WEIGHT_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
}

static uint16_t load_u16(const char *p)
{
    uint16_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static float load_f32(const char *p)
{
    float value;
    memcpy(&value, p, sizeof value);
    return value;
}

/* Converts `count` elements that lie `stride` bytes apart.  The dense case is spelled out so that the
 * compiler vectorizes it. */
static void convert(bn_weight_type type, const char *src, ptrdiff_t stride, size_t count, float *dst)
{
    const int dense = stride == (ptrdiff_t)item_size(type);
    if (type == BN_WEIGHT_FLOAT32) {
        if (dense) {
            memcpy(dst, src, count * sizeof(float));
            return;
        }
        for (size_t i = 0; i < count; i++)
            dst[i] = load_f32(src + (ptrdiff_t)i * stride);
    } else if (type == BN_WEIGHT_FLOAT16) {
        if (dense)
            for (size_t i = 0; i < count; i++)
                dst[i] = bn_half_to_float(load_u16(src + 2 * i));
        else
            for (size_t i = 0; i < count; i++)
                dst[i] = bn_half_to_float(load_u16(src + (ptrdiff_t)i * stride));
    } else {
        if (dense)
            for (size_t i = 0; i < count; i++)
                dst[i] = bn_bfloat16_to_float(load_u16(src + 2 * i));
        else
            for (size_t i = 0; i < count; i++)
                dst[i] = bn_bfloat16_to_float(load_u16(src + (ptrdiff_t)i * stride));
    }
}

int bn_rows_open(bn_rows *rows, const bn_weight *w, size_t first, size_t last)
{
    const size_t size = item_size(w->type);
    /* Rows that lie whole in memory are read one by one.  In a transposed matrix each cache line holds
     * the same input of neighbouring outputs: as many rows are loaded as there are in a line. */
    rows->w = w;
    rows->panel = w->col_stride == (ptrdiff_t)size ? 1 : CACHE_LINE / size;
    rows->stride = bn_round_up(w->k, 16) + 16; /* no power of two, which would crowd few cache sets */
    rows->loaded = first;
    rows->last = last;
    rows->buffer = malloc(rows->panel * rows->stride * sizeof(float));
    return rows->buffer == NULL ? -1 : 0;
}

/* Loads `count` rows from `row` on, input by input. */
static void load_panel(bn_rows *rows, size_t row, size_t count)
{
    const bn_weight *w = rows->w;
    const char *src = w->data + (ptrdiff_t)row * w->row_stride;
    float line[CACHE_LINE / sizeof(uint16_t)];
    for (size_t col = 0; col < w->k; col++) {
        convert(w->type, src + (ptrdiff_t)col * w->col_stride, w->row_stride, count, line);
        for (size_t i = 0; i < count; i++)
            rows->buffer[i * rows->stride + col] = line[i];
    }
}

float *bn_rows_next(bn_rows *rows, size_t row)
{
    const bn_weight *w = rows->w;
    if (rows->panel == 1) {
        convert(w->type, w->data + (ptrdiff_t)row * w->row_stride, w->col_stride, w->k, rows->buffer);
        return rows->buffer;
    }
    const size_t at = (row - rows->loaded) % rows->panel;
    if (at == 0) {
        const size_t left = rows->last - row;
        load_panel(rows, row, left < rows->panel ? left : rows->panel);
    }
    return rows->buffer + at * rows->stride;
}

void bn_rows_close(bn_rows *rows)
{
    free(rows->buffer);
}

void bn_weight_round(bn_weight_type type, float *values, size_t count)
{
    if (type == BN_WEIGHT_FLOAT16)
        for (size_t i = 0; i < count; i++)
            values[i] = bn_half_to_float(bn_float_to_half(values[i]));
    else if (type == BN_WEIGHT_BFLOAT16)
        for (size_t i = 0; i < count; i++)
            values[i] = bn_bfloat16_to_float(bn_float_to_bfloat16(values[i]));
}

static int is_finite(float value)
{
    return (bn_float_bits(value) & 0x7f800000u) != 0x7f800000u;
}

int bn_weight_nonfinite(const bn_weight *w, size_t first, size_t last, size_t *count,
                        size_t where[2])
{
    bn_rows rows;
    if (bn_rows_open(&rows, w, first, last))
        return -1;
    *count = 0;
    for (size_t row = first; row < last; row++) {
        const float *x = bn_rows_next(&rows, row);
        uint32_t bad = 0; /* k is below 2^32: K is checked when a layer is made */
        for (size_t i = 0; i < w->k; i++)
            bad += !is_finite(x[i]);
        if (bad != 0 && *count == 0) {
            where[0] = row;
            where[1] = 0;
            while (is_finite(x[where[1]]))
                where[1]++;
        }
        *count += bad;
    }
    bn_rows_close(&rows);
    return 0;
}

/* Returns s if all weights are -s, 0 or s, and -1 otherwise. */
static float common_magnitude(const float *x, size_t count)
{
    uint32_t most = 0, other = 0;
    for (size_t i = 0; i < count; i++) {
        const uint32_t magnitude = bn_float_bits(x[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
    }
    for (size_t i = 0; i < count; i++) {
        const uint32_t magnitude = bn_float_bits(x[i]) & 0x7fffffffu;
        other |= (magnitude != 0) & (magnitude != most);
    }
    return other || most >= 0x7f800000u ? -1.0f : bn_float_from_bits(most);
}

int bn_weight_magnitudes(const bn_weight *w, size_t first, size_t last, float *magnitude,
                         int *ternary)
{
    const size_t blocks = (w->k - 1) / BN_MAGNITUDE_BLOCK + 1;
    bn_rows rows;
    if (bn_rows_open(&rows, w, first, last))
        return -1;
    *ternary = 1;
    for (size_t row = first; row < last && *ternary; row++) {
        const float *x = bn_rows_next(&rows, row);
        for (size_t block = 0; block < blocks && *ternary; block++) {
            const size_t start = block * BN_MAGNITUDE_BLOCK;
            const size_t left = w->k - start;
            const float s =
                common_magnitude(x + start, left < BN_MAGNITUDE_BLOCK ? left : BN_MAGNITUDE_BLOCK);
            magnitude[row * blocks + block] = s;
            *ternary = s >= 0;
        }
    }
    bn_rows_close(&rows);
    return 0;
}
