/* tiles, AMX.
 *
 * ONNX Runtime configures its own tiles once per thread and trusts them to stay, so what was there
 * comes back.  What tiles held is lost, as in any call of a function (System V ABI).  A thread that
 * had none has none again, which spares the OS 8 KiB at each switch. */
#include "tiles.h"

void bn_tiles_config_amx(bn_tiles_args *a)
{
    bn_tile_config config;

    if (!a->back) {
        config = bn_get_tiles();
        memcpy(a->config, &config, sizeof config);
        return;
    }
    memcpy(&config, a->config, sizeof config);
    if (config.palette == 0) {
        _tile_release();
    } else {
        bn_set_tiles(&config);
    }
}
