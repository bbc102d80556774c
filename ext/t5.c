/* Panels of i2s to those of t5, see t5.h.
 *
 * Method  Front to back in one pass, so that what is written never passes what is still to be read; a vector
 *         at a time in arrays of fixed length, which compilers turn into vectors of any instruction set.
 * Speed   Zen 5, SSE2 as compiled for every x86-64: see docs/speed.md, Opening a model. */
#include "t5.h"

#include <string.h>

#include "kernels/t5.h"

/* The fields of a vector of i2s, as c0 + 3 c1 + 9 c2 + 27 c3, and field r of another one. */
static void squeeze_vector(const uint8_t *from, const uint8_t *fifth, int r, uint8_t *to)
{
    uint8_t v[BN_VECTOR], t[BN_VECTOR];

    memcpy(v, from, BN_VECTOR);
    memcpy(t, fifth, BN_VECTOR);
    for (int i = 0; i < BN_VECTOR; i++) {
        const int pairs = v[i] - (v[i] >> 2 & 0x33); /* c0 + 3 c1 + 16 (c2 + 3 c3) */
        v[i] = (uint8_t)(pairs - 7 * (pairs >> 4) + BN_T5_WEIGHT * (t[i] >> 2 * r & 3));
    }
    memcpy(to, v, BN_VECTOR);
}

/* A group of a super-panel of which a step has `row` bytes; returns where the next one goes. */
static uint8_t *squeeze_group(const uint8_t *from, size_t steps, size_t row, uint8_t *to)
{
    const size_t rest = steps % BN_T5_FIVE * row;

    for (size_t five = 0; five < steps / BN_T5_FIVE; five++, from += BN_T5_FIVE * row) {
        const uint8_t *fifth = from + BN_T5_FOUR * row;
        for (int r = 0; r < BN_T5_FOUR; r++) {
            for (size_t at = 0; at < row; at += BN_VECTOR, to += BN_VECTOR) {
                squeeze_vector(from + (size_t)r * row + at, fifth + at, r, to);
            }
        }
    }
    memmove(to, from, rest);
    return to + rest;
}

size_t bn_squeeze_panels(uint8_t *panels, size_t n, const bn_groups *groups)
{
    const size_t steps = groups->padded / BN_STEP, most = groups->stride / BN_STEP;
    uint8_t *to = panels;

    for (size_t super = 0; super < bn_super_panels(n); super++) {
        const uint8_t *from = panels + bn_super_offset(super, groups, 2);
        const size_t row = bn_super_width(n, super) * BN_VECTOR;
        for (size_t step = 0; step < steps; step += most) {
            to = squeeze_group(from + step * row, steps - step < most ? steps - step : most, row, to);
        }
    }
    return (size_t)(to - panels);
}
