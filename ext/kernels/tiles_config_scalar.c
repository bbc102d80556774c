/* tiles, where dot needs none. */
#include "kernel.h"

void bn_tiles_config_scalar(bn_tiles_args *a)
{
    (void)a;
}
