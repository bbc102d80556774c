/* decode, AVX2.
 *
 * Method   A group has four values, one per code: they are computed once, and vpermilps looks them up
 *          by bits 1..0 of each lane.  Four bytes are repeated in all lanes; shifts by 0, 2 .. 14 and
 *          by 16, 18 .. 30 bring codes 0 to 7 and 8 to 15 down there.
 */
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

enum { STEP = 16 };

static inline void step(uint32_t bytes, __m256 values, float *out, int add)
{
    const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    const __m256i all = _mm256_set1_epi32((int)bytes);
    const __m256i codes[2] = {_mm256_srlv_epi32(all, shift),
                              _mm256_srlv_epi32(_mm256_srli_epi32(all, 16), shift)};

    for (int half = 0; half < 2; half++) {
        const __m256 value = _mm256_permutevar_ps(values, codes[half]);
        float *to = out + 8 * half;
        _mm256_storeu_ps(to, add ? _mm256_add_ps(_mm256_loadu_ps(to), value) : value);
    }
}

static inline void decode_group(const uint8_t *packed, size_t count, __m256 values, float *out, int add)
{
    uint32_t bytes = 0;
    size_t i = 0;

    for (; i + STEP <= count; i += STEP) {
        memcpy(&bytes, packed + i / 4, sizeof bytes);
        step(bytes, values, out + i, add);
    }
    if (i < count) {
        float tail[STEP] = {0};
        memcpy(&bytes, packed + i / 4, bn_row_bytes(count - i));
        memcpy(tail, out + i, (count - i) * sizeof *out);
        step(bytes, values, tail, add);
        memcpy(out + i, tail, (count - i) * sizeof *out);
    }
}

void bn_decode_i2s_avx2(const bn_decode_args *a)
{
    const __m256 codes = _mm256_setr_ps(0, 1, 2, 3, 0, 1, 2, 3);

    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t start = g * a->groups.length;
        const __m256 shifted = _mm256_sub_ps(codes, _mm256_set1_ps(a->zero_point[g]));
        const __m256 values = _mm256_mul_ps(shifted, _mm256_set1_ps(a->scale[g]));
        decode_group(a->packed + start / 4, bn_group_length(&a->groups, g), values, a->out + start,
                     a->add);
    }
}
