/* How attention kernels compute exp, for x <= 0.
 *
 * Method   exp(x) = 2^n exp(r) with n = rint(x / ln 2), |r| <= ln 2 / 2, found by adding 1.5 * 2^23, whose
 *          last bits are then n. exp(r) is 1 + r + r^2 (..), the minimax polynomial of relative error.
 * Numbers  Every step is one fma, sum or product, so all kernels give the same bits; the farthest from
 *          exp is 0.87 units in the last place. Below -87 the result is 0: 2^n needs n >= -126. */
#ifndef BN_EXPONENTIAL_H
#define BN_EXPONENTIAL_H

#include "kernel.h"

#define BN_EXP_LEAST -87.0f
#define BN_EXP_SHIFT 12582912.0f /* 1.5 * 2^23 */
#define BN_EXP_LOG2E 1.44269504f
#define BN_EXP_LN2_HIGH 0x1.62e4p-1f /* products with n are exact */
#define BN_EXP_LN2_LOW 0x1.7f7d1cp-20f
#define BN_EXP_C2 0x1.fffffcp-2f
#define BN_EXP_C3 0x1.555492p-3f
#define BN_EXP_C4 0x1.5558f2p-5f
#define BN_EXP_C5 0x1.1239e2p-7f
#define BN_EXP_C6 0x1.6a2434p-10f

/* The float 1 in the bits that 2^n is made in: n << 23 is added. */
#define BN_EXP_ONE_BITS 0x3F800000

#endif
