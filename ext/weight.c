/* Reading weights of any type and strides as rows of float32, see weight.h. */
#include "weight.h"

#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "half.h"
#include "layout.h"

enum {
    /* Rows of a transposed matrix that are loaded together: 256 bytes of float32 at a time, which is twice as
     * fast as cache lines one by one. */
    PANEL = 64,
    TILE = 16, /* inputs that are transposed together, and how many ahead memory is asked for */
    CACHE_LINE = 64,
    ROOM = PANEL + CACHE_LINE / sizeof(uint16_t) /* no panel has more rows */
};

#if defined(__GNUC__)
#define BN_READ_AHEAD(p) __builtin_prefetch(p, 0, 2)
#else
#define BN_READ_AHEAD(p) ((void)(p))
#endif

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

static float load(bn_weight_type type, const char *p)
{
    float value;
    if (type == BN_WEIGHT_FLOAT16)
        return bn_half_to_float(load_u16(p));
    if (type == BN_WEIGHT_BFLOAT16)
        return bn_bfloat16_to_float(load_u16(p));
    memcpy(&value, p, sizeof value);
    return value;
}

static int is_aligned(const char *p, size_t size)
{
    return (uintptr_t)p % size == 0;
}

/* Whether float32 at p and every `stride` bytes on can be read as what it is. */
static int is_float_matrix(const char *p, ptrdiff_t stride)
{
    return is_aligned(p, sizeof(float)) && stride % (ptrdiff_t)sizeof(float) == 0;
}

/* Converts `count` elements that lie `stride` bytes apart. */
static void convert(const bn_rows *rows, const char *src, ptrdiff_t stride, size_t count, float *dst)
{
    const bn_weight_type type = rows->w->type;
    const int dense = stride == (ptrdiff_t)item_size(type);
    if (dense && type == BN_WEIGHT_FLOAT32)
        memcpy(dst, src, count * sizeof *dst);
    else if (dense && type == BN_WEIGHT_BFLOAT16)
        for (size_t i = 0; i < count; i++)
            dst[i] = bn_bfloat16_to_float(load_u16(src + 2 * i));
    else if (dense && is_aligned(src, sizeof(uint16_t)))
        rows->widen(&(bn_widen_args){(const uint16_t *)(const void *)src, dst, count});
    else
        for (size_t i = 0; i < count; i++)
            dst[i] = load(type, src + (ptrdiff_t)i * stride);
}

int bn_rows_open(bn_rows *rows, const bn_weight *w, size_t first, size_t last)
{
    const size_t size = item_size(w->type);
    const int whole = w->col_stride == (ptrdiff_t)size; /* rows lie whole in memory */
    const int direct = whole && w->type == BN_WEIGHT_FLOAT32 && is_float_matrix(w->data, w->row_stride);
    rows->w = w;
    rows->widen = (bn_widen_fn *)bn_find("widen", "f16", w->isas)->fn;
    rows->transpose = (bn_transpose_fn *)bn_find("transpose", "f32", w->isas)->fn;
    rows->stride = bn_round_up(w->k, 16) + 16; /* no power of two, which would crowd few cache sets */
    rows->whole = whole;
    rows->loaded = rows->next = first;
    rows->last = last;
    rows->buffer = direct ? NULL : malloc((whole ? 1 : ROOM) * rows->stride * sizeof(float));
    return rows->buffer == NULL && !direct ? -1 : 0;
}

/* Asks for bytes of a later input: reads far apart are nothing that a CPU foresees.  They go to the second-level
 * cache; strides are often a power of two, which leaves so few sets of the first that they would be lost. */
static void read_ahead(const char *src, size_t bytes)
{
    for (const char *line = src - (uintptr_t)src % CACHE_LINE; line < src + bytes; line += CACHE_LINE)
        BN_READ_AHEAD(line);
}

/* How many rows to load from the one at src on, of which `left` are left: up to the end of a cache line, so that none
 * is read for two panels, where all inputs lie alike on theirs; a few more at the end. */
static size_t panel_rows(const char *src, size_t size, size_t left)
{
    const size_t rows = PANEL - (uintptr_t)src % CACHE_LINE / size;
    return left < rows + CACHE_LINE / size ? left : rows;
}

/* Loads `count` rows from src on, some inputs at a time; float32 from where it lies. */
static void load_panel(bn_rows *rows, const char *src, size_t count)
{
    const bn_weight *w = rows->w;
    const int dense = w->row_stride == (ptrdiff_t)item_size(w->type);
    const int direct = dense && w->type == BN_WEIGHT_FLOAT32 && w->col_stride > 0 &&
                       is_float_matrix(src, w->col_stride);
    float tile[TILE][ROOM];
    for (size_t col = 0; col < w->k; col += TILE, src += TILE * w->col_stride) {
        const size_t cols = w->k - col < TILE ? w->k - col : TILE;
        for (size_t i = 0; dense && col + i + TILE < w->k && i < TILE; i++)
            read_ahead(src + (ptrdiff_t)(i + TILE) * w->col_stride, count * item_size(w->type));
        for (size_t i = 0; !direct && i < cols; i++)
            convert(rows, src + (ptrdiff_t)i * w->col_stride, w->row_stride, count, tile[i]);
        const float *x = direct ? (const float *)(const void *)src : tile[0];
        const size_t stride = direct ? (size_t)w->col_stride / sizeof(float) : ROOM;
        rows->transpose(&(bn_transpose_args){x, rows->buffer + col, stride, rows->stride, cols, count});
    }
}

const float *bn_rows_next(bn_rows *rows, size_t row)
{
    const bn_weight *w = rows->w;
    const char *src = w->data + (ptrdiff_t)row * w->row_stride;
    if (rows->buffer == NULL)
        return (const float *)(const void *)src;
    if (rows->whole) {
        convert(rows, src, w->col_stride, w->k, rows->buffer);
        return rows->buffer;
    }
    if (row == rows->next) {
        const size_t count = panel_rows(src, item_size(w->type), rows->last - row);
        load_panel(rows, src, count);
        rows->loaded = row;
        rows->next = row + count;
    }
    return rows->buffer + (row - rows->loaded) * rows->stride;
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
    int32_t most = 0, other = 0; /* signed, which more instruction sets compare */
    for (size_t i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(bn_float_bits(x[i]) & 0x7fffffffu);
        most = magnitude > most ? magnitude : most;
    }
    for (size_t i = 0; i < count; i++) {
        const int32_t magnitude = (int32_t)(bn_float_bits(x[i]) & 0x7fffffffu);
        other |= (magnitude != 0) & (magnitude != most);
    }
    return other || most >= 0x7f800000 ? -1.0f : bn_float_from_bits((uint32_t)most);
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
