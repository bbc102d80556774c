/* attention, scalar. */
#include <math.h>
#include <string.h>

#include "exponential.h"

static float exp_of(float x)
{
    const float least = BN_EXP_LEAST;
    const float inside = x < least ? least : x;
    const float shifted = fmaf(inside, BN_EXP_LOG2E, BN_EXP_SHIFT);
    const float n = shifted - BN_EXP_SHIFT;
    const float r = fmaf(n, -BN_EXP_LN2_LOW, fmaf(n, -BN_EXP_LN2_HIGH, inside));
    float p = fmaf(BN_EXP_C6, r, BN_EXP_C5), power;
    uint32_t bits;

    p = fmaf(p, r, BN_EXP_C4);
    p = fmaf(p, r, BN_EXP_C3);
    p = fmaf(p, r, BN_EXP_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + BN_EXP_ONE_BITS;
    memcpy(&power, &bits, sizeof power);
    return x < least ? 0.0f : p * power;
}

/* Turns scores into their exponentials; returns what they are to be multiplied with. */
static float softmax(const bn_attention_args *a, float most)
{
    float *scores = a->scores;
    float lane[16] = {0};

    for (size_t t = 0; t < a->tokens; t++) {
        scores[t] = exp_of(scores[t] - most);
        lane[t % 16] += scores[t];
    }
    for (size_t half = 8; half > 0; half /= 2) {
        for (size_t j = 0; j < half; j++) {
            lane[j] += lane[j + half];
        }
    }
    if (a->nan_to_zero && isnan(lane[0])) {
        memset(scores, 0, a->tokens * sizeof *scores);
        return 1.0f;
    }
    return 1.0f / lane[0];
}

void bn_attention_f32_scalar(const bn_attention_args *a)
{
    for (size_t row = 0; row < a->rows; row++) {
        const float *q = a->q + row * a->q_stride;
        float *y = a->y + row * a->y_stride;
        float most = -INFINITY;

        for (size_t t = 0; t < a->tokens; t++) {
            const float *k = a->keys + t / BN_KEYS * a->width * BN_KEYS + t % BN_KEYS;
            float score = 0.0f;
            for (size_t i = 0; i < a->width; i++) {
                score = fmaf(q[i], k[i * BN_KEYS], score);
            }
            a->scores[t] = fmaf(score, a->scale, a->mask[row * a->mask_stride + t]);
            most = a->scores[t] > most ? a->scores[t] : most;
        }
        const float factor = softmax(a, most);
        for (size_t i = 0; i < a->value_width; i++) {
            float sum = 0.0f;
            for (size_t t = 0; t < a->tokens; t++) {
                sum = fmaf(a->scores[t], a->values[t * a->value_stride + i], sum);
            }
            y[i] = sum * factor;
        }
    }
}
