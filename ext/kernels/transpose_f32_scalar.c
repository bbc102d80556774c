/* transpose, scalar. */
#include "kernel.h"

void bn_transpose_f32_scalar(const bn_transpose_args *a)
{
    for (size_t col = 0; col < a->cols; col++) {
        for (size_t row = 0; row < a->rows; row++) {
            a->y[col * a->y_stride + row] = a->x[row * a->x_stride + col];
        }
    }
}
