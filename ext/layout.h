/* Where a code lives: in the file (canonical bytes) and in memory (panels).
 *
 * File, format i2s.  W has n rows (outputs) and k columns (inputs); a row is ceil(k / 4) bytes:
 *
 *     byte b of a row    bits 7..6   5..4     3..2     1..0
 *     holds the codes    4b + 3      4b + 2   4b + 1   4b          each 0..3; past k: 1
 *
 * Memory.  The same codes in the order in which every kernel wants them.  A vector of 64 bytes
 * holds 16 outputs x 16 inputs (a step); lane 4i + j belongs to output i, and its four fields are
 * planes of 4 inputs each, so that one field of all lanes is the operand of a 4-way byte dot
 * product:
 *
 *     byte 4i + j        bits 7..6   5..4     3..2     1..0
 *     of output i        in 12 + j   8 + j    4 + j    j           inputs of the step
 *
 * Four vectors that cover 64 outputs stand side by side (a super-panel), then comes the next
 * step.  Thus a product with one row of activations reads memory from front to back.  The last
 * super-panel of a matrix is narrower where n allows, in steps of 16 outputs.
 *
 * Codes of 4 bits (w4) and of 8 (w8), which planes in integer ratio become (merge.h), need 2 and 4
 * such vectors for the same 16 outputs x 16 inputs, one after the other:
 *
 *     w4, vector v       bits 7..4      3..0
 *     byte 4i + j        8v + 4 + j     8v + j
 *     w8, vector v       bits 7..0
 *     byte 4i + j        4v + j
 *
 * Ternary codes also fit in 1.6 bits (t5): five steps of a panel, v[0] .. v[4], take the room of four,
 *
 *     t5, vector r       c0 + 3 c1 + 9 c2 + 27 c3 + 85 t
 *     of 0..3            c0 .. c3 the fields of v[r] from the lowest on, t field r of v[4]
 *
 * at the same byte; the steps of a group that are left, fewer than five, stay as they are.
 *
 * A file with the layout `panel` holds those of 2 bits, its last super-panel filled up to 64 outputs.
 *
 * Inputs that share a scale are a group.  Every group starts at a step: its inputs are padded to a
 * multiple of 16 with code 1 (0 in w4 and w8), and rows of activations are padded with the code of 0.0 in the same
 * places. */
#ifndef BN_LAYOUT_H
#define BN_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

enum {
    BN_STEP = 16,   /* inputs in a vector */
    BN_PANEL = 16,  /* outputs in a vector */
    BN_VECTOR = 64, /* bytes in a vector */
    BN_SUPER = 64,  /* outputs in a super-panel */
    BN_MAX_PLANES = 4,

    /* Inputs that may share a scale.  A kernel may add up codes in place, at bits 7..6, in 32
     * bits: a step of 4 such products is at most 4 * (64 * 3) * 128 = 98304, and 2^31 / 98304 =
     * 21845 steps of 16 inputs fit; we allow 2^14 steps. */
    BN_MAX_GROUP = 1 << 18,

    /* The same with codes of 4 and 8 bits: 2^16 inputs at most 255 * 128 each are less than 2^31, and
     * so are the 2^15 of them whose 4-bit codes are added up in place, at most 240 * 128 each. */
    BN_MAX_WIDE_GROUP = 1 << 16
};

typedef struct {
    size_t k;      /* inputs */
    size_t length; /* inputs in a group; the last may have fewer */
    size_t count;  /* groups */
    size_t stride; /* padded inputs in a group, a multiple of BN_STEP; the last may have fewer */
    size_t padded; /* padded inputs in all */
} bn_groups;

static inline size_t bn_row_bytes(size_t k)
{
    return k / 4 + (k % 4 != 0);
}

static inline size_t bn_round_up(size_t value, size_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static inline bn_groups bn_make_groups(size_t k, size_t block_size)
{
    bn_groups g;
    g.k = k;
    g.length = block_size == 0 || block_size > k ? k : block_size;
    g.count = (k - 1) / g.length + 1;
    g.stride = bn_round_up(g.length, BN_STEP);
    g.padded = (g.count - 1) * g.stride + bn_round_up(k - (g.count - 1) * g.length, BN_STEP);
    return g;
}

/* Inputs of group `index`, without padding. */
static inline size_t bn_group_length(const bn_groups *g, size_t index)
{
    return index + 1 < g->count ? g->length : g->k - index * g->length;
}

static inline size_t bn_super_panels(size_t n)
{
    return (n - 1) / BN_SUPER + 1;
}

/* Vectors side by side in super-panel `index`: 4, or fewer in the last one. */
static inline size_t bn_super_width(size_t n, size_t index)
{
    const size_t left = n - index * BN_SUPER;
    return left >= BN_SUPER ? BN_SUPER / BN_PANEL : (left - 1) / BN_PANEL + 1;
}

/* Bytes of 16 outputs x 16 inputs with codes of 2, 4 or 8 bits. */
static inline size_t bn_step_bytes(int bits)
{
    return (size_t)bits / 2 * BN_VECTOR;
}

/* Vectors that the steps of a group take side by side in t5. */
static inline size_t bn_t5_vectors(size_t steps)
{
    return steps - steps / 5;
}

/* Bytes of 16 outputs of a plane. */
static inline size_t bn_column_bytes(const bn_groups *g, int bits)
{
    return g->padded / BN_STEP * bn_step_bytes(bits);
}

/* Bytes of the panels of one plane. */
static inline size_t bn_panel_bytes(size_t n, const bn_groups *g, int bits)
{
    return bn_round_up(n, BN_PANEL) / BN_PANEL * bn_column_bytes(g, bits);
}

/* Where super-panel `index` of a plane begins: all before it are full. */
static inline size_t bn_super_offset(size_t index, const bn_groups *g, int bits)
{
    return index * (BN_SUPER / BN_PANEL) * bn_column_bytes(g, bits);
}

#endif
