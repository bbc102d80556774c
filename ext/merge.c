/* Planes in integer ratio as one plane of wider codes.
 *
 * Method  Each output's codes are brought together, and then to the words of 4 bytes that it has in each
 *         vector; those of 16 outputs are transposed as floats are, which are as long.
 * Speed   Zen 5, 1024 x 2560 on a busy machine, Gweights/s: two planes to 4 bits 3.0, four to 8 bits 1.5. */
#include "merge.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "kernel.h"

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

/* Adds a plane of a row to its merged codes, whose groups are padded. */
static void add_plane(uint8_t *merged, const uint8_t *codes, const bn_groups *groups, uint8_t ratio)
{
    for (size_t g = 0; g < groups->count; g++, merged += groups->stride, codes += groups->length) {
        const size_t length = bn_group_length(groups, g);
        for (size_t i = 0; i < length; i++) {
            merged[i] = (uint8_t)(merged[i] + ratio * codes[i]);
        }
    }
}

static void sum_groups(const uint8_t *merged, const bn_groups *groups, int32_t *code_sum)
{
    for (size_t g = 0; g < groups->count; g++, merged += groups->stride) {
        const size_t length = bn_group_length(groups, g);
        int32_t sum = 0;
        for (size_t i = 0; i < length; i++) {
            sum += merged[i];
        }
        code_sum[g * BN_SUPER] = sum;
    }
}

/* The words of an output in vector `v` of each step (layout.h), one after the other. */
static void gather_words(const uint8_t *merged, size_t steps, int bits, size_t v, uint8_t *words)
{
    for (size_t step = 0; step < steps; step++, merged += BN_STEP, words += 4) {
        const uint32_t low = bn_load_word(merged + (bits == 8 ? 4 : 8) * v);
        bn_store_word(words, bits == 8 ? low : low | bn_load_word(merged + 8 * v + 4) << 4);
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
    bn_transpose_fn *transpose;
    _Atomic(const char *) reason; /* why one task failed */
} job;

/* What a task works with. */
typedef struct {
    uint8_t *words;  /* (vectors in a step, 16 outputs, steps) of 4 bytes */
    uint8_t *merged; /* (padded) codes of one output */
    uint8_t *codes;  /* (k) of one plane of it */
} scratch;

/* The merged codes of an output, zeros past n. */
static void merge_output(job *j, size_t output, const scratch *t)
{
    const size_t k = j->groups->k, row_bytes = bn_formats[j->format].row_bytes(k);

    memset(t->merged, 0, j->groups->padded);
    for (size_t plane = 0; output < j->n && plane < j->merge->planes; plane++) {
        const uint8_t *row = j->weight + (plane * j->n + output) * row_bytes;
        const char *reason = bn_formats[j->format].unpack(row, k, t->codes);
        if (reason) {
            atomic_store(&j->reason, reason);
        }
        add_plane(t->merged, t->codes, j->groups, j->merge->ratio[plane]);
    }
}

/* 16 outputs of a super-panel of this width; panel is their place in its first step. */
static void build_panel(job *j, size_t first, size_t width, const scratch *t, uint8_t *panel,
                        int32_t *code_sum)
{
    const int bits = j->merge->bits;
    const size_t steps = j->groups->padded / BN_STEP, step_bytes = bn_step_bytes(bits);
    const size_t vectors = step_bytes / BN_VECTOR;

    for (size_t i = 0; i < BN_PANEL; i++) {
        merge_output(j, first + i, t);
        if (code_sum) {
            sum_groups(t->merged, j->groups, code_sum + i);
        }
        for (size_t v = 0; v < vectors; v++) {
            gather_words(t->merged, steps, bits, v, t->words + 4 * steps * (v * BN_PANEL + i));
        }
    }
    for (size_t v = 0; v < vectors; v++) {
        j->transpose(&(bn_transpose_args){
            .x = (const float *)(const void *)(t->words + 4 * steps * v * BN_PANEL),
            .y = (float *)(void *)(panel + v * BN_VECTOR),
            .x_stride = steps,
            .y_stride = width * step_bytes / 4,
            .rows = BN_PANEL,
            .cols = steps,
        });
    }
}

static void build_super(void *arg, size_t super)
{
    job *j = arg;
    const size_t k = j->groups->k, padded = j->groups->padded;
    const size_t width = bn_super_width(j->n, super), step_bytes = bn_step_bytes(j->merge->bits);
    const size_t sums = j->groups->count * BN_SUPER;
    int32_t *code_sum = j->code_sum ? j->code_sum + super * sums : NULL;
    uint8_t *panel = j->panels + bn_super_offset(super, j->groups, j->merge->bits);
    const size_t words = padded / BN_STEP * step_bytes;
    uint8_t *memory = malloc(words + padded + k);

    if (!memory) {
        atomic_store(&j->reason, "out of memory for the packed weights");
        return;
    }
    const scratch t = {memory, memory + words, memory + words + padded};
    for (size_t i = 0; code_sum && i < sums; i++) { /* those past the last panel, too */
        code_sum[i] = 0;
    }
    for (size_t p = 0; p < width; p++) {
        build_panel(j, super * BN_SUPER + p * BN_PANEL, width, &t, panel + p * step_bytes,
                    code_sum ? code_sum + p * BN_PANEL : NULL);
    }
    free(memory);
}

const char *bn_merge_build(const bn_merge *merge, bn_format format, const uint8_t *weight, size_t n,
                           const bn_groups *groups, uint32_t isas, bn_threads threads,
                           uint8_t *panels, int32_t *code_sum)
{
    job j = {.merge = merge,
             .format = format,
             .weight = weight,
             .n = n,
             .groups = groups,
             .panels = panels,
             .code_sum = code_sum,
             .transpose = (bn_transpose_fn *)bn_find("transpose", "f32", isas)->fn};

    atomic_init(&j.reason, NULL);
    bn_run_tasks(threads, build_super, bn_super_panels(n), &j);
    return atomic_load(&j.reason);
}
