/* dot, scalar: the definition of the op in plain C. */
#include "kernel.h"

/* 16 outputs x 16 inputs; the sum of 16 products is at most 16 * 3 * 128. */
static void add_vector(const uint8_t *vector, const int8_t *q, int32_t *acc)
{
    for (int output = 0; output < BN_PANEL; output++) {
        int sum = 0;
        for (int i = 0; i < BN_STEP; i++) {
            sum += (vector[4 * output + i % 4] >> (2 * (i / 4)) & 3) * q[i];
        }
        acc[output] += sum;
    }
}

void bn_dot_i2s_scalar(const bn_dot_args *a)
{
    int32_t *acc = a->acc;

    for (size_t row = 0; row < a->rows; row++) {
        const uint8_t *vector = a->panel;
        for (size_t step = 0; step < a->steps; step++) {
            if (step % a->group_steps == 0) {
                acc += step ? BN_SUPER : 0;
                for (size_t i = 0; i < a->panels * BN_PANEL; i++) {
                    acc[i] = 0;
                }
            }
            for (size_t panel = 0; panel < a->panels; panel++, vector += BN_VECTOR) {
                add_vector(vector, a->q + row * a->q_stride + step * BN_STEP,
                           acc + panel * BN_PANEL);
            }
        }
        acc += BN_SUPER;
    }
}
