/* assign, AVX2.
 *
 * Method   32 weights per step.  Comparisons give 0 or -1 in 32 bits, so codes are sums of them.  Four
 *          vectors of codes are packed to bytes, which mixes their halves but keeps fours together;
 *          two multiply-adds (by 1, 4 and then 1, 16) make a byte of each four, and a shuffle and an
 *          interleave put these in order.  A rest of fewer than 32 goes through a buffer of zeros:
 *          zeros get code 1, which is the padding.
 */
#include <immintrin.h>
#include <string.h>

#include "kernel.h"

enum { STEP = 32 };

typedef struct {
    __m256 factor, low, high, negative, scale;
} constants;

/* t of eight weights. */
static inline __m256i levels(__m256 w, const constants *c)
{
    const __m256 scaled = _mm256_mul_ps(w, c->factor);
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(scaled, c->low, _CMP_GT_OQ));
    const __m256i far = _mm256_castps_si256(_mm256_cmp_ps(scaled, c->high, _CMP_GT_OQ));
    const __m256i below = _mm256_castps_si256(_mm256_cmp_ps(scaled, c->negative, _CMP_LT_OQ));
    return _mm256_sub_epi32(below, _mm256_add_epi32(above, far));
}

/* Eight bytes of 32 levels. */
static inline __m128i pack(const __m256i t[4])
{
    const __m256i bytes = _mm256_add_epi8(
        _mm256_packs_epi16(_mm256_packs_epi32(t[0], t[1]), _mm256_packs_epi32(t[2], t[3])),
        _mm256_set1_epi8(1));
    const __m256i twos = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0401));
    const __m256i fours = _mm256_madd_epi16(twos, _mm256_set1_epi32(0x00100001));
    const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                                           0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i gathered = _mm256_shuffle_epi8(fours, first);
    return _mm_unpacklo_epi8(_mm256_castsi256_si128(gathered), _mm256_extracti128_si256(gathered, 1));
}

static inline __m128i step(const float *w, float *rest, const constants *c)
{
    __m256i t[4];

    for (int i = 0; i < 4; i++) {
        const __m256 v = _mm256_loadu_ps(w + 8 * i);
        t[i] = levels(v, c);
        if (rest != NULL) {
            const __m256 covered = _mm256_mul_ps(c->scale, _mm256_cvtepi32_ps(t[i]));
            _mm256_storeu_ps(rest + 8 * i, _mm256_sub_ps(v, covered));
        }
    }
    return pack(t);
}

static inline void assign_group(const float *w, size_t count, const bn_step *s, uint8_t *packed,
                                float *rest)
{
    const constants c = {_mm256_set1_ps(s->factor), _mm256_set1_ps(s->low), _mm256_set1_ps(s->high),
                         _mm256_set1_ps(-s->low), _mm256_set1_ps(s->scale)};
    size_t i = 0;

    for (; i + STEP <= count; i += STEP) {
        const __m128i bytes = step(w + i, rest == NULL ? NULL : rest + i, &c);
        if (packed != NULL) {
            _mm_storel_epi64((__m128i *)(packed + i / 4), bytes);
        }
    }
    if (i < count) {
        float tail[STEP] = {0}, tail_rest[STEP];
        uint8_t bytes[16];
        memcpy(tail, w + i, (count - i) * sizeof *w);
        _mm_storeu_si128((__m128i *)bytes, step(tail, tail_rest, &c));
        if (packed != NULL) {
            memcpy(packed + i / 4, bytes, bn_row_bytes(count - i));
        }
        if (rest != NULL) {
            memcpy(rest + i, tail_rest, (count - i) * sizeof *rest);
        }
    }
}

void bn_assign_i2s_avx2(const bn_assign_args *a)
{
    for (size_t g = 0; g < a->groups.count; g++) {
        const size_t start = g * a->groups.length;
        assign_group(a->w + start, bn_group_length(&a->groups, g), &a->steps[g],
                     a->packed == NULL ? NULL : a->packed + start / 4,
                     a->rest == NULL ? NULL : a->rest + start);
    }
}
