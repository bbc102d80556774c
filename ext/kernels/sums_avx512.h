/* Sums of up to eight rows of a strip, each with up to four vectors of AVX-512 side by side, as they begin and
 * end in memory. */
#ifndef BN_SUMS_AVX512_H
#define BN_SUMS_AVX512_H

#include <immintrin.h>

#include "strips.h"

BN_INLINE void bn_begin_sums(const bn_strip *s, __m512i sum[4][8], const int rows, const int panels)
{
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            const int32_t *from = (const int32_t *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            sum[i][row] = s->fresh ? _mm512_setzero_si512() : _mm512_loadu_si512(from);
        }
    }
}

BN_INLINE void bn_store_sums(const bn_strip *s, __m512i sum[4][8], const int rows, const int panels)
{
#pragma GCC unroll 4
    for (int i = 0; i < panels; i++) {
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            int32_t *to = (int32_t *)s->acc + (size_t)row * s->acc_stride + i * BN_PANEL;
            _mm512_storeu_si512(to, sum[i][row]);
        }
    }
}

#endif
