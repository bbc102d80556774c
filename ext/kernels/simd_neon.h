/* What the NEON kernels share: the codes of a panel, and vectors of floats by names that are the same in
 * the header of each instruction set, for kernels whose shape is (attention_wide.h, hadamard_wide.h, scale_groups.h).
 *
 * Layout   A quarter of a vector of a panel (layout.h), 16 bytes, is 4 outputs x 16 inputs: byte
 *          4i + j holds the codes of inputs j, 4 + j, 8 + j and 12 + j of output i, in fields 0 to
 *          3 from the lowest bits on. */
#ifndef BN_SIMD_NEON_H
#define BN_SIMD_NEON_H

#include <arm_neon.h>

#include "kernel.h"

enum {
    BN_QUARTER = 16, /* bytes */
    BN_QUARTER_OUTPUTS = 4,
    BN_QUARTERS = 4 /* in a vector */
};

/* No load moves across it.  Without it gcc, which schedules before it assigns registers, loads
 * ahead until it runs out of them and spills in the innermost loops. */
#if defined(_MSC_VER)
#define BN_ORDER_LOADS() ((void)0)
#else
#define BN_ORDER_LOADS() __asm__ volatile("" ::: "memory")
#endif

/* Each field of a quarter as bytes 0 to 3. */
typedef struct {
    int8x16_t field[4];
} bn_fields;

BN_INLINE bn_fields bn_unpack(uint8x16_t codes)
{
    const uint8x16_t low2 = vdupq_n_u8(3);
    return (bn_fields){{
        vreinterpretq_s8_u8(vandq_u8(codes, low2)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 2), low2)),
        vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(codes, 4), low2)),
        vreinterpretq_s8_u8(vshrq_n_u8(codes, 6)),
    }};
}

/* A field of a quarter with codes of 4 or 8 bits; `at` is the quarter's place in the first vector of
 * 16 outputs x 16 inputs. */
BN_INLINE uint8x16_t bn_wide_field(const uint8_t *at, const int field, const int bits)
{
    const uint8x16_t codes = vld1q_u8(at + field * bits / 8 * BN_VECTOR);

    if (bits == 8) {
        return codes;
    }
    return field % 2 ? vshrq_n_u8(codes, 4) : vandq_u8(codes, vdupq_n_u8(15));
}

typedef float32x4_t bn_floats;

enum { BN_FLOATS = 4 };

BN_INLINE bn_floats bn_load_floats(const float *from)
{
    return vld1q_f32(from);
}

BN_INLINE void bn_store_floats(float *to, bn_floats v)
{
    vst1q_f32(to, v);
}

BN_INLINE bn_floats bn_all(float value)
{
    return vdupq_n_f32(value);
}

BN_INLINE bn_floats bn_add(bn_floats a, bn_floats b)
{
    return vaddq_f32(a, b);
}

BN_INLINE bn_floats bn_sub(bn_floats a, bn_floats b)
{
    return vsubq_f32(a, b);
}

BN_INLINE bn_floats bn_mul(bn_floats a, bn_floats b)
{
    return vmulq_f32(a, b);
}

/* a * b + c, rounded once. */
BN_INLINE bn_floats bn_fma(bn_floats a, bn_floats b, bn_floats c)
{
    return vfmaq_f32(c, a, b);
}

/* The larger one; where b is NaN, that. */
BN_INLINE bn_floats bn_max(bn_floats a, bn_floats b)
{
    return vmaxq_f32(a, b);
}

#endif
