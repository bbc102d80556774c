/* What all hadamard kernels share. */
#ifndef BN_HADAMARD_H
#define BN_HADAMARD_H

#include "kernel.h"

/* 1 / sqrt(block) for a power of two, rounded once: halving a float is exact. */
static inline float bn_hadamard_scale(size_t block)
{
    float scale = 1.0f;

    for (; block >= 4; block /= 4) {
        scale *= 0.5f;
    }
    return block == 2 ? scale * 0.70710678f : scale;
}

#endif
