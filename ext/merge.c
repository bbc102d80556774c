/* Planes in integer ratio as one plane of wider codes. */
#include "merge.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CODE = 3, MAX_RATIO_4 = 5, MAX_RATIO_8 = 85, MAX_ZERO_POINT = 128 };

/* The scales of a plane by those of the last one, where that is one integer of 1 to MAX_RATIO_8; 0
 * where it is not.  A product of a float and such an integer is exact in double. */
static unsigned find_ratio(const float *scale, const float *last, size_t count)
{
    size_t first = 0;

    while (first < count && last[first] == 0.0f) {
        first++;
    }
    const double ratio = first < count ? (double)scale[first] / (double)last[first] : 0.0;
    if (!(ratio >= 1.0 && ratio <= MAX_RATIO_8 && ratio == floor(ratio))) {
        return 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (!((double)scale[i] == ratio * (double)last[i])) {
            return 0;
        }
    }
    return (unsigned)ratio;
}

static int zero_points_fit(const float *zero_point, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const float twice = 2.0f * zero_point[i];
        if (!(fabsf(zero_point[i]) <= MAX_ZERO_POINT && twice == (float)(int)twice)) {
            return 0;
        }
    }
    return 1;
}

bn_merge bn_find_merge(const bn_matmul_desc *d)
{
    const bn_groups groups = bn_make_groups(d->k, d->block_size);
    const size_t scales = d->scale_rows * groups.count;
    bn_merge merge = {.planes = d->planes, .bits = 2};
    unsigned sum = 0;

    if (d->planes < 2 || d->activation_bits == 32 || groups.length > BN_MAX_WIDE_GROUP ||
        (d->zero_point &&
         !zero_points_fit(d->zero_point, d->planes * d->zero_point_rows * groups.count))) {
        return merge;
    }
    for (size_t plane = 0; plane < d->planes; plane++) {
        const float *last = d->scale + (d->planes - 1) * scales;
        const unsigned ratio = find_ratio(d->scale + plane * scales, last, scales);
        if (ratio == 0 || sum + ratio > MAX_RATIO_8) {
            return merge;
        }
        merge.ratio[plane] = (uint8_t)ratio;
        sum += ratio;
    }
    merge.bits = sum <= MAX_RATIO_4 ? 4 : 8;
    return merge;
}

void bn_merge_zero_points(const bn_matmul_desc *d, const bn_merge *merge, float *zero_point)
{
    const size_t rows = d->zero_point ? d->zero_point_rows : 1;
    const size_t count = rows * bn_make_groups(d->k, d->block_size).count;

    for (size_t i = 0; i < count; i++) {
        zero_point[i] = 0.0f;
        for (size_t plane = 0; plane < merge->planes; plane++) {
            const float own = d->zero_point ? d->zero_point[plane * count + i] : 1.0f;
            zero_point[i] += (float)merge->ratio[plane] * own;
        }
    }
}

/* Adds a plane to a row of merged codes. */
static void add_plane(uint8_t *merged, const uint8_t *codes, size_t k, uint8_t ratio)
{
    for (size_t i = 0; i < k; i++) {
        merged[i] = (uint8_t)(merged[i] + ratio * codes[i]);
    }
}

/* 16 inputs of one output; `to` is its place in the first vector. */
static void store_step(const uint8_t *codes, int bits, uint8_t *to)
{
    if (bits == 8) {
        for (size_t vector = 0; vector < 4; vector++) {
            memcpy(to + vector * BN_VECTOR, codes + 4 * vector, 4);
        }
        return;
    }
    for (size_t vector = 0; vector < 2; vector++) {
        for (size_t j = 0; j < 4; j++) {
            const uint8_t *at = codes + 8 * vector + j;
            to[vector * BN_VECTOR + j] = (uint8_t)(at[0] | at[4] << 4);
        }
    }
}

/* One output's place in each step of a super-panel. */
static void build_output(const uint8_t *codes, const bn_groups *groups, int bits, size_t step_bytes,
                         uint8_t *to, int32_t *code_sum)
{
    for (size_t g = 0; g < groups->count; g++) {
        const size_t length = bn_group_length(groups, g);
        int32_t sum = 0;

        for (size_t i = 0; i < length; i++) {
            sum += codes[i];
        }
        if (code_sum) {
            code_sum[g * BN_SUPER] = sum;
        }
        for (size_t i = 0; i < length; i += BN_STEP, to += step_bytes) {
            uint8_t last[BN_STEP] = {0};
            const uint8_t *step = codes + i;
            if (length - i < BN_STEP) {
                memcpy(last, step, length - i);
                step = last;
            }
            store_step(step, bits, to);
        }
        codes += length;
    }
}

/* What the tasks of bn_merge_build share: one of them is a super-panel. */
typedef struct {
    const bn_merge *merge;
    bn_format format;
    const uint8_t *weight;
    size_t n;
    const bn_groups *groups;
    uint8_t *panels;
    int32_t *code_sum;
    _Atomic(const char *) reason; /* why one task failed */
} job;

static void build_super(void *arg, size_t super)
{
    job *j = arg;
    const size_t k = j->groups->k, row_bytes = bn_formats[j->format].row_bytes(k);
    const size_t width = bn_super_width(j->n, super), step_bytes = bn_step_bytes(j->merge->bits);
    const size_t sums = j->groups->count * BN_SUPER;
    int32_t *code_sum = j->code_sum ? j->code_sum + super * sums : NULL;
    uint8_t *panel = j->panels + bn_super_offset(super, j->groups, j->merge->bits);
    uint8_t *merged = malloc(2 * k);

    if (!merged) {
        atomic_store(&j->reason, "out of memory for the packed weights");
        return;
    }
    for (size_t i = 0; code_sum && i < sums; i++) { /* those past the last panel, too */
        code_sum[i] = 0;
    }
    for (size_t lane = 0; lane < width * BN_PANEL; lane++) {
        const size_t output = super * BN_SUPER + lane;

        memset(merged, 0, k);
        for (size_t plane = 0; output < j->n && plane < j->merge->planes; plane++) {
            const uint8_t *row = j->weight + (plane * j->n + output) * row_bytes;
            const char *reason = bn_formats[j->format].unpack(row, k, merged + k);
            if (reason) {
                atomic_store(&j->reason, reason);
            }
            add_plane(merged, merged + k, k, j->merge->ratio[plane]);
        }
        build_output(merged, j->groups, j->merge->bits, width * step_bytes,
                     panel + lane / BN_PANEL * step_bytes + lane % BN_PANEL * 4,
                     code_sum ? code_sum + lane : NULL);
    }
    free(merged);
}

const char *bn_merge_build(const bn_merge *merge, bn_format format, const uint8_t *weight, size_t n,
                           const bn_groups *groups, bn_threads threads, uint8_t *panels,
                           int32_t *code_sum)
{
    job j = {.merge = merge,
             .format = format,
             .weight = weight,
             .n = n,
             .groups = groups,
             .panels = panels,
             .code_sum = code_sum};

    atomic_init(&j.reason, NULL);
    bn_run_tasks(threads, build_super, bn_super_panels(n), &j);
    return atomic_load(&j.reason);
}
