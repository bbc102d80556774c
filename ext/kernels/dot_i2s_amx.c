/* dot, AMX.
 *
 * Layout   A vector of a panel (layout.h) is 16 outputs x 16 inputs; its field p, spread to bytes, is
 *          row 4s + p of a tile of 64 inputs x 16 outputs for step s, so four vectors make a tile as
 *          tdpbsud wants it: signed activations (16 rows x 64 inputs) times unsigned codes.
 * Numbers  tdpbsud does not saturate, and all sums fit 32 bits (BN_MAX_GROUP in layout.h).
 * Method   32 rows x 32 outputs, or up to 16 rows x 64, stay in four tiles of sums while two or one
 *          tiles of activations and two of codes pass by.  Codes are unpacked into a ring on the
 *          stack, AHEAD chunks of 64 inputs before they are multiplied, since a tile cannot be loaded
 *          from a store that is under way; unpacking stands between the products, which take 16
 *          cycles each, so that both go on at once.  The bytes of a group are multiples of 16; where
 *          64 inputs are not left, codes of 0 fill the tile and activations are copied, so that
 *          nothing is read behind them.
 * Few rows A product takes 16 cycles for 16 rows and not a quarter of that for 4, and unpacking, about
 *          75 cycles for 64 inputs x 64 outputs, is the limit up to 16 rows.  avx512vnni takes 32 for
 *          each row: fewer than FEW are left to it, and so are those past the last 32.
 * Counted  Of each 4096 weights: 64 stores and 112 shifts and masks, two per cycle, beside 64 cycles of
 *          products for 16 rows and 128 for 32.  No CPU with AMX was at hand: checked in emulators
 *          (tests/kernels/test_amx.py) and never timed.
 */
#include "strips.h"
#include "tiles.h"

enum {
    FEW = 5,
    DEPTH = 4, /* steps in a tile, 64 inputs */
    ROWS = 16, /* of activations in a tile */
    TILE = 1024,
    COLUMNS = 4, /* vectors side by side */
    AHEAD = 2,
    RING = AHEAD + 1,
    PREFETCH = 4096
};

/* Tile registers: sums 0 .. 3, activations 4 and 5, codes 6 and 7. */
static bn_tile_config configure(size_t rows, size_t depth)
{
    const size_t second = rows > ROWS ? rows - ROWS : rows; /* of tiles 2, 3 and 5 */
    const size_t first = rows > ROWS ? ROWS : rows;
    const size_t tile_rows[] = {first, first, second, second, first, second, 4 * depth, 4 * depth};
    bn_tile_config config = {.palette = 1};

    for (int tile = 0; tile < 8; tile++) {
        const int is_activations = tile == 4 || tile == 5;
        config.rows[tile] = (uint8_t)tile_rows[tile];
        config.row_bytes[tile] = (uint16_t)(is_activations ? depth * BN_STEP : BN_VECTOR);
    }
    return config;
}

/* A place in the inputs: chunks of `depth` steps, of which the last one of a group may have fewer. */
typedef struct {
    size_t step, group_end;
} place;

static inline size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static inline place first_place(const bn_dot_args *a)
{
    return (place){0, smaller(a->group_steps, a->steps)};
}

static inline size_t chunk_steps(const place *at, size_t depth)
{
    return smaller(depth, at->group_end - at->step);
}

static inline void advance(const bn_dot_args *a, place *at, size_t steps)
{
    at->step += steps;
    if (at->step == at->group_end) {
        at->group_end = smaller(at->group_end + a->group_steps, a->steps);
    }
}

