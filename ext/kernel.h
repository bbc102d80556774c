/* The kernel ops: for each one what it computes, its arguments and its function type.
 *
 * A kernel knows no threads, no allocation, no ONNX Runtime and no Python: pointers in, numbers
 * out.  Every kernel of an op gives the same bits, except dotf, whose sums may be taken in any
 * order. */
#ifndef BN_KERNEL_H
#define BN_KERNEL_H

#include "layout.h"

#if defined(_MSC_VER)
#define BN_INLINE static __forceinline
#else
#define BN_INLINE static inline __attribute__((always_inline))
#endif

/* dot: acc[row][g][output] = sum of code * q over the inputs of group g, exact; there are kernels
 * for codes of 2 bits (i2s), 4 (w4) and 8 (w8), and for ternary ones of 1.6 (t5).
 * `steps` may cover a part of a row that starts at a group; the last group may be shorter. */
typedef struct {
    const uint8_t *panel; /* (steps, panels, 32 * bits) one super-panel of one plane; of t5
                             (bn_t5_vectors of each group, panels, 64) */
    const int8_t *q;      /* (rows, q_stride) of which (rows, 16 * steps) are used */
    int32_t *acc;         /* (rows, ceil(steps / group_steps), 64), written up to 16 * panels */
    size_t q_stride, rows;
    size_t panels; /* 1 to 4 */
    size_t steps, group_steps;
} bn_dot_args;
typedef void bn_dot_fn(const bn_dot_args *a);

/* tiles: takes the thread's tile registers (AMX), which others on it use, too, before calls of dot,
 * and gives them back as they were afterwards; nothing where dot needs none. */
typedef struct {
    uint8_t config[64]; /* the thread's own; the caller keeps it between the two calls */
    int back;           /* 0: take, 1: give back */
} bn_tiles_args;
typedef void bn_tiles_fn(bn_tiles_args *a);

/* dotf: acc[row][g][output] = sum of (code - 1) * x over the inputs of group g, in float. */
typedef struct {
    const uint8_t *panel; /* (steps, panels, 64) one super-panel of one plane, i2s */
    const float *x;       /* (rows, x_stride) of which (rows, 16 * steps) are used */
    float *acc;           /* as in dot */
    size_t x_stride, rows, panels, steps, group_steps;
} bn_dotf_args;
typedef void bn_dotf_fn(const bn_dotf_args *a);

/* Steps after which dotf adds its partial sums to acc: keeps the rounding errors of long rows
 * small. */
enum { BN_DOTF_STEPS = 16 };

/* actq: quantize one row of activations.
 *     L = 2^(bits - 1) - 1, absmax = max(max|x|, 1e-5), s = (1 / absmax) * L, inv_s = absmax / L
 *     q = clamp(rint(x * s), -L - 1, L), half to even
 * or s = 1 / step, inv_s = step where step is not 0.  16-bit values are kept in two rows,
 *     hi = q >> 8,  lo = (q & 255) - 128,  so that q = 256 hi + lo + 128.
 * A row with NaN or Inf has q = sum = 0 and inv_s = NaN. */
typedef struct {
    const float *x; /* (groups.k) */
    int8_t *q;      /* (bits / 8, q_stride) of which (bits / 8, groups.padded) are written */
    int64_t *sum;   /* (groups.count) sums of q, padding excluded (its q is 0) */
    float *inv_s;   /* (1) */
    bn_groups groups;
    size_t q_stride;
    float step; /* 0: dynamic */
    int bits;   /* 8 or 16 */
} bn_actq_args;
typedef void bn_actq_fn(const bn_actq_args *a);

/* scale: y[row][output] = before[row][output] + term * (factor[row] * scale[g][output]) for g in
 * order, with
 *     term = (float)(sum of code * q - zero_point * sum of q)
 * from exact integers in double, and the product of the last two floats rounded before it is used.
 * With two parts (16-bit q) rows 2r and 2r + 1 of acc are the products with hi and lo:
 *     sum of code * q = 256 acc_hi + acc_lo + 128 * sum of code.
 * The last groups come with a bias: then y[row][output] = y[row][output] * rescale[row] + bias[output],
 * with the product rounded before it is used. */
