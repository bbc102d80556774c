/* The 16-bit float types in portable C.  Widening is exact; narrowing rounds half to even.
 *
 * No branches where it matters, so that the compiler can vectorize loops over these. */
#ifndef BN_HALF_H
#define BN_HALF_H

#include <stdint.h>
#include <string.h>

static inline float bn_float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bn_float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* IEEE binary16: 1 sign, 5 exponent (bias 15) and 10 mantissa bits. */
static inline float bn_half_to_float(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13; /* mantissas aligned */
    /* Exponents move from bias 15 to 127; Inf and NaN (31) move on to 255. */
    const uint32_t normal = magnitude + (112u << 23) + (magnitude >= 0x0f800000u ? 112u << 23 : 0u);
    /* Subnormals are m 2^-24.  With exponent 113 the bits read 2^-14 + m 2^-24. */
    const float subnormal =
        bn_float_from_bits(magnitude + (113u << 23)) - bn_float_from_bits(113u << 23);
    return bn_float_from_bits(sign | (magnitude < 0x00800000u ? bn_float_bits(subnormal) : normal));
}

static inline uint16_t bn_float_to_half(float value)
{
    const uint32_t bits = bn_float_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    /* Below 2^-14 the half is a multiple of 2^-24, which is the spacing of floats at 0.5. */
    const uint32_t subnormal =
        bn_float_bits(bn_float_from_bits(magnitude) + 0.5f) - bn_float_bits(0.5f);
    /* Round 13 bits away: add just under a half, and the last kept bit to break ties to even.
     * From 65520 on this carries into the exponent of Inf. */
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u; /* NaN or Inf */
    const uint32_t half = magnitude < 0x38800000u   ? subnormal
                          : magnitude < 0x47800000u ? normal
                                                    : large;
    return (uint16_t)(sign | half);
}

/* bfloat16: the upper half of a float. */
static inline float bn_bfloat16_to_float(uint16_t value)
{
    return bn_float_from_bits((uint32_t)value << 16);
}

static inline uint16_t bn_float_to_bfloat16(float value)
{
    const uint32_t bits = bn_float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded);
}

#endif
