/* dot, AMX, with codes of 2, 4 and 8 bits.
 *
 * Layout   A field, 4 inputs of 16 outputs (layout.h), spread to bytes, is a row of a tile: the four fields of
 *          step s are rows 4s .. 4s + 3, and four steps make a tile of 64 inputs x 16 outputs as tdpbsud
 *          wants it: signed activations (16 rows x 64 inputs) times unsigned codes.
 * Numbers  tdpbsud does not saturate, and all sums fit 32 bits (BN_MAX_GROUP and BN_MAX_WIDE_GROUP in
 *          layout.h).
 * Method   32 rows x 32 outputs, or up to 16 rows x 64, stay in four tiles of sums while two or one tiles
 *          of activations and two of codes pass by.  Codes are unpacked into a ring on the stack, BN_AHEAD
 *          chunks of 64 inputs before they are multiplied, since a tile cannot be loaded from a store that
 *          is under way; unpacking stands between the products, so that both go on at once.  Chunks lie one
 *          behind the other: with two columns a tile is not loaded while a store is under way 4 KB from it,
 *          which Intel's cores take for the same place at first.  Where a group has less than 64 inputs
 *          left, codes of 0 fill the tile, and activations are copied, so that nothing is read behind them.
 * Few rows A code fills a byte of a tile, so 64 inputs x 64 outputs take 64 stores, one per cycle, however
 *          few the rows are.  avx512vnni takes 64 cycles for one row and 56 + 32 for each of several: fewer
 *          than BN_FEW are left to it, and so are those past the last 32.
 * Counted  Cycles that each unit of an Intel core takes at least for 64 x 64 codes of 2 bits
 *          (bench/ports.py):
 *
 *              rows      products   stores   loads   shifts and masks   all instructions
 *              3          36         66       57      56                 60
 *              16         64         66       57      56                 60
 *              32        128         68       86      56                 75
 *
 *          So 16 rows are bound by stores and products alike, and more by products; gf2p8affineqb instead of
 *          shifts and masks would save nothing but 48 instructions.  No CPU with AMX was at hand: checked in
 *          an emulation (tests/kernels/test_amx.py) and never timed.  A first trial of this loop, which was
 *          timed at 3.5 GHz on one, unpacked one chunk of two columns ahead and took 95 cycles for it
 *          whatever the rows were, 4 to 32: a product's 52, the store, and 45 to load the tile again.
 */
#ifndef BN_DOT_AMX_H
#define BN_DOT_AMX_H

#include "strips.h"
#include "tiles.h"

enum {
    BN_FEW = 3,   /* rows from which on AMX is faster */
    BN_DEPTH = 4, /* steps in a tile, 64 inputs */
    BN_ROWS = 16, /* of activations in a tile */
    BN_TILE = 1024,
    BN_COLUMNS = 4, /* of 16 outputs, side by side */
    BN_AHEAD = 2,
    BN_RING = 4 /* chunks */
};

/* Tile registers: sums 0 .. 3, activations 4 and 5, codes 6 and 7. */
static bn_tile_config bn_configure(size_t rows, size_t depth)
{
    const size_t second = rows > BN_ROWS ? rows - BN_ROWS : rows; /* of tiles 2, 3 and 5 */
    const size_t first = rows > BN_ROWS ? BN_ROWS : rows;
    const size_t tile_rows[] = {first, first, second, second, first, second, 4 * depth, 4 * depth};
    bn_tile_config config = {.palette = 1};

    for (int tile = 0; tile < 8; tile++) {
        const int is_activations = tile == 4 || tile == 5;
        config.rows[tile] = (uint8_t)tile_rows[tile];
        config.row_bytes[tile] = (uint16_t)(is_activations ? depth * BN_STEP : BN_VECTOR);
    }
    return config;
}

static inline size_t bn_smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How the inputs are cut: chunks of `depth` steps, of which the last one of a group may have fewer. */
typedef struct {
    size_t depth, group_steps, end;
} bn_cut;

typedef struct {
    size_t step, steps; /* the first one, and how many; 0 behind the last chunk */
    size_t group_end;
} bn_chunk;

BN_INLINE bn_chunk bn_first_chunk(const bn_cut *cut)
{
    const size_t group_end = bn_smaller(cut->group_steps, cut->end);
    return (bn_chunk){0, bn_smaller(cut->depth, group_end), group_end};
}

BN_INLINE void bn_advance(const bn_cut *cut, bn_chunk *chunk)
{
    chunk->step += chunk->steps;
    if (chunk->step == chunk->group_end) {
        chunk->group_end = bn_smaller(chunk->group_end + cut->group_steps, cut->end);
    }
    chunk->steps = bn_smaller(cut->depth, chunk->group_end - chunk->step);
}

