/* The table of formats, and rows of codes to rows of bytes and back; see formats.h.
 *
 * Method  whole groups of codes first; the codes of a last, ragged group are packed together with
 *         ones, and unpacked to a group whose rest must be ones again.  Unpacking looks bytes up in
 *         tables that have an entry for each, so it runs first and what it gave is judged afterwards.
 * Speed   Zen 5, rows of 2560 on a busy machine, Gcodes/s: i2s 13, tl1 10, tl2 6, t5 8. */
#include "formats.h"

#include <string.h>

#include "layout.h"

#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

static const char BAD_PADDING[] =
    "weight: a code past K is not 1, the bytes are corrupt or of another format";
static const char NOT_TERNARY[] = "weight: a code is not 0, 1 or 2; only i2s holds four levels";

static bool all_at_most(const uint8_t *values, size_t count, uint8_t most)
{
    uint8_t greatest = 0; /* a byte, so that vectors of bytes will do */
    for (size_t i = 0; i < count; i++) {
        greatest = values[i] > greatest ? values[i] : greatest;
    }
    return greatest <= most;
}

static bool all_ones(const uint8_t *codes, size_t count)
{
    unsigned other = 0;
    for (size_t i = 0; i < count; i++) {
        other |= codes[i] != 1;
    }
    return !other;
}

/* 256 entries of a table, from b on. */
#define FOUR(entry, b) entry(b), entry((b) + 1), entry((b) + 2), entry((b) + 3)
#define SIXTEEN(entry, b)                                                                          \
    FOUR(entry, b), FOUR(entry, (b) + 4), FOUR(entry, (b) + 8), FOUR(entry, (b) + 12)
#define SIXTY_FOUR(entry, b)                                                                       \
    SIXTEEN(entry, b), SIXTEEN(entry, (b) + 16), SIXTEEN(entry, (b) + 32), SIXTEEN(entry, (b) + 48)
#define ALL_BYTES(entry, b)                                                                           \
    SIXTY_FOUR(entry, b), SIXTY_FOUR(entry, (b) + 64), SIXTY_FOUR(entry, (b) + 128),               \
        SIXTY_FOUR(entry, (b) + 192)

/* ---- i2s ---- */

void bn_pack_i2s(const uint8_t *codes, size_t k, uint8_t *row)
{
    for (size_t b = 0; b < k / 4; b++, codes += 4) {
        row[b] = (uint8_t)(codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6);
    }
    if (k % 4 != 0) {
        uint8_t last = 0x55; /* four times code 1 */
        for (unsigned i = 0; i < k % 4; i++) {
            last = (uint8_t)((last & ~(3u << 2 * i)) | (unsigned)(codes[i] << 2 * i));
        }
        row[k / 4] = last;
    }
}

#define I2S_CODES(b) {(b) & 3, (b) >> 2 & 3, (b) >> 4 & 3, (b) >> 6}
static const uint8_t i2s_codes[256][4] = {ALL_BYTES(I2S_CODES, 0)};

void bn_unpack_i2s(const uint8_t *row, size_t k, uint8_t *codes)
{
    for (size_t b = 0; b < k / 4; b++) {
        memcpy(codes + 4 * b, i2s_codes[row[b]], 4);
    }
    if (k % 4 != 0) {
        memcpy(codes + k / 4 * 4, i2s_codes[row[k / 4]], k % 4);
    }
}

const char *bn_i2s_check(const uint8_t *row, size_t k)
{
    const unsigned used = 2 * (unsigned)(k % 4);
    return used == 0 || row[k / 4] >> used == 0x55 >> used ? NULL : BAD_PADDING;
}

static const char *pack_i2s(const uint8_t *codes, size_t k, uint8_t *row)
{
    bn_pack_i2s(codes, k, row);
    return all_at_most(codes, k, 3) ? NULL : "weight: a code is not 0, 1, 2 or 3";
}

static const char *unpack_i2s(const uint8_t *row, size_t k, uint8_t *codes)
{
    bn_unpack_i2s(row, k, codes);
    return bn_i2s_check(row, k);
}

/* ---- tl1 and t5: groups of a few codes to a byte ---- */

enum { MOST_IN_BYTE = 5 };