typedef struct {
    const int32_t *acc;      /* (parts * rows, groups, 64) */
    const int64_t *sum;      /* (rows, sum_stride) of which (rows, groups) are used: sums of q */
    const int32_t *code_sum; /* (groups, 64) sums of code, padding included; unused for 1 part */
    const float *scale;      /* (groups, 64) */
    const float *zero_point; /* (groups, 64), or NULL: */
    int32_t zero;            /* all are this, and sum((code - zero) q) fits 32 bits */
    const float *factor;     /* (rows) */
    const float *before;     /* (rows, 64), may be y; NULL: zeros */
    const float *bias;       /* (64), or NULL: more groups follow */
    const float *rescale;    /* (rows), used with bias */
    float *y;                /* (rows, y_stride) of which (rows, 16 * panels) are written */
    size_t rows, parts, groups, sum_stride, y_stride, panels;
} bn_scale_args;
typedef void bn_scale_fn(const bn_scale_args *a);

/* widen: float16 to float32.  narrow: float32 to float16, half to even. */
typedef struct {
    const uint16_t *x; /* (count) */
    float *y;          /* (count) */
    size_t count;
} bn_widen_args;
typedef void bn_widen_fn(const bn_widen_args *a);

typedef struct {
    const float *x; /* (count) */
    uint16_t *y;    /* (count) */
    size_t count;
} bn_narrow_args;
typedef void bn_narrow_fn(const bn_narrow_args *a);

/* hadamard: blocks of y = H (x * signs) / sqrt(block), H the Walsh-Hadamard matrix in natural order,
 * H[i][j] = -1 where i & j has an odd number of bits, else 1.  In float32, in this order:
 *     y[i] = x[i] * signs[i]
 *     for stride = 1, 2, 4 .. block / 2 and each i that lacks the bit of stride:
 *         y[i], y[i + stride] = y[i] + y[i + stride], y[i] - y[i + stride]
 *     y[i] = y[i] * (1 / sqrt(block)), a float */
typedef struct {
    const float *x;     /* (rows, k) */
    const float *signs; /* (k) of 1 and -1 */
    float *y;           /* (rows, k), may be x */
    size_t rows, k;     /* k a multiple of block */
    size_t block;       /* a power of two */
} bn_hadamard_args;
typedef void bn_hadamard_fn(const bn_hadamard_args *a);

/* attention: y[row] = softmax over t of (scale * q[row] . k[t] + mask[row][t]) times v, for rows of one head.
 * In float32, `fma` rounded once:
 *     s[t] = fma(.. fma(q[0], k[t][0], 0) .., over i in order), then s[t] = fma(s[t], scale, mask[t])
 *     p[t] = exp(s[t] - max s), as exponential.h computes it
 *     total = 16 sums, lane j of p[j], p[16 + j] .. in order; then lanes j and 8 + j, 4 + j, 2 + j, 1 + j
 *     y[i] = fma(.. fma(p[0], v[0][i], 0) .., over t in order) * (1 / total)
 * A total that is NaN, as of a row that is masked throughout, gives a row of NaN; or, with nan_to_zero, all
 * p are 0 instead, and the factor is 1. */
enum {
    BN_KEYS = 64,   /* in a panel */
    BN_VALUES = 16, /* a row of values is filled up to a multiple of this */
    BN_ATTENTION_ROWS = 24
};

typedef struct {
    const float *q;      /* (rows, q_stride) of which (rows, width) are used */
    const float *keys;   /* (panels, width, 64) panels of 64 keys; past the last one anything finite */
    const float *values; /* (tokens, value_stride), past value_width up to a multiple of 16 anything finite */
    const float *mask;   /* (rows, mask_stride) of which (rows, 64 * panels); -inf past the last token */
    float *scores;       /* room for (rows, 64 * panels) */
    float *y;            /* (rows, y_stride) of which (rows, value_width) are written */
    size_t q_stride, value_stride, mask_stride, y_stride;
    size_t rows; /* 1 to 24 */
    size_t tokens, value_width; /* 1 or more */
    size_t width;
    float scale;
    int nan_to_zero;
} bn_attention_args;
typedef void bn_attention_fn(const bn_attention_args *a);

/* transpose: y[col][row] = x[row][col], bit for bit, whatever the bits stand for. */
typedef struct {
    const float *x; /* (rows, x_stride) of which (rows, cols) are used */
    float *y;       /* (cols, y_stride) of which (cols, rows) are written */
    size_t x_stride, y_stride, rows, cols;
} bn_transpose_args;
typedef void bn_transpose_fn(const bn_transpose_args *a);

/* moments and compare sum in eight lanes of double: lane j adds the values j, 8 + j, 16 + j ... of a group
 * or row in order, and the lanes are added as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).  Products are
 * rounded before they are added. */
enum { BN_LANES = 8 };

