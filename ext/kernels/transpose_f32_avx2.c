/* transpose, AVX2.
 *
 * Method   Squares of 8 x 8: pairs of rows are interleaved by element, then by pair, then halves of
 *          vectors change places.  What is left at the right and below goes element by element.
 */
#include <immintrin.h>

#include "kernel.h"

static inline __m256 pairs(__m256 a, __m256 b, int high)
{
    const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
    return _mm256_castpd_ps(high ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
}

static inline void square(const float *x, size_t x_stride, float *y, size_t y_stride)
{
    __m256 row[8], mixed[8];

    for (int i = 0; i < 8; i++) {
        row[i] = _mm256_loadu_ps(x + (size_t)i * x_stride);
    }
    for (int i = 0; i < 8; i += 4) {
        const __m256 low01 = _mm256_unpacklo_ps(row[i], row[i + 1]);
        const __m256 high01 = _mm256_unpackhi_ps(row[i], row[i + 1]);
        const __m256 low23 = _mm256_unpacklo_ps(row[i + 2], row[i + 3]);
        const __m256 high23 = _mm256_unpackhi_ps(row[i + 2], row[i + 3]);
        mixed[i] = pairs(low01, low23, 0);
        mixed[i + 1] = pairs(low01, low23, 1);
        mixed[i + 2] = pairs(high01, high23, 0);
        mixed[i + 3] = pairs(high01, high23, 1);
    }
    for (int i = 0; i < 4; i++) {
        const __m256 top = _mm256_permute2f128_ps(mixed[i], mixed[i + 4], 0x20);
        const __m256 bottom = _mm256_permute2f128_ps(mixed[i], mixed[i + 4], 0x31);
        _mm256_storeu_ps(y + (size_t)i * y_stride, top);
        _mm256_storeu_ps(y + (size_t)(i + 4) * y_stride, bottom);
    }
}

void bn_transpose_f32_avx2(const bn_transpose_args *a)
{
    const size_t rows = a->rows - a->rows % 8, cols = a->cols - a->cols % 8;

    for (size_t row = 0; row < rows; row += 8) {
        for (size_t col = 0; col < cols; col += 8) {
            square(a->x + row * a->x_stride + col, a->x_stride, a->y + col * a->y_stride + row,
                   a->y_stride);
        }
    }
    for (size_t col = 0; col < a->cols; col++) {
        for (size_t row = col < cols ? rows : 0; row < a->rows; row++) {
            a->y[col * a->y_stride + row] = a->x[row * a->x_stride + col];
        }
    }
}
