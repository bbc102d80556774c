/* Canonical bytes to values and errors.  See quantize.h and check.h. */
#include <stdlib.h>

#include "check.h"
#include "dispatch.h"
#include "layout.h"

static bn_decode_fn *find_decode(const bn_packed *packed)
{
    return (bn_decode_fn *)bn_find("decode", "i2s", packed->isas)->fn;
}

static void decode_row(const bn_packed *packed, const bn_groups *groups, bn_decode_fn *decode,
                       size_t row, float *out)
{
    for (size_t p = 0; p < packed->planes; p++) {
        const size_t at = (p * packed->rows + (packed->rows == 1 ? 0 : row)) * groups->count;
        const uint8_t *bytes = packed->weight + (p * packed->n + row) * bn_row_bytes(packed->k);
        decode(&(bn_decode_args){bytes, packed->scale + at, packed->zero_point + at, out, *groups,
                                 p != 0});
    }
}

void bn_dequantize(const bn_packed *packed, size_t first, size_t last, float *out)
{
    const bn_groups groups = bn_make_groups(packed->k, packed->block_size);
    bn_decode_fn *decode = find_decode(packed);
    for (size_t row = first; row < last; row++, out += packed->k)
        decode_row(packed, &groups, decode, row, out);
}

int bn_check_open(bn_check *check, const bn_packed *packed, bn_weight_type type)
{
    check->packed = packed;
    check->groups = bn_make_groups(packed->k, packed->block_size);
    check->decode = find_decode(packed);
    check->compare = (bn_compare_fn *)bn_find("compare", "f32", packed->isas)->fn;
    check->type = type;
    check->decoded = malloc(packed->k * sizeof *check->decoded);
    check->difference = (bn_difference){0};
    return check->decoded == NULL ? -1 : 0;
}

void bn_check_row(bn_check *check, const float *w, size_t row)
{
    const size_t k = check->packed->k;
    bn_difference *difference = &check->difference;
    bn_compare_args a = {w, check->decoded, k, 0, 0, 0};
    decode_row(check->packed, &check->groups, check->decode, row, check->decoded);
    check->compare(&a);
    difference->error += a.error;
    difference->signal += a.signal;
    difference->zeros += a.zeros;
    if (difference->different || a.error == 0)
        return;
    bn_weight_round(check->type, check->decoded, k);
    for (size_t i = 0; i < k; i++)
        difference->different |= w[i] != check->decoded[i];
}

void bn_check_close(bn_check *check)
{
    free(check->decoded);
}