INLINE const char *pack_bytes(const uint8_t *codes, size_t k, uint8_t *row, size_t group,
                              uint8_t (*pack)(const uint8_t *codes))
{
    uint8_t last[MOST_IN_BYTE] = {1, 1, 1, 1, 1};
    for (size_t b = 0; b < k / group; b++) {
        row[b] = pack(codes + group * b);
    }
    if (k % group != 0) {
        memcpy(last, codes + k / group * group, k % group);
        row[k / group] = pack(last);
    }
    return all_at_most(codes, k, 2) ? NULL : NOT_TERNARY;
}

/* table has `group` codes for each byte. */
INLINE const char *unpack_bytes(const uint8_t *row, size_t k, uint8_t *codes, size_t group,
                                const uint8_t *table, const char *invalid)
{
    const size_t whole = k / group, left = k % group;
    for (size_t b = 0; b < whole; b++) {
        memcpy(codes + group * b, table + group * row[b], group);
    }
    if (left != 0) {
        const uint8_t *last = table + group * row[whole];
        memcpy(codes + whole * group, last, left);
        if (!all_ones(last + left, group - left)) {
            return BAD_PADDING;
        }
    }
    return all_at_most(codes, k, 2) ? NULL : invalid;
}

static size_t tl1_row_bytes(size_t k)
{
    return k / 4 + (k % 4 != 0);
}

INLINE uint8_t tl1_byte(const uint8_t *c)
{
    return (uint8_t)(3 * c[0] + c[1] + 16 * (3 * c[2] + c[3]));
}

/* 3 and more for an invalid pair. */
#define TL1_CODES(b) {(b) % 16 / 3, (b) % 16 % 3, (b) / 16 / 3, (b) / 16 % 3}
static const uint8_t tl1_codes[256][4] = {ALL_BYTES(TL1_CODES, 0)};

static const char *pack_tl1(const uint8_t *codes, size_t k, uint8_t *row)
{
    return pack_bytes(codes, k, row, 4, tl1_byte);
}

static const char *unpack_tl1(const uint8_t *row, size_t k, uint8_t *codes)
{
    return unpack_bytes(row, k, codes, 4, tl1_codes[0],
                        "weight: a pair index is above 8, the bytes are corrupt or of another format");
}

static size_t t5_row_bytes(size_t k)
{
    return k / 5 + (k % 5 != 0);
}

INLINE uint8_t t5_byte(const uint8_t *c)
{
    return (uint8_t)(c[0] + 3 * c[1] + 9 * c[2] + 27 * c[3] + 81 * c[4]);
}

/* The last is 3 for an invalid byte. */
#define T5_CODES(b) {(b) % 3, (b) / 3 % 3, (b) / 9 % 3, (b) / 27 % 3, (b) / 81}
static const uint8_t t5_codes[256][5] = {ALL_BYTES(T5_CODES, 0)};

static const char *pack_t5(const uint8_t *codes, size_t k, uint8_t *row)
{
    return pack_bytes(codes, k, row, 5, t5_byte);
}

static const char *unpack_t5(const uint8_t *row, size_t k, uint8_t *codes)
{
    return unpack_bytes(row, k, codes, 5, t5_codes[0],
                        "weight: a byte is above 242, the bytes are corrupt or of another format");
}

/* ---- tl2: groups of 8 triples to 4 bytes of magnitudes and 1 of signs ---- */

enum { TL2_GROUP = 24, TL2_TRIPLES = 8 };

static size_t tl2_triples(size_t k)
{
    return k / 3 + (k % 3 != 0);
}

/* Bytes of the magnitudes; then come the signs. */
static size_t tl2_signs(size_t triples)
{
    return triples / 2 + triples % 2;
}

static size_t tl2_row_bytes(size_t k)
{
    const size_t triples = tl2_triples(k);
    return tl2_signs(triples) + triples / 8 + (triples % 8 != 0);
}

INLINE void tl2_bytes(const uint8_t *c, uint8_t *magnitudes, uint8_t *signs)
{
    uint8_t size[TL2_TRIPLES];
    unsigned negative = 0;
    for (unsigned i = 0; i < TL2_TRIPLES; i++, c += 3) {
        const int v = 9 * c[0] + 3 * c[1] + c[2] - 13;
        size[i] = (uint8_t)(v < 0 ? -v : v);
        negative |= (unsigned)(v < 0) << i;
    }
    for (unsigned i = 0; i < TL2_TRIPLES / 2; i++) {
        magnitudes[i] = (uint8_t)(size[2 * i] | size[2 * i + 1] << 4);
    }
    *signs = (uint8_t)negative;
}

