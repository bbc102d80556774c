/* What the AVX-512 kernels share that end rows under a mask. */
#ifndef BN_LANES_AVX512_H
#define BN_LANES_AVX512_H

#include <immintrin.h>

#include "kernel.h"

/* The lanes of a vector of 16 that the next of `count` values take. */
BN_INLINE __mmask16 bn_first_lanes(size_t count)
{
    return count >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << count) - 1);
}

#endif
