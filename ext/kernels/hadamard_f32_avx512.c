/* hadamard, AVX-512.
 *
 * Method   Strides 1 to 8 swap lanes within a register; larger blocks see hadamard_wide.h.
 *          Blocks of 2 to 8 lie side by side in a register; the last one may be cut by a mask.
 * Numbers  Within a register a pair (a, b) meets its swapped self (b, a): 1 * a + b and -1 * b + a.
 *          The products are exact, so the fused operation rounds once, like a + b and a - b.
 * Measured GB/s read and written, one core of a Zen 5 with gcc 12, x of 256 KiB: blocks of 8 140,
 *          32 111, 64 95, 128 91, 256 85, 1024 60.  x of 128 MiB, on a busy machine: blocks of 32 to
 *          256 15 to 28, memcpy 18 to 24.
 */
#include "simd_avx512.h"
#include "hadamard_wide.h"

/* 1 in each lane, -1 in those of the mask. */
static inline __m512 plus_minus(__mmask16 minus)
{
    return _mm512_mask_blend_ps(minus, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
}

/* The stages with strides up to width / 2, at most 8. */
BN_INLINE bn_floats within(bn_floats v, const size_t width)
{
    if (width >= 2) {
        v = _mm512_fmadd_ps(v, plus_minus(0xAAAA), _mm512_permute_ps(v, 0xB1));
    }
    if (width >= 4) {
        v = _mm512_fmadd_ps(v, plus_minus(0xCCCC), _mm512_permute_ps(v, 0x4E));
    }
    if (width >= 8) {
        v = _mm512_fmadd_ps(v, plus_minus(0xF0F0), _mm512_shuffle_f32x4(v, v, 0xB1));
    }
    if (width >= 16) {
        v = _mm512_fmadd_ps(v, plus_minus(0xFF00), _mm512_shuffle_f32x4(v, v, 0x4E));
    }
    return v;
}

BN_INLINE bn_floats within_vector(bn_floats v)
{
    return within(v, BN_FLOATS);
}

BN_INLINE bn_floats side_by_side(bn_floats x, bn_floats signs, const size_t block, bn_floats scale)
{
    return bn_mul(within(bn_mul(x, signs), block), scale);
}

/* Rows of blocks of less than 16 values; block is a constant.  Masked stores are slow, so only the
 * end of a row has one. */
BN_INLINE void narrow(const bn_hadamard_args *a, size_t block)
{
    const bn_floats scale = bn_all(bn_hadamard_scale(block));
    const size_t whole = a->k / BN_FLOATS * BN_FLOATS;
    const __mmask16 rest = (__mmask16)((1u << (a->k - whole)) - 1);

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < whole; at += BN_FLOATS) {
            const bn_floats signs = bn_load_floats(a->signs + at);
            bn_store_floats(y + at, side_by_side(bn_load_floats(x + at), signs, block, scale));
        }
        if (rest) {
            const bn_floats end = _mm512_maskz_loadu_ps(rest, x + whole);
            const bn_floats signs = _mm512_maskz_loadu_ps(rest, a->signs + whole);
            _mm512_mask_storeu_ps(y + whole, rest, side_by_side(end, signs, block, scale));
        }
    }
}

void bn_hadamard_f32_avx512(const bn_hadamard_args *a)
{
    switch (a->block) {
    case 1: narrow(a, 1); break;
    case 2: narrow(a, 2); break;
    case 4: narrow(a, 4); break;
    case 8: narrow(a, 8); break;
    default: bn_hadamard_wide(a, within_vector); break;
    }
}
