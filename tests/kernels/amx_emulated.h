/* The tile instructions of AMX that our kernels use, in plain C, so that a kernel's source can be run
 * on a CPU without them: compile it with  -include amx_emulated.h.  Written from the description of the
 * instructions in Intel's manual; what would be an exception there ends the program here.
 *
 * bn_emulated_state() hands out the state, to set it before a call and look at it afterwards. */
#ifndef AMX_EMULATED_H
#define AMX_EMULATED_H

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint8_t config[64]; /* as stored by sttilecfg: palette, start row, bytes per row, rows */
    uint8_t tile[8][16][64];
    uint64_t configured; /* counts ldtilecfg */
} emulated_state;

/* Weak: all sources of a program have one state per thread. */
__attribute__((weak)) _Thread_local emulated_state emulated;

__attribute__((weak)) emulated_state *bn_emulated_state(void);

emulated_state *bn_emulated_state(void)
{
    return &emulated;
}

static inline void emulated_require(int condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "emulated AMX: %s\n", what);
        abort();
    }
}

static inline int emulated_rows(int tile)
{
    return emulated.config[48 + tile];
}

static inline int emulated_bytes(int tile)
{
    return emulated.config[16 + 2 * tile] | emulated.config[17 + 2 * tile] << 8;
}

static inline void emulated_need(int tile)
{
    emulated_require(emulated.config[0] == 1 && tile >= 0 && tile < 8 && emulated_rows(tile) > 0,
                     "a tile that is not configured");
    emulated_require(emulated_bytes(tile) % 4 == 0, "rows of broken words");
}

static inline void emulated_release(void)
{
    memset(emulated.config, 0, sizeof emulated.config);
    memset(emulated.tile, 0, sizeof emulated.tile);
}

static inline void emulated_loadconfig(const void *from)
{
    const uint8_t *config = from;

    emulated_release();
    emulated.configured++;
    if (config[0] == 0) {
        return;
    }
    emulated_require(config[0] == 1, "ldtilecfg: an unknown palette");
    for (int i = 2; i < 64; i++) {
        const int is_free = i < 16 || (i >= 32 && i < 48) || i >= 56;
        emulated_require(!is_free || config[i] == 0, "ldtilecfg: a reserved byte is set");
    }
    memcpy(emulated.config, config, sizeof emulated.config);
    for (int tile = 0; tile < 8; tile++) {
        emulated_require(emulated_rows(tile) <= 16 && emulated_bytes(tile) <= 64,
                         "ldtilecfg: a tile is too large");
        emulated_require((emulated_rows(tile) == 0) == (emulated_bytes(tile) == 0),
                         "ldtilecfg: a tile of rows without bytes");
    }
}

static inline void emulated_storeconfig(void *to)
{
    memcpy(to, emulated.config, sizeof emulated.config);
}

static inline void emulated_zero(int tile)
{
    emulated_need(tile);
    memset(emulated.tile[tile], 0, sizeof emulated.tile[tile]);
}

static inline void emulated_load(int tile, const void *base, size_t stride)
{
    emulated_zero(tile);
    for (int row = 0; row < emulated_rows(tile); row++) {
        memcpy(emulated.tile[tile][row], (const char *)base + (size_t)row * stride,
               (size_t)emulated_bytes(tile));
    }
}

static inline void emulated_store(int tile, void *base, size_t stride)
{
    emulated_need(tile);
    for (int row = 0; row < emulated_rows(tile); row++) {
        memcpy((char *)base + (size_t)row * stride, emulated.tile[tile][row],
               (size_t)emulated_bytes(tile));
    }
}

/* tdpbsud: sums (m, n) += signed bytes a (m, 4 k) times unsigned bytes b (k, 4 n). */
static inline void emulated_dpbsud(int sums, int a, int b)
{
    const int m = emulated_rows(sums), n = emulated_bytes(sums) / 4, k = emulated_rows(b);

    emulated_need(sums);
    emulated_need(a);
    emulated_need(b);
    emulated_require(sums != a && sums != b && a != b, "tdpbsud: one tile twice");
    emulated_require(m == emulated_rows(a) && 4 * n == emulated_bytes(b) && 4 * k == emulated_bytes(a),
                     "tdpbsud: shapes do not match");
    for (int row = 0; row < m; row++) {
        for (int column = 0; column < n; column++) {
            uint32_t sum;
            memcpy(&sum, &emulated.tile[sums][row][4 * column], sizeof sum);
            for (int i = 0; i < 4 * k; i++) {
                const int x = (int8_t)emulated.tile[a][row][i];
                sum += (uint32_t)(x * emulated.tile[b][i / 4][4 * column + i % 4]);
            }
            memcpy(&emulated.tile[sums][row][4 * column], &sum, sizeof sum);
        }
    }
    for (int row = m; row < 16; row++) {
        memset(emulated.tile[sums][row], 0, 64);
    }
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated_loadconfig
#define _tile_storeconfig emulated_storeconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbsud emulated_dpbsud

#endif
