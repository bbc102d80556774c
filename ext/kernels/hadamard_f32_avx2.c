/* hadamard, AVX2.
 *
 * Method   Strides 1 to 4 swap lanes within a register; larger blocks see hadamard_wide.h.
 *          Blocks of 2 and 4 lie side by side in a register; the last one may be cut by a mask.
 * Numbers  Within a register a pair (a, b) meets its swapped self (b, a): 1 * a + b and -1 * b + a.
 *          The products are exact, so the fused operation rounds once, like a + b and a - b.
 * Measured GB/s read and written, one core of a Zen 5 with gcc 12, x of 256 KiB: blocks of 8 86,
 *          32 63, 64 60, 128 52 (45 with 8 registers and one stage in memory), 1024 35.
 *          x of 128 MiB, on a busy machine: blocks of 32 to 256 14 to 28, memcpy 18 to 24.
 */
#include "simd_avx2.h"
#include "hadamard_wide.h"

/* The stages with strides up to width / 2, at most 4. */
BN_INLINE bn_floats within(bn_floats v, const size_t width)
{
    if (width >= 2) {
        const bn_floats signs = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute_ps(v, 0xB1));
    }
    if (width >= 4) {
        const bn_floats signs = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute_ps(v, 0x4E));
    }
    if (width >= 8) {
        const bn_floats signs = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        v = _mm256_fmadd_ps(v, signs, _mm256_permute2f128_ps(v, v, 0x01));
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

/* Rows of blocks of less than 8 values; block is a constant.  Masked stores are slow, so only the
 * end of a row has one. */
BN_INLINE void narrow(const bn_hadamard_args *a, size_t block)
{
    const bn_floats scale = bn_all(bn_hadamard_scale(block));
    const size_t whole = a->k / BN_FLOATS * BN_FLOATS;
    const __m256i rest = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(a->k - whole)),
                                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));

    for (size_t row = 0; row < a->rows; row++) {
        const float *x = a->x + row * a->k;
        float *y = a->y + row * a->k;
        for (size_t at = 0; at < whole; at += BN_FLOATS) {
            const bn_floats signs = bn_load_floats(a->signs + at);
            bn_store_floats(y + at, side_by_side(bn_load_floats(x + at), signs, block, scale));
        }
        if (whole < a->k) {
            const bn_floats end = _mm256_maskload_ps(x + whole, rest);
            const bn_floats signs = _mm256_maskload_ps(a->signs + whole, rest);
            _mm256_maskstore_ps(y + whole, rest, side_by_side(end, signs, block, scale));
        }
    }
}

void bn_hadamard_f32_avx2(const bn_hadamard_args *a)
{
    switch (a->block) {
    case 1: narrow(a, 1); break;
    case 2: narrow(a, 2); break;
    case 4: narrow(a, 4); break;
    default: bn_hadamard_wide(a, within_vector); break;
    }
}