static inline double bn_sum_lanes(const double *lane /* (BN_LANES) */)
{
    return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

/* moments: of each group of a row, the sum of |w|, the least w and the greatest w.  The sum is finite
 * if and only if all w are; otherwise the other two may be anything. */
typedef struct {
    const float *w;  /* (groups.k) */
    double *moments; /* (groups.count, 3) */
    bn_groups groups;
} bn_moments_args;
typedef void bn_moments_fn(const bn_moments_args *a);

/* optimum: of each group of a row, the scale s that minimizes the sum of (w - s t)^2 over all t in {-1, 0, 1}
 * (levels 3) or {-1, 0, 1, 2} (levels 4, s of either sign); 0 for zeros. */
typedef struct {
    const float *w; /* (groups.k), finite */
    float *scale;   /* (groups.count) */
    uint32_t *keys; /* room for bn_optimum_keys(groups) */
    bn_groups groups;
    int levels;
} bn_optimum_args;
typedef void bn_optimum_fn(const bn_optimum_args *a);

/* Two lists of weights, one more to sort by, and a vector behind each. */
static inline size_t bn_optimum_keys(const bn_groups *groups)
{
    return 3 * (groups->length + 16);
}

/* How one plane treats a group of weights that share a scale:
 *     t = (w f > low) - (w f < -low) + (w f > high),    code = t + 1,    w ~ scale t,
 * with 0 <= low <= high, both finite or not; high is infinity with three levels. */
typedef struct {
    float factor, low, high, scale;
} bn_step;

/* assign: codes of a row of finite weights as canonical bytes, and what they do not cover. */
typedef struct {
    const float *w;       /* (groups.k) */
    const bn_step *steps; /* (groups.count) */
    uint8_t *packed;      /* (ceil(k / 4)), or NULL */
    float *rest;          /* (groups.k) w - scale t; NULL, or w itself */
    bn_groups groups;     /* of a multiple of 4 inputs, unless there is one group */
} bn_assign_args;
typedef void bn_assign_fn(const bn_assign_args *a);

/* decode: out = (code - zero_point) * scale, or is increased by that. */
typedef struct {
    const uint8_t *packed;    /* (ceil(k / 4)) canonical bytes of a row */
    const float *scale;       /* (groups.count) */
    const float *zero_point;  /* (groups.count) */
    float *out;               /* (groups.k) */
    bn_groups groups;         /* as in assign */
    int add;
} bn_decode_args;
typedef void bn_decode_fn(const bn_decode_args *a);

/* compare: sums of (w - decoded)^2 and of w^2 of a row, and how many of decoded are 0. */
typedef struct {
    const float *w, *decoded; /* (count) */
    size_t count;             /* below 2^32 */
    double error, signal;     /* out */
    size_t zeros;             /* out */
} bn_compare_args;
typedef void bn_compare_fn(bn_compare_args *a);

/* panel: rows of i2s bytes, padded to whole steps, to a super-panel (layout.h).  Word `step` of row
 * 16 p + i becomes word i of vector p of that step, its 4 x 4 matrix of fields transposed. */
typedef struct {
    const uint8_t *rows; /* (16 * panels, row_stride) bytes of which (16 * panels, 4 * steps) are used */
    uint8_t *panel;      /* (steps, panels, 64) */
    size_t row_stride, panels, steps;
} bn_panel_args;
typedef void bn_panel_fn(const bn_panel_args *a);

static inline uint32_t bn_load_word(const uint8_t *from)
{
    return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

static inline void bn_store_word(uint8_t *to, uint32_t w)
{
    to[0] = (uint8_t)w;
    to[1] = (uint8_t)(w >> 8);
    to[2] = (uint8_t)(w >> 16);
    to[3] = (uint8_t)(w >> 24);
}

/* Field (row r, column c) of a 4 x 4 matrix of two-bit fields goes to (c, r): first the
 * off-diagonal 1 x 1 fields of each 2 x 2 corner change places, then the off-diagonal corners. */
static inline uint32_t bn_transpose_fields(uint32_t w)
{
    uint32_t swap = (w ^ (w >> 6)) & UINT32_C(0x00CC00CC);
    w ^= swap ^ (swap << 6);
    swap = (w ^ (w >> 12)) & UINT32_C(0x0000F0F0);
    return w ^ swap ^ (swap << 12);
}

#define BN_KERNEL(op, format, isa) bn_##op##_fn bn_##op##_##format##_##isa;
#include "kernels.inc"
#undef BN_KERNEL

#endif
