/* What the SIMD kernels of attention share.  The header of the instruction set (simd_*.h) comes before it.
 *
 * Method   Rows are taken in strips whose sums lie in registers, up to BN_STRIP_VECTORS vectors side by
 *          side: first scores of keys, then values. Each element of q or of the softmax is broadcast and
 *          meets a vector of keys or values. Strips that share a panel of keys follow one another, so it
 *          comes from the first-level cache. The last strip of many rows overlaps the one before, which
 *          computes some rows twice, with the same result; fewer rows than a strip are done one by one.
 * Numbers  Past the last token scores are -inf, so their exponentials are 0 and change no sum. Where
 *          the mask makes all scores NaN or -inf, max - max is NaN, as it should be. */
#ifndef BN_ATTENTION_WIDE_H
#define BN_ATTENTION_WIDE_H

#include <math.h>
#include <string.h>

#include "exponential.h"

enum {
    BN_STRIP_ROWS = 6,
    BN_STRIP_FLOATS = BN_STRIP_VECTORS * BN_FLOATS,
    BN_LANE_VECTORS = 16 / BN_FLOATS
};

BN_INLINE bn_floats bn_exp(bn_floats x)
{
    const bn_floats least = bn_all(BN_EXP_LEAST), one = bn_all(1.0f);
    const bn_floats inside = bn_max(least, x);
    const bn_floats shifted = bn_fma(inside, bn_all(BN_EXP_LOG2E), bn_all(BN_EXP_SHIFT));
    const bn_floats n = bn_sub(shifted, bn_all(BN_EXP_SHIFT));
    const bn_floats rest = bn_fma(n, bn_all(-BN_EXP_LN2_HIGH), inside);
    const bn_floats r = bn_fma(n, bn_all(-BN_EXP_LN2_LOW), rest);
    bn_floats p = bn_fma(bn_all(BN_EXP_C6), r, bn_all(BN_EXP_C5));

    p = bn_fma(p, r, bn_all(BN_EXP_C4));
    p = bn_fma(p, r, bn_all(BN_EXP_C3));
    p = bn_fma(p, r, bn_all(BN_EXP_C2));
    p = bn_fma(p, r, one);
    p = bn_fma(p, r, one);
    return bn_zero_if_below(x, least, bn_mul(p, bn_power_of_two(shifted)));
}

/* sum[row][i] = sum of a[row][j] * b[j][i] over j in order; rows and vectors are constants. */
BN_INLINE void bn_products(const float *a, size_t a_stride, const float *b, size_t b_stride, size_t depth,
                           const size_t rows, const size_t vectors,
                           bn_floats sum[BN_STRIP_ROWS][BN_STRIP_VECTORS])
{
#pragma GCC unroll 6
    for (size_t row = 0; row < rows; row++) {
#pragma GCC unroll 4
        for (size_t i = 0; i < vectors; i++) {
            sum[row][i] = bn_all(0.0f);
        }
    }
    for (size_t j = 0; j < depth; j++) {
        bn_floats right[BN_STRIP_VECTORS];
#pragma GCC unroll 4
        for (size_t i = 0; i < vectors; i++) {
            right[i] = bn_load_floats(b + j * b_stride + i * BN_FLOATS);
        }
#pragma GCC unroll 6
        for (size_t row = 0; row < rows; row++) {
            const bn_floats left = bn_all(a[row * a_stride + j]);
#pragma GCC unroll 4
            for (size_t i = 0; i < vectors; i++) {
                sum[row][i] = bn_fma(left, right[i], sum[row][i]);
            }
        }
    }
}

/* Scores of a strip with some keys of a panel, from key `at` on. */
BN_INLINE void bn_score(const bn_attention_args *a, size_t row, size_t at, bn_floats *most,
                        const size_t height)
{
    const size_t stride = bn_round_up(a->tokens, BN_KEYS);
    const float *keys = a->keys + at / BN_KEYS * a->width * BN_KEYS + at % BN_KEYS;
    const bn_floats scale = bn_all(a->scale);
    bn_floats sum[BN_STRIP_ROWS][BN_STRIP_VECTORS];

    bn_products(a->q + row * a->q_stride, a->q_stride, keys, BN_KEYS, a->width, height, BN_STRIP_VECTORS,
                sum);
#pragma GCC unroll 6
    for (size_t r = 0; r < height; r++) {
        const float *mask = a->mask + (row + r) * a->mask_stride + at;
        float *scores = a->scores + (row + r) * stride + at;
#pragma GCC unroll 4
        for (size_t i = 0; i < BN_STRIP_VECTORS; i++) {
            const bn_floats score = bn_fma(sum[r][i], scale, bn_load_floats(mask + i * BN_FLOATS));
            bn_store_floats(scores + i * BN_FLOATS, score);
            most[row + r] = bn_max(most[row + r], score);
        }
    }
}