/* One vector of each of `steps` steps to bytes, then zeros up to `depth` steps. */
BN_INLINE void unpack(const uint8_t *panel, size_t stride, size_t steps, size_t depth, uint8_t *tile)
{
    const __m512i low2 = _mm512_set1_epi8(3);

#pragma GCC unroll 4
    for (size_t step = 0; step < steps; step++, panel += stride, tile += 4 * BN_VECTOR) {
        const __m512i codes = _mm512_loadu_si512(panel);
        _mm_prefetch((const char *)(panel + PREFETCH), _MM_HINT_T0);
        _mm512_store_si512(tile, _mm512_and_si512(codes, low2));
        _mm512_store_si512(tile + 64, _mm512_and_si512(_mm512_srli_epi16(codes, 2), low2));
        _mm512_store_si512(tile + 128, _mm512_and_si512(_mm512_srli_epi16(codes, 4), low2));
        _mm512_store_si512(tile + 192, _mm512_and_si512(_mm512_srli_epi16(codes, 6), low2));
    }
    for (size_t step = steps; step < depth; step++, tile += 4 * BN_VECTOR) {
        memset(tile, 0, 4 * BN_VECTOR);
    }
}

/* The tiles of codes of a strip, unpacked in order, column after column of each chunk. */
typedef struct {
    const bn_dot_args *a;
    place at; /* the chunk that is unpacked next */
    size_t from, depth;
    uint8_t *tiles; /* (RING, COLUMNS, TILE) */
    size_t turn;    /* where in the ring that chunk goes */
} codes;

BN_INLINE void unpack_column(const codes *c, size_t column)
{
    const size_t stride = c->a->panels * BN_VECTOR;
    const size_t steps = chunk_steps(&c->at, c->depth);
    const uint8_t *panel = c->a->panel + c->at.step * stride + (c->from + column) * BN_VECTOR;
    uint8_t *tile = c->tiles + (c->turn * COLUMNS + column) * TILE;

    if (c->at.step == c->a->steps) {
        return;
    }
    if (steps == DEPTH) {
        unpack(panel, stride, DEPTH, DEPTH, tile);
    } else {
        unpack(panel, stride, steps, c->depth, tile);
    }
}

static inline void next_chunk(codes *c)
{
    if (c->at.step < c->a->steps) {
        advance(c->a, &c->at, chunk_steps(&c->at, c->depth));
    }
    c->turn = c->turn + 1 == RING ? 0 : c->turn + 1;
}

/* The activations of a chunk: where they lie, or copied if fewer than `depth` steps are left. */
typedef struct {
    const int8_t *q;
    size_t stride;
} activations;

static inline activations find_activations(const bn_dot_args *a, const place *at, size_t row,
                                           size_t rows, size_t depth, int8_t *copy)
{
    const size_t steps = chunk_steps(at, depth);
    const int8_t *q = a->q + row * a->q_stride + at->step * BN_STEP;

    if (steps == depth) {
        return (activations){q, a->q_stride};
    }
    for (size_t i = 0; i < rows; i++) {
        const __mmask64 real = (UINT64_C(1) << steps * BN_STEP) - 1;
        _mm512_store_si512(copy + i * BN_VECTOR, _mm512_maskz_loadu_epi8(real, q + i * a->q_stride));
    }
    return (activations){copy, BN_VECTOR};
}

/* One chunk of 17 to 32 rows x up to 32 outputs: sums 0 1 above 2 3. */
BN_INLINE void multiply_tall(activations x, const uint8_t *tiles, const codes *next, size_t columns)
{
    BN_LOAD_TILE(4, x.q, x.stride);
    BN_LOAD_TILE(5, x.q + ROWS * x.stride, x.stride);
    BN_LOAD_TILE(6, tiles, BN_VECTOR);
    _tile_dpbsud(0, 4, 6);
    unpack_column(next, 0);
    _tile_dpbsud(2, 5, 6);
    if (columns == 2) {
        BN_LOAD_TILE(7, tiles + TILE, BN_VECTOR);
        _tile_dpbsud(1, 4, 7);
        unpack_column(next, 1);
        _tile_dpbsud(3, 5, 7);
    }
}

