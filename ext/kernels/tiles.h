/* AMX's tile registers: their configuration, and the instructions made safe for compilers. */
#ifndef BN_TILES_H
#define BN_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernel.h"

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; /* of tile 0 .. 7; the others stay 0 */
    uint8_t rows[16];
} bn_tile_config;

/* gcc's intrinsics do not tell it which memory they touch: of a configuration 8 of 64 bytes, of a
 * tile nothing, so that it would drop the stores that a tile is loaded from.  These do. */
#if defined(__GNUC__)
#define BN_ALL_READ(config) __asm__ volatile("" : : "m"(*(config)))
#define BN_ALL_WRITTEN(config) __asm__ volatile("" : "=m"(*(config)))
#define BN_MEMORY() __asm__ volatile("" : : : "memory")
#else
#define BN_ALL_READ(config) ((void)0)
#define BN_ALL_WRITTEN(config) ((void)0)
#define BN_MEMORY() ((void)0)
#endif

/* Rows of a tile from and to memory, `stride` bytes apart; the tile's number is a literal. */
#define BN_LOAD_TILE(tile, from, stride)                                                            \
    do {                                                                                            \
        BN_MEMORY();                                                                                \
        _tile_loadd(tile, from, stride);                                                            \
    } while (0)
#define BN_STORE_TILE(tile, to, stride)                                                             \
    do {                                                                                            \
        _tile_stored(tile, to, stride);                                                             \
        BN_MEMORY();                                                                                \
    } while (0)

static inline bn_tile_config bn_get_tiles(void)
{
    bn_tile_config config;
    _tile_storeconfig(&config);
    BN_ALL_WRITTEN(&config);
    return config;
}

/* Loading takes some 200 cycles and clears the tiles, storing 20. */
static inline void bn_set_tiles(const bn_tile_config *config)
{
    const bn_tile_config now = bn_get_tiles();
    if (memcmp(&now, config, sizeof now) != 0) {
        BN_ALL_READ(config);
        _tile_loadconfig(config);
    }
}

#endif
