/* Canonical bytes to values and errors.  See quantize.h. */
#include <stdlib.h>

#include "formats.h"
#include "layout.h"
#include "quantize.h"

static void decode_row(const bn_packed *packed, const bn_groups *groups, size_t row, uint8_t *codes,
                       float *out)
{
    const size_t row_bytes = bn_row_bytes(packed->k);
    for (size_t p = 0; p < packed->planes; p++) {
        const size_t at = (p * packed->rows + (packed->rows == 1 ? 0 : row)) * groups->count;
        bn_unpack_i2s(packed->weight + (p * packed->n + row) * row_bytes, packed->k, codes);
        for (size_t g = 0, i = 0; g < groups->count; g++) {
            const size_t stop = i + bn_group_length(groups, g);
            const float scale = packed->scale[at + g], zero_point = packed->zero_point[at + g];
            for (; i < stop; i++) {
                const float value = ((float)codes[i] - zero_point) * scale;
                out[i] = p == 0 ? value : out[i] + value;
            }
        }
    }
}

int bn_dequantize(const bn_packed *packed, size_t first, size_t last, float *out)
{
    const bn_groups groups = bn_make_groups(packed->k, packed->block_size);
    uint8_t *codes = malloc(packed->k);
    if (codes == NULL)
        return -1;
    for (size_t row = first; row < last; row++, out += packed->k)
        decode_row(packed, &groups, row, codes, out);
    free(codes);
    return 0;
}

static void compare_row(bn_weight_type type, const float *w, float *decoded, size_t k,
                        bn_difference *difference)
{
    enum { LANES = 8 };
    double error[LANES] = {0}, signal[LANES] = {0};
    uint32_t zeros = 0;
    for (size_t i = 0; i < k; i += LANES) {
        const size_t lanes = k - i < LANES ? k - i : LANES;
        for (size_t j = 0; j < lanes; j++) {
            const double delta = (double)w[i + j] - (double)decoded[i + j];
            error[j] += delta * delta;
            signal[j] += (double)w[i + j] * (double)w[i + j];
        }
    }
    for (size_t i = 0; i < k; i++)
        zeros += decoded[i] == 0;
    for (size_t j = 0; j < LANES; j++) {
        difference->error += error[j];
        difference->signal += signal[j];
    }
    difference->zeros += zeros;
    if (difference->different)
        return;
    bn_weight_round(type, decoded, k);
    for (size_t i = 0; i < k; i++)
        difference->different |= w[i] != decoded[i];
}

int bn_compare(const bn_weight *w, const bn_packed *packed, size_t first, size_t last,
               bn_difference *difference)
{
    const bn_groups groups = bn_make_groups(w->k, packed->block_size);
    uint8_t *codes = malloc(w->k);
    float *decoded = malloc(w->k * sizeof *decoded);
    bn_rows rows;
    const int opened = bn_rows_open(&rows, w, first, last);
    const int failed = codes == NULL || decoded == NULL || opened != 0;
    *difference = (bn_difference){0};
    for (size_t row = first; row < last && !failed; row++) {
        const float *x = bn_rows_next(&rows, row);
        decode_row(packed, &groups, row, codes, decoded);
        compare_row(w->type, x, decoded, w->k, difference);
    }
    if (opened == 0)
        bn_rows_close(&rows);
    free(decoded);
    free(codes);
    return failed ? -1 : 0;
}
