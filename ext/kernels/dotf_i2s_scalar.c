/* dotf, scalar: the definition of the op in plain C. */
#include "kernel.h"

static void add_vector(const uint8_t *vector, const float *x, float *acc)
{
    for (int output = 0; output < BN_PANEL; output++) {
        float sum = 0.0f;
        for (int i = 0; i < BN_STEP; i++) {
            const int code = vector[4 * output + i % 4] >> (2 * (i / 4)) & 3;
            sum += (float)(code - 1) * x[i];
        }
        acc[output] += sum;
    }
}

void bn_dotf_i2s_scalar(const bn_dotf_args *a)
{
    float *acc = a->acc;

    for (size_t row = 0; row < a->rows; row++) {
        const uint8_t *vector = a->panel;
        for (size_t step = 0; step < a->steps; step++) {
            if (step % a->group_steps == 0) {
                acc += step ? BN_SUPER : 0;
                for (size_t i = 0; i < a->panels * BN_PANEL; i++) {
                    acc[i] = 0.0f;
                }
            }
            for (size_t panel = 0; panel < a->panels; panel++, vector += BN_VECTOR) {
                add_vector(vector, a->x + row * a->x_stride + step * BN_STEP,
                           acc + panel * BN_PANEL);
            }
        }
        acc += BN_SUPER;
    }
}
