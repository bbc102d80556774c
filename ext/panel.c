/* Canonical bytes to panels.  Rows of every format become i2s rows first; from there it is a
 * transposition of 4 x 4 fields of two bits inside each 32-bit word. */
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* madvise */
#endif
#include "panel.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_MSC_VER)
#include <malloc.h>
#endif

#define ALL_ONES UINT32_C(0x55555555) /* sixteen codes 1 */

/* Codes first .. first + 15 of a row, code i at bits 2i; those from `end` on are 1. */
static uint32_t load_codes(const uint8_t *row, size_t first, size_t end)
{
    const size_t begin = first / 4;
    const size_t last = bn_row_bytes(end) < begin + 5 ? bn_row_bytes(end) : begin + 5;
    const size_t count = end - first;
    uint64_t bits = 0;

    if (count >= BN_STEP && first % 4 == 0) { /* four whole bytes: one load */
        return row[begin] | (uint32_t)row[begin + 1] << 8 | (uint32_t)row[begin + 2] << 16 |
               (uint32_t)row[begin + 3] << 24;
    }
    for (size_t i = begin; i < last; i++) {
        bits |= (uint64_t)row[i] << (8 * (i - begin));
    }
    bits >>= 2 * (first % 4);
    if (count < BN_STEP) {
        const uint32_t real = (UINT32_C(1) << (2 * count)) - 1;
        return ((uint32_t)bits & real) | (ALL_ONES & ~real);
    }
    return (uint32_t)bits;
}

/* Field (row r, column c) of a 4 x 4 matrix of two-bit fields goes to (c, r): first the
 * off-diagonal 1 x 1 fields of each 2 x 2 corner change places, then the off-diagonal corners. */
static uint32_t transpose(uint32_t w)
{
    uint32_t swap = (w ^ (w >> 6)) & UINT32_C(0x00CC00CC);
    w ^= swap ^ (swap << 6);
    swap = (w ^ (w >> 12)) & UINT32_C(0x0000F0F0);
    return w ^ swap ^ (swap << 12);
}

static int32_t sum_codes(uint32_t w)
{
    w = (w & UINT32_C(0x33333333)) + (w >> 2 & UINT32_C(0x33333333));
    w = (w & UINT32_C(0x0F0F0F0F)) + (w >> 4 & UINT32_C(0x0F0F0F0F));
    return (int32_t)((w * UINT32_C(0x01010101)) >> 24);
}

static void store_word(uint8_t *to, uint32_t w)
{
    to[0] = (uint8_t)w;
    to[1] = (uint8_t)(w >> 8);
    to[2] = (uint8_t)(w >> 16);
    to[3] = (uint8_t)(w >> 24);
}

/* One output's word in each step of a super-panel; row is NULL for an output past n. */
static void build_output(const uint8_t *row, const bn_groups *groups, size_t step_bytes,
                         uint8_t *to, int32_t *code_sum)
{
    for (size_t g = 0; g < groups->count; g++) {
        const size_t first = g * groups->length;
        const size_t end = first + bn_group_length(groups, g);
        int32_t sum = 0;

        for (size_t k = first; k < end; k += BN_STEP, to += step_bytes) {
            const uint32_t codes = row ? load_codes(row, k, end) : ALL_ONES;
            sum += sum_codes(codes);
            store_word(to, transpose(codes));
        }
        if (code_sum) {
            code_sum[g * BN_SUPER] = sum;
        }
    }
}

/* An output's row as i2s, which may be the row itself; NULL and a reason if it is not canonical.
 * scratch holds k codes, then an i2s row. */
static const uint8_t *i2s_row(bn_format format, const uint8_t *row, size_t k, uint8_t *scratch,
                              const char **reason)
{
    if (format == BN_FORMAT_i2s) {
        *reason = bn_i2s_check(row, k);
        return *reason ? NULL : row;
    }
    *reason = bn_formats[format].unpack(row, k, scratch);
    if (*reason) {
        return NULL;
    }
    bn_pack_i2s(scratch, k, scratch + k);
    return scratch + k;
}

static const char *build(bn_format format, const uint8_t *weight, size_t n,
                         const bn_groups *groups, uint8_t *scratch, uint8_t *panels,
                         int32_t *code_sum)
{
    const size_t row_bytes = bn_formats[format].row_bytes(groups->k);

    for (size_t super = 0; super < bn_super_panels(n); super++) {
        const size_t width = bn_super_width(n, super);
        for (size_t lane = 0; lane < width * BN_PANEL; lane++) {
            const size_t output = super * BN_SUPER + lane;
            const uint8_t *row = NULL;
            if (output < n) {
                const char *reason;
                row = i2s_row(format, weight + output * row_bytes, groups->k, scratch, &reason);
                if (!row) {
                    return reason;
                }
            }
            build_output(row, groups, width * BN_VECTOR,
                         panels + bn_super_offset(super, groups, 2) + lane / BN_PANEL * BN_VECTOR +
                             lane % BN_PANEL * 4,
                         code_sum ? code_sum + super * groups->count * BN_SUPER + lane : NULL);
        }
    }
    return NULL;
}

const char *bn_panel_build(bn_format format, const uint8_t *weight, size_t n,
                           const bn_groups *groups, uint8_t *panels, int32_t *code_sum)
{
    uint8_t *scratch = malloc(groups->k + bn_row_bytes(groups->k));
    const char *reason = "out of memory for the packed weights";

    if (scratch) {
        reason = build(format, weight, n, groups, scratch, panels, code_sum);
    }
    free(scratch);
    return reason;
}

/* Streaming from 4 KB pages is a third slower than from 2 MB pages, which Linux gives to aligned
 * ranges that ask for them. */
void *bn_panel_alloc(size_t bytes)
{
    const size_t huge = (size_t)2 << 20;
    const size_t unit = bytes >= huge / 4 * 3 ? huge : BN_VECTOR;

    bytes = bn_round_up(bytes, unit);
#if defined(_MSC_VER)
    return _aligned_malloc(bytes, unit);
#else
    void *panels = aligned_alloc(unit, bytes);
#if defined(__linux__)
    if (panels && unit == huge) {
        (void)madvise(panels, bytes, MADV_HUGEPAGE);
    }
#endif
    return panels;
#endif
}

void bn_panel_free(void *panels)
{
#if defined(_MSC_VER)
    _aligned_free(panels);
#else
    free(panels);
#endif
}
