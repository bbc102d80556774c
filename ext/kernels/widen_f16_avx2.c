/* widen, F16C. */
#include <immintrin.h>

#include "half.h"
#include "kernel.h"

void bn_widen_f16_avx2(const bn_widen_args *a)
{
    size_t i = 0;

    for (; i + 8 <= a->count; i += 8) {
        const __m128i halves = _mm_loadu_si128((const __m128i *)(a->x + i));
        _mm256_storeu_ps(a->y + i, _mm256_cvtph_ps(halves));
    }
    for (; i < a->count; i++) {
        a->y[i] = bn_half_to_float(a->x[i]);
    }
}