static const char *pack_tl2(const uint8_t *codes, size_t k, uint8_t *row)
{
    const size_t whole = k / TL2_GROUP, left = k % TL2_GROUP;
    uint8_t *signs = row + tl2_signs(tl2_triples(k));
    for (size_t g = 0; g < whole; g++) {
        tl2_bytes(codes + TL2_GROUP * g, row + 4 * g, signs + g);
    }
    if (left != 0) {
        uint8_t last[TL2_GROUP], magnitudes[4];
        memset(last, 1, sizeof last);
        memcpy(last, codes + TL2_GROUP * whole, left);
        tl2_bytes(last, magnitudes, signs + whole);
        memcpy(row + 4 * whole, magnitudes, tl2_signs(tl2_triples(left)));
    }
    return all_at_most(codes, k, 2) ? NULL : NOT_TERNARY;
}

/* By a byte of two magnitudes, plus 256 for a sign of the first and 512 for one of the second: the codes of
 * both, then what is wrong: 1 if a magnitude is above 13, 2 if a 0 has a sign. */
#define TL2_V(size, sign) ((size) > 13 ? 13 : (sign) ? 13 - (size) : 13 + (size))
#define TL2_TRIPLE(v) (v) / 9, (v) / 3 % 3, (v) % 3
#define TL2_WRONG(size, sign) ((size) > 13 ? 1 : (sign) && (size) == 0 ? 2 : 0)
#define TL2_PAIR(i)                                                                                \
    {TL2_TRIPLE(TL2_V((i) % 16, (i) & 256)), TL2_TRIPLE(TL2_V((i) / 16 % 16, (i) & 512)),          \
     TL2_WRONG((i) % 16, (i) & 256) | TL2_WRONG((i) / 16 % 16, (i) & 512)}
static const uint8_t tl2_pairs[1024][8] = {ALL_BYTES(TL2_PAIR, 0), ALL_BYTES(TL2_PAIR, 256),
                                           ALL_BYTES(TL2_PAIR, 512), ALL_BYTES(TL2_PAIR, 768)};

/* Returns all that is wrong. */
INLINE unsigned tl2_codes(const uint8_t *magnitudes, unsigned signs, uint8_t *c)
{
    unsigned wrong = 0;
    for (unsigned i = 0; i < TL2_TRIPLES / 2; i++, c += 6) {
        const uint8_t *pair = tl2_pairs[magnitudes[i] | (signs >> 2 * i & 3u) << 8];
        memcpy(c, pair, 6);
        wrong |= pair[6];
    }
    return wrong;
}

static const char *unpack_tl2(const uint8_t *row, size_t k, uint8_t *codes)
{
    const size_t whole = k / TL2_GROUP, left = k % TL2_GROUP;
    const uint8_t *signs = row + tl2_signs(tl2_triples(k));
    unsigned invalid = 0;
    bool padded = true;
    for (size_t g = 0; g < whole; g++) {
        invalid |= tl2_codes(row + 4 * g, signs[g], codes + TL2_GROUP * g);
    }
    if (left != 0) {
        uint8_t last[TL2_GROUP], magnitudes[4] = {0};
        memcpy(magnitudes, row + 4 * whole, tl2_signs(tl2_triples(left)));
        invalid |= tl2_codes(magnitudes, signs[whole], last);
        memcpy(codes + TL2_GROUP * whole, last, left);
        padded = all_ones(last + left, TL2_GROUP - left);
    }
    if (invalid & 1u) {
        return "weight: a magnitude is above 13, the bytes are corrupt or of another format";
    }
    if (invalid & 2u) {
        return "weight: a magnitude of 0 has a sign, the bytes are corrupt or of another format";
    }
    return padded ? NULL : BAD_PADDING;
}

/* ---- The table ---- */

#define i2s_row_bytes bn_row_bytes

const bn_format_info bn_formats[BN_FORMAT_COUNT] = {
#define BN_FORMAT(name, op, four_levels)                                                           \
    {#name, #op, four_levels, name##_row_bytes, pack_##name, unpack_##name},
#include "formats.inc"
#undef BN_FORMAT
};
