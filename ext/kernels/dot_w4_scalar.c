/* dot with codes of 4 bits, in plain C. */
#include "dot_wide_scalar.h"

void bn_dot_w4_scalar(const bn_dot_args *a)
{
    bn_dot_wide_scalar(a, 4);
}