/* One column of each of `steps` steps to bytes, then zeros up to `depth` steps. */
BN_INLINE void bn_unpack(const uint8_t *panel, size_t stride, size_t steps, size_t depth,
                         uint8_t *tile, const int bits)
{
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));

#pragma GCC unroll 4
    for (size_t step = 0; step < steps; step++, panel += stride, tile += 4 * BN_VECTOR) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < bits / 2; i++) {
            codes[i] = _mm512_loadu_si512(panel + i * BN_VECTOR);
            _mm_prefetch((const char *)(panel + i * BN_VECTOR + BN_PREFETCH), _MM_HINT_T0);
        }
#pragma GCC unroll 4
        for (int field = 0; field < 4; field++) {
            const __m512i moved = _mm512_srli_epi16(codes[field * bits / 8], field * bits % 8);
            _mm512_store_si512(tile + field * BN_VECTOR,
                               bits == 8 ? moved : _mm512_and_si512(moved, mask));
        }
    }
    for (size_t step = steps; step < depth; step++, tile += 4 * BN_VECTOR) {
        memset(tile, 0, 4 * BN_VECTOR);
    }
}

/* Codes of some columns, unpacked in order, column after column of each chunk. */
typedef struct {
    const bn_cut *cut;
    size_t stride;        /* bytes of the panel from step to step */
    size_t slot_bytes;    /* of the ring: the tiles of a chunk */
    uint8_t *ring;        /* (BN_RING, slot_bytes) */
    bn_chunk chunk;       /* the one that is unpacked next, */
    const uint8_t *panel; /* where it is */
    size_t slot;          /* and where it goes */
} bn_codes;

BN_INLINE void bn_unpack_column(const bn_codes *c, size_t column, const int bits)
{
    const uint8_t *panel = c->panel + column * bn_step_bytes(bits);
    uint8_t *tile = c->ring + c->slot + column * BN_TILE;

    if (c->chunk.steps == BN_DEPTH) {
        bn_unpack(panel, c->stride, BN_DEPTH, BN_DEPTH, tile, bits);
    } else if (c->chunk.steps > 0) {
        bn_unpack(panel, c->stride, c->chunk.steps, c->cut->depth, tile, bits);
    }
}

BN_INLINE size_t bn_next_slot(const bn_codes *c, size_t slot)
{
    return slot + c->slot_bytes == BN_RING * c->slot_bytes ? 0 : slot + c->slot_bytes;
}

BN_INLINE void bn_next_chunk(bn_codes *c)
{
    c->panel += c->chunk.steps * c->stride;
    c->slot = bn_next_slot(c, c->slot);
    bn_advance(c->cut, &c->chunk);
}

/* The activations of a chunk: where they lie, or copied if fewer than `depth` steps are left. */
typedef struct {
    const int8_t *q;
    size_t stride;
} bn_activations;

BN_INLINE bn_activations bn_find_activations(const int8_t *q, size_t stride, size_t rows,
                                             const bn_chunk *chunk, size_t depth, int8_t *copy)
{
    q += chunk->step * BN_STEP;
    if (chunk->steps == depth) {
        return (bn_activations){q, stride};
    }
    for (size_t i = 0; i < rows; i++) {
        const __mmask64 real = (UINT64_C(1) << chunk->steps * BN_STEP) - 1;
        _mm512_store_si512(copy + i * BN_VECTOR, _mm512_maskz_loadu_epi8(real, q + i * stride));
    }
    return (bn_activations){copy, BN_VECTOR};
}

/* One chunk of 17 to 32 rows x up to 32 outputs: sums 0 1 above 2 3. */
BN_INLINE void bn_multiply_tall(bn_activations x, const uint8_t *tiles, const bn_codes *next, size_t columns,
                               const int bits)
{
    BN_LOAD_TILE(4, x.q, x.stride);
    BN_LOAD_TILE(5, x.q + BN_ROWS * x.stride, x.stride);
    BN_LOAD_TILE(6, tiles, BN_VECTOR);
    _tile_dpbsud(0, 4, 6);
    bn_unpack_column(next, 0, bits);
    _tile_dpbsud(2, 5, 6);
    if (columns == 2) {
        BN_LOAD_TILE(7, tiles + BN_TILE, BN_VECTOR);
        _tile_dpbsud(1, 4, 7);
        bn_unpack_column(next, 1, bits);
        _tile_dpbsud(3, 5, 7);
    }
}