/* One chunk of up to 16 rows x up to 64 outputs: sums 0 1 2 3 side by side. */
BN_INLINE void multiply_flat(activations x, const uint8_t *tiles, const codes *next, size_t columns)
{
    BN_LOAD_TILE(4, x.q, x.stride);
    BN_LOAD_TILE(6, tiles, BN_VECTOR);
    _tile_dpbsud(0, 4, 6);
    unpack_column(next, 0);
    if (columns > 1) {
        BN_LOAD_TILE(7, tiles + TILE, BN_VECTOR);
        _tile_dpbsud(1, 4, 7);
        unpack_column(next, 1);
    }
    if (columns > 2) {
        BN_LOAD_TILE(6, tiles + 2 * TILE, BN_VECTOR);
        _tile_dpbsud(2, 4, 6);
        unpack_column(next, 2);
    }
    if (columns > 3) {
        BN_LOAD_TILE(7, tiles + 3 * TILE, BN_VECTOR);
        _tile_dpbsud(3, 4, 7);
        unpack_column(next, 3);
    }
}

/* A group's sums to acc (rows, groups, 64). */
BN_INLINE void store_sums(int32_t *acc, size_t stride, size_t columns, const int tall)
{
    int32_t *below = acc + ROWS * stride / sizeof *acc;

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

/* All groups of 5 to 32 rows for some of the vectors that stand side by side. */
BN_INLINE void multiply(const bn_dot_args *a, size_t row, size_t rows, size_t from, size_t columns,
                        size_t depth, const int tall)
{
    const size_t acc_stride = ((a->steps - 1) / a->group_steps + 1) * BN_SUPER;
    int32_t *acc = a->acc + row * acc_stride + from * BN_PANEL;
    _Alignas(64) uint8_t tiles[RING * COLUMNS * TILE];
    _Alignas(64) int8_t copy[2 * ROWS * BN_VECTOR];
    codes next = {a, first_place(a), from, depth, tiles, 0};
    place here = first_place(a);
    size_t turn = 0;

    for (int i = 0; i < AHEAD; i++) {
        for (size_t column = 0; column < columns; column++) {
            unpack_column(&next, column);
        }
        next_chunk(&next);
    }
    while (here.step < a->steps) {
        const size_t group_end = here.group_end;

        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        while (here.step < group_end) {
            const activations x = find_activations(a, &here, row, rows, depth, copy);
            if (tall) {
                multiply_tall(x, tiles + turn * COLUMNS * TILE, &next, columns);
            } else {
                multiply_flat(x, tiles + turn * COLUMNS * TILE, &next, columns);
            }
            advance(a, &here, chunk_steps(&here, depth));
            next_chunk(&next);
            turn = turn + 1 == RING ? 0 : turn + 1;
        }
        store_sums(acc, acc_stride * sizeof *acc, columns, tall);
        acc += BN_SUPER;
    }
}

static void few_rows(const bn_dot_args *a, size_t row)
{
    bn_dot_args rest = *a;

    rest.q += row * a->q_stride;
    rest.acc += row * ((a->steps - 1) / a->group_steps + 1) * BN_SUPER;
    rest.rows -= row;
    bn_dot_i2s_avx512vnni(&rest);
}

void bn_dot_i2s_amx(const bn_dot_args *a)
{
    const size_t depth = smaller(DEPTH, smaller(a->group_steps, a->steps));
    size_t row = 0;

    while (a->rows - row >= FEW) {
        const size_t rows = smaller(2 * ROWS, a->rows - row);
        const bn_tile_config config = configure(rows, depth);

        bn_set_tiles(&config);
        if (rows <= ROWS) {
            multiply(a, row, rows, 0, a->panels, depth, 0);
        } else {
            for (size_t from = 0; from < a->panels; from += 2) {
                multiply(a, row, rows, from, smaller(2, a->panels - from), depth, 1);
            }
        }
        row += rows;
    }
    if (row < a->rows) {
        few_rows(a, row);
    }
}
