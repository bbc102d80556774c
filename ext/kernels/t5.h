/* What a byte of t5 (layout.h) stands for.
 *
 * Method   c0 + 3 c1 + 9 c2 + 27 c3 + 85 t, a code t = 0..2 and the rest below 85: the least of x, x - 85 and
 *          x - 170 as bytes without sign is the rest, since what is below zero wraps to 171 or more.  85 t
 *          has t in each of its four fields, so a fifth step is put together with masks alone. */
#ifndef BN_T5_H
#define BN_T5_H

#include "kernel.h"

enum { BN_T5_FIVE = 5, BN_T5_FOUR = 4, BN_T5_WEIGHT = 85 };

#define BN_T5_1(c) c, c + 1, c + 2
#define BN_T5_2(c) BN_T5_1(c), BN_T5_1(c + 4), BN_T5_1(c + 8)
#define BN_T5_3(c) BN_T5_2(c), BN_T5_2(c + 16), BN_T5_2(c + 32)

/* c0 + 3 c1 + 9 c2 + 27 c3 to the byte of i2s with these fields; 81 of the entries are used. */
static const uint8_t bn_t5_codes[2 * BN_VECTOR] = {BN_T5_3(0), BN_T5_3(64), BN_T5_3(128)};

#endif
