/* dot with codes of 4 bits, in plain C. */
#include "dot_wide_scalar.h"

static const uint8_t *add_group(const bn_dot_args *a, const uint8_t *panel, const int8_t *q, size_t steps,
                                int32_t *acc)
{
    return bn_add_wide_group(a, panel, q, steps, acc, 4);
}

void bn_dot_w4_scalar(const bn_dot_args *a)
{
    bn_dot_scalar(a, add_group);
}
