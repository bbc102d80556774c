/* narrow, F16C. */
#include <immintrin.h>

#include "half.h"
#include "kernel.h"

void bn_narrow_f16_avx2(const bn_narrow_args *a)
{
    size_t i = 0;

    for (; i + 8 <= a->count; i += 8) {
        const __m256 floats = _mm256_loadu_ps(a->x + i);
        _mm_storeu_si128((__m128i *)(a->y + i),
                         _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    for (; i < a->count; i++) {
        a->y[i] = bn_float_to_half(a->x[i]);
    }
}
