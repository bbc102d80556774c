/* narrow, NEON. */
#include "half.h"
#include "simd_neon.h"

void bn_narrow_f16_neon(const bn_narrow_args *a)
{
    size_t i = 0;

    for (; i + 4 <= a->count; i += 4) {
        vst1_u16(a->y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(a->x + i))));
    }
    for (; i < a->count; i++) {
        a->y[i] = bn_float_to_half(a->x[i]);
    }
}
