/* widen, NEON. */
#include "half.h"
#include "simd_neon.h"

void bn_widen_f16_neon(const bn_widen_args *a)
{
    size_t i = 0;

    for (; i + 4 <= a->count; i += 4) {
        vst1q_f32(a->y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(a->x + i))));
    }
    for (; i < a->count; i++) {
        a->y[i] = bn_half_to_float(a->x[i]);
    }
}
