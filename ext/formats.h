/* Canonical bytes: what a row of codes is in a file, on every machine.  A code is a trit t plus 1,
 * so 0..2; i2s has a fourth, 3.  Past the last input of a row everything stands for code 1.
 *
 *     i2s  4 codes to a byte, see layout.h
 *     tl1  a pair p = 3 c0 + c1 (0..8) in 4 bits, the first in the low ones: 2 pairs to a byte
 *     tl2  a triple v = 9 c0 + 3 c1 + c2 - 13 (-13..13) in 5 bits: first |v| of all triples in 4 bits
 *          each, the first in the low ones; then, from a new byte on, a bit for each triple, lowest
 *          first, that is 1 where v < 0
 *     t5   5 codes to a byte, c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4
 *
 * Every row of codes has exactly one row of bytes; unpack refuses all others.  Kernels know none of
 * this: they read panels, which are the same for all formats. */
#ifndef BN_FORMATS_H
#define BN_FORMATS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
#define BN_FORMAT(name, op, four_levels) BN_FORMAT_##name,
#include "formats.inc"
#undef BN_FORMAT
    BN_FORMAT_COUNT
} bn_format;

typedef struct {
    const char *name, *op_type;
    bool four_levels; /* if not, zero points are 1 and the op has no input for them */
    size_t (*row_bytes)(size_t k);

    /* One row.  Both fill the whole of their output whatever they are given, and return NULL or the
     * reason why the codes cannot be packed or the bytes are not canonical. */
    const char *(*pack)(const uint8_t *codes, size_t k, uint8_t *row);
    const char *(*unpack)(const uint8_t *row, size_t k, uint8_t *codes);
} bn_format_info;

extern const bn_format_info bn_formats[BN_FORMAT_COUNT];

/* A row of i2s without judging it, and why one is not canonical (NULL if it is) without unpacking
 * it. */
void bn_pack_i2s(const uint8_t *codes, size_t k, uint8_t *row);
void bn_unpack_i2s(const uint8_t *row, size_t k, uint8_t *codes);
const char *bn_i2s_check(const uint8_t *row, size_t k);

#endif
