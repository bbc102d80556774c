/* dot, in plain C, written so that a compiler can vectorize it with any instruction set.
 *
 * Method   A byte lane of a vector (layout.h) meets its four activations one field after the other;
 *          the products of up to STEPS steps are added in 16 bits, then four lanes make an output.
 * Numbers  A product is at most 3 * 128 = 384 in magnitude and a lane adds four per step:
 *          21 * 4 * 384 = 32256 fits 16 bits.
 */
#include "dot_scalar.h"

enum { STEPS = 21, TILE = 16 };

/* The activations of a step, repeated for the lanes of four outputs. */
typedef struct {
    int16_t x[4][TILE];
} tile;

static tile make_tile(const int8_t *q)
{
    tile t;
    for (int field = 0; field < 4; field++) {
        for (int lane = 0; lane < TILE; lane++) {
            t.x[field][lane] = q[4 * field + lane % 4];
        }
    }
    return t;
}

static void add_vector(const uint8_t *vector, const tile *t, int16_t *sum)
{
    for (int first = 0; first < BN_VECTOR; first += TILE) {
        for (int lane = 0; lane < TILE; lane++) {
            const int code = vector[first + lane];
            const int product = (code & 3) * t->x[0][lane] + (code >> 2 & 3) * t->x[1][lane] +
                                (code >> 4 & 3) * t->x[2][lane] + (code >> 6) * t->x[3][lane];
            sum[first + lane] = (int16_t)(sum[first + lane] + product);
        }
    }
}

static void add_steps(const uint8_t *vector, const int8_t *q, size_t steps, size_t panels,
                      int32_t *acc)
{
    int16_t sum[BN_SUPER * 4] = {0};

    for (size_t step = 0; step < steps; step++) {
        const tile t = make_tile(q + step * BN_STEP);
        for (size_t panel = 0; panel < panels; panel++, vector += BN_VECTOR) {
            add_vector(vector, &t, sum + panel * BN_VECTOR);
        }
    }
    for (size_t i = 0; i < panels * BN_PANEL; i++) {
        acc[i] += sum[4 * i] + sum[4 * i + 1] + sum[4 * i + 2] + sum[4 * i + 3];
    }
}

static const uint8_t *add_group(const bn_dot_args *a, const uint8_t *panel, const int8_t *q, size_t steps,
                                int32_t *acc)
{
    for (size_t step = 0; step < steps; step += STEPS) {
        add_steps(panel + step * a->panels * BN_VECTOR, q + step * BN_STEP,
                  steps - step < STEPS ? steps - step : STEPS, a->panels, acc);
    }
    return panel + steps * a->panels * BN_VECTOR;
}

void bn_dot_i2s_scalar(const bn_dot_args *a)
{
    bn_dot_scalar(a, add_group);
}