/* One chunk of up to 16 rows x up to 64 outputs: sums 0 1 2 3 side by side. */
BN_INLINE void bn_multiply_flat(bn_activations x, const uint8_t *tiles, const bn_codes *next, size_t columns,
                               const int bits)
{
    BN_LOAD_TILE(4, x.q, x.stride);
    BN_LOAD_TILE(6, tiles, BN_VECTOR);
    _tile_dpbsud(0, 4, 6);
    bn_unpack_column(next, 0, bits);
    if (columns > 1) {
        BN_LOAD_TILE(7, tiles + BN_TILE, BN_VECTOR);
        _tile_dpbsud(1, 4, 7);
        bn_unpack_column(next, 1, bits);
    }
    if (columns > 2) {
        BN_LOAD_TILE(6, tiles + 2 * BN_TILE, BN_VECTOR);
        _tile_dpbsud(2, 4, 6);
        bn_unpack_column(next, 2, bits);
    }
    if (columns > 3) {
        BN_LOAD_TILE(7, tiles + 3 * BN_TILE, BN_VECTOR);
        _tile_dpbsud(3, 4, 7);
        bn_unpack_column(next, 3, bits);
    }
}

/* A group's sums to acc (rows, groups, 64). */
BN_INLINE void bn_store_sums(int32_t *acc, size_t stride, size_t columns, const int tall)
{
    int32_t *below = acc + BN_ROWS * stride / sizeof *acc;

    BN_STORE_TILE(0, acc, stride);
    if (columns > 1) {
        BN_STORE_TILE(1, acc + BN_PANEL, stride);
    }
    if (tall) {
        BN_STORE_TILE(2, below, stride);
    } else if (columns > 2) {
        BN_STORE_TILE(2, acc + 2 * BN_PANEL, stride);
    }
    if (tall && columns > 1) {
        BN_STORE_TILE(3, below + BN_PANEL, stride);
    } else if (columns > 3) {
        BN_STORE_TILE(3, acc + 3 * BN_PANEL, stride);
    }
}

/* All groups of 3 to 32 rows for some of the columns that stand side by side. */
BN_INLINE void bn_multiply(const bn_dot_args *a, size_t row, size_t rows, size_t from, size_t columns,
                           size_t depth, const int tall, const int bits)
{
    const size_t acc_stride = ((a->steps - 1) / a->group_steps + 1) * BN_SUPER;
    const size_t q_stride = a->q_stride;
    const int8_t *q = a->q + row * q_stride;
    int32_t *acc = a->acc + row * acc_stride + from * BN_PANEL;
    _Alignas(64) uint8_t ring[BN_RING * BN_COLUMNS * BN_TILE];
    _Alignas(64) int8_t copy[2 * BN_ROWS * BN_VECTOR];
    const bn_cut cut = {depth, a->group_steps, a->steps};
    bn_chunk here = bn_first_chunk(&cut);
    size_t slot = 0;
    bn_codes next = {
        .cut = &cut,
        .stride = a->panels * bn_step_bytes(bits),
        .slot_bytes = columns * BN_TILE,
        .ring = ring,
        .chunk = here,
        .panel = a->panel + from * bn_step_bytes(bits),
    };

    for (int i = 0; i < BN_AHEAD; i++) {
        for (size_t column = 0; column < columns; column++) {
            bn_unpack_column(&next, column, bits);
        }
        bn_next_chunk(&next);
    }
    while (here.steps > 0) {
        const size_t group_end = here.group_end;

        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        while (here.step < group_end) {
            const bn_activations x = bn_find_activations(q, q_stride, rows, &here, depth, copy);
            if (tall) {
                bn_multiply_tall(x, ring + slot, &next, columns, bits);
            } else {
                bn_multiply_flat(x, ring + slot, &next, columns, bits);
            }
            bn_advance(&cut, &here);
            slot = bn_next_slot(&next, slot);
            bn_next_chunk(&next);
        }
        bn_store_sums(acc, acc_stride * sizeof *acc, columns, tall);
        acc += BN_SUPER;
    }
}

/* few is the same with AVX512-VNNI. */
BN_INLINE void bn_dot_amx(const bn_dot_args *a, const int bits, bn_dot_fn *few)
{
    const size_t depth = bn_smaller(BN_DEPTH, bn_smaller(a->group_steps, a->steps));
    bn_dot_args rest = *a;
    size_t row = 0;

    while (a->rows - row >= BN_FEW) {
        const size_t rows = bn_smaller(2 * BN_ROWS, a->rows - row);
        const bn_tile_config config = bn_configure(rows, depth);

        bn_set_tiles(&config);
        if (rows <= BN_ROWS) {
            bn_multiply(a, row, rows, 0, a->panels, depth, 0, bits);
        } else {
            for (size_t from = 0; from < a->panels; from += 2) {
                bn_multiply(a, row, rows, from, bn_smaller(2, a->panels - from), depth, 1, bits);
            }
        }
        row += rows;
    }
    if (row < a->rows) {
        rest.q += row * a->q_stride;
        rest.acc += row * ((a->steps - 1) / a->group_steps + 1) * BN_SUPER;
        rest.rows -= row;
        few(&rest);
    }
}

#endif