/* Turns scores into their exponentials; returns what they are to be multiplied with. */
BN_INLINE float bn_softmax(float *scores, size_t count, float most, int nan_to_zero)
{
    const bn_floats peak = bn_all(most);
    bn_floats lanes[BN_LANE_VECTORS];

#pragma GCC unroll 4
    for (size_t i = 0; i < BN_LANE_VECTORS; i++) {
        lanes[i] = bn_all(0.0f);
    }
    for (size_t t = 0; t < count; t += 16) {
#pragma GCC unroll 4
        for (size_t i = 0; i < BN_LANE_VECTORS; i++) {
            float *at = scores + t + i * BN_FLOATS;
            const bn_floats p = bn_exp(bn_sub(bn_load_floats(at), peak));
            bn_store_floats(at, p);
            lanes[i] = bn_add(lanes[i], p);
        }
    }
    const float total = bn_sum_16(lanes);
    if (nan_to_zero && isnan(total)) {
        memset(scores, 0, count * sizeof *scores);
        return 1.0f;
    }
    return 1.0f / total;
}

/* Some of the outputs of a strip, from `at` on. */
BN_INLINE void bn_weigh(const bn_attention_args *a, size_t row, size_t at, const float *factor,
                        const size_t height, const size_t vectors)
{
    const size_t stride = bn_round_up(a->tokens, BN_KEYS);
    const int is_cut = at + vectors * BN_FLOATS > a->value_width;
    bn_floats sum[BN_STRIP_ROWS][BN_STRIP_VECTORS];

    bn_products(a->scores + row * stride, stride, a->values + at, a->value_stride, a->tokens, height, vectors,
                sum);
#pragma GCC unroll 6
    for (size_t r = 0; r < height; r++) {
        float *y = a->y + (row + r) * a->y_stride + at, end[BN_STRIP_FLOATS];
#pragma GCC unroll 4
        for (size_t i = 0; i < vectors; i++) {
            bn_store_floats((is_cut ? end : y) + i * BN_FLOATS, bn_mul(sum[r][i], bn_all(factor[row + r])));
        }
        if (is_cut) {
            memcpy(y, end, (a->value_width - at) * sizeof *y);
        }
    }
}

/* The first row of a strip. */
BN_INLINE size_t bn_strip_row(const bn_attention_args *a, size_t strip, const size_t height)
{
    const size_t row = strip * height, last = a->rows - height;
    return row < last ? row : last;
}

/* All rows, in strips of `height`. */
BN_INLINE void bn_attend(const bn_attention_args *a, const size_t height)
{
    const size_t stride = bn_round_up(a->tokens, BN_KEYS), strips = (a->rows + height - 1) / height;
    const size_t end = bn_round_up(a->value_width, BN_VALUES);
    bn_floats most[BN_ATTENTION_ROWS];
    float factor[BN_ATTENTION_ROWS];

    for (size_t row = 0; row < a->rows; row++) {
        most[row] = bn_all(-INFINITY);
    }
    for (size_t at = 0; at < stride; at += BN_STRIP_FLOATS) {
        for (size_t i = 0; i < strips; i++) {
            bn_score(a, bn_strip_row(a, i, height), at, most, height);
        }
    }
    for (size_t row = 0; row < a->rows; row++) {
        factor[row] = bn_softmax(a->scores + row * stride, stride, bn_max_of(most[row]), a->nan_to_zero);
    }
    for (size_t i = 0; i < strips; i++) {
        const size_t row = bn_strip_row(a, i, height);
        size_t at = 0;
        for (; at + BN_STRIP_FLOATS <= end; at += BN_STRIP_FLOATS) {
            bn_weigh(a, row, at, factor, height, BN_STRIP_VECTORS);
        }
        if (BN_STRIP_VECTORS > 2 && at + 2 * BN_FLOATS <= end) {
            bn_weigh(a, row, at, factor, height, 2);
            at += 2 * BN_FLOATS;
        }
        if (at < end) {
            bn_weigh(a, row, at, factor, height, 1);
        }
    }
}

BN_INLINE void bn_attention_wide(const bn_attention_args *a)
{
    if (a->rows >= BN_STRIP_ROWS) {
        bn_attend(a, BN_STRIP_ROWS);
    } else {
        bn_attend(a, 1);
    }
}

#endif
