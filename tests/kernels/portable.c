/* Runs packed layers without Python and compares them with the answers in a file; run_portable.py
 * makes the file and builds this program, for this machine or another one.  The layers run once
 * for each instruction set that is compiled in, allowed by ONNX_BITNET_ISA and present here, with
 * nothing stronger; before that, the self-check is tried on good and on broken kernels, and hadamard and
 * attention, which no layer has, on rows of their own.
 *
 * The file: one bn_case after the other, each followed by weight, scale, zero_point, bias, x, y. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "dispatch.h"
#include "kernel.h"
#include "layout.h"
#include "matmul.h"
#include "selfcheck.h"

typedef struct {
    uint32_t format, n, k, planes, block_size, scale_rows, bits, m, is_float16;
    float activation_scale, tolerance; /* 0: the same bits */
} bn_case;

/* A copy of the next bytes of the file, in memory of exactly that size, so that sanitizers see
 * every step past its end. */
static void *take(FILE *file, size_t bytes)
{
    void *data = malloc(bytes);
    if (!data || fread(data, 1, bytes, file) != bytes) {
        fprintf(stderr, "the file of answers is cut short\n");
        exit(2);
    }
    return data;
}

/* Last task first. */
static void backwards(void *context, void (*task)(void *arg, size_t index), size_t count, void *arg)
{
    (void)context;
    while (count > 0) {
        task(arg, --count);
    }
}

/* The same bits, or NaN both. */
static int is_same_half(uint16_t a, uint16_t b)
{
    return a == b || ((a & 0x7FFF) > 0x7C00 && (b & 0x7FFF) > 0x7C00);
}

static int is_same_float(float a, float b)
{
    return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b));
}

static int is_equal(const bn_case *c, const void *y, const void *expected)
{
    const uint16_t *half_a = y, *half_b = expected;
    const float *a = y, *b = expected;
    const size_t count = (size_t)c->m * c->n;

    for (size_t i = 0; i < count; i++) {
        if (c->is_float16 ? !is_same_half(half_a[i], half_b[i])
                          : !is_same_float(a[i], b[i]) && !(fabsf(a[i] - b[i]) <= c->tolerance)) {
            return 0;
        }
    }
    return 1;
}

static int run_case(FILE *file, const bn_case *c, uint32_t isas)
{
    const size_t groups = bn_make_groups(c->k, c->block_size).count;
    const size_t scales = (size_t)c->planes * c->scale_rows * groups * sizeof(float);
    const size_t width = c->is_float16 ? 2 : 4;
    const bn_format_info *format = &bn_formats[c->format];
    uint8_t *weight = take(file, (size_t)c->planes * c->n * format->row_bytes(c->k));
    float *scale = take(file, scales);
    float *zero_point = take(file, scales);
    float *bias = take(file, c->n * sizeof(float));
    void *x = take(file, (size_t)c->m * c->k * width);
    void *expected = take(file, (size_t)c->m * c->n * width);
    void *y = malloc((size_t)c->m * c->n * width);
    bn_matmul *layer = NULL;
    const bn_matmul_desc desc = {
        .n = c->n,
        .k = c->k,
        .planes = c->planes,
        .block_size = c->block_size,
        .format = (bn_format)c->format,
        .weight = weight,
        .scale = scale,
        .zero_point = format->four_levels ? zero_point : NULL,
        .scale_rows = c->scale_rows,
        .zero_point_rows = c->scale_rows,
        .bias = bias,
        .activation_bits = (int)c->bits,
        .activation_scale = c->activation_scale,
    };
    const bn_float_type type = c->is_float16 ? BN_FLOAT16 : BN_FLOAT32;
    const char *reason = bn_matmul_create(&desc, isas, &layer);
    int good = !reason && y;

    for (int pass = 0; good && pass < 3; pass++) {
        const bn_threads threads = {.run = pass ? backwards : NULL, .count = pass == 2};
        reason = bn_matmul_run(layer, x, y, c->m, type, threads);
        good = !reason && is_equal(c, y, expected);
    }
    if (!good) {
        printf("%s n %u k %u planes %u block %u bits %u m %u: %s\n", format->name, c->n, c->k,
               c->planes, c->block_size, c->bits, c->m, reason ? reason : "wrong result");
    }
    bn_matmul_destroy(layer);
    free(weight);
    free(scale);
    free(zero_point);
    free(bias);
    free(x);
    free(expected);
    free(y);
    return good;
}

/* All cases with the kernels of the set `isas`; prints which ones and how many were right. */
static int run_cases(FILE *file, const char *name, uint32_t isas)
{
    size_t count = 0;
    const bn_kernel *kernels = bn_kernels(&count);
    bn_case c;
    int cases = 0, good = 0;

    printf("%s:", name);
    for (size_t i = 0; i < count; i++) {
        if (kernels[i].isa == BN_ISA_scalar) { /* every op and format has one such row */
            const bn_kernel *best = bn_find(kernels[i].op, kernels[i].format, isas);
            printf(" %s_%s_%s", best->op, best->format, bn_isa_name(best->isa));
        }
    }
    printf("\n");
    rewind(file);
    while (fread(&c, sizeof c, 1, file) == 1) {
        good += run_case(file, &c, isas);
        cases++;
    }
    printf("%s: %d of %d layers right\n", name, good, cases);
    return good == cases && cases > 0;
}

/* ---- The self-check --------------------------------------------------------------------------- */

/* Wrong in the last bit of one sum, and only with five rows. */
static void dot_of_a_broken_cpu(const bn_dot_args *a)
{
    bn_dot_i2s_scalar(a);
    a->acc[0] ^= a->rows == 5;
}

/* All that run here are right; one whose dot is not is found out, and it alone. */
static int run_self_check(uint32_t allowed)
{
    size_t count = 0;
    const bn_kernel *kernels = bn_kernels(&count);
    int good = bn_right_isas(kernels, count, allowed) == allowed;

    for (size_t i = 0; i < count; i++) {
        bn_kernel *broken = malloc(count * sizeof *broken);
        if (broken && kernels[i].isa != BN_ISA_scalar && (allowed >> kernels[i].isa & 1) &&
            strcmp(kernels[i].op, "dot") == 0) {
            memcpy(broken, kernels, count * sizeof *broken);
            broken[i].fn = (bn_any_fn *)dot_of_a_broken_cpu;
            good &= bn_right_isas(broken, count, allowed) ==
                    (allowed & ~(UINT32_C(1) << kernels[i].isa));
        }
        free(broken);
    }
    if (!good) {
        printf("the self-check is wrong\n");
    }
    return good;
}

/* ---- hadamard --------------------------------------------------------------------------------- */

/* Every kernel gives the bits of the scalar one: blocks in registers and beyond, a row's end that fills
 * no register, and y that is x. */
static int run_hadamard(uint32_t allowed)
{
    enum { MOST = 3 * 1024 };
    size_t count = 0;
    const bn_kernel *kernels = bn_kernels(&count);
    float *x = malloc(MOST * sizeof *x), *signs = malloc(MOST * sizeof *signs);
    int good = x && signs;

    for (size_t i = 0; good && i < MOST; i++) {
        x[i] = sinf((float)(i * i % 997)); /* sums of which are rounded */
        signs[i] = i * i % 7 < 3 ? 1.0f : -1.0f;
    }
    for (size_t i = 0; good && i < count; i++) {
        if (strcmp(kernels[i].op, "hadamard") != 0 || !(allowed >> kernels[i].isa & 1)) {
            continue;
        }
        for (size_t block = 1; block <= MOST / 3; block *= 2) {
            const size_t bytes = 3 * block * sizeof *x; /* exactly, so that sanitizers see more */
            float *y = malloc(bytes), *expected = malloc(bytes);
            if (y && expected) {
                bn_hadamard_args args = {x, signs, expected, 1, 3 * block, block};
                bn_hadamard_f32_scalar(&args);
                memcpy(y, x, bytes);
                args.x = args.y = y;
                ((bn_hadamard_fn *)kernels[i].fn)(&args);
            }
            if (!y || !expected || memcmp(y, expected, bytes) != 0) {
                printf("hadamard %s is wrong with blocks of %zu\n", bn_isa_name(kernels[i].isa), block);
                good = 0;
            }
            free(y);
            free(expected);
        }
    }
    free(x);
    free(signs);
    return good;
}

/* ---- attention -------------------------------------------------------------------------------- */

/* Every kernel gives the bits of the scalar one, for rows in strips and alone, and in buffers of exactly
 * the size that is told. */
static int run_attention(uint32_t allowed)
{
    enum { MOST = 70 };
    size_t count = 0;
    const bn_kernel *kernels = bn_kernels(&count);
    int good = 1;

    for (size_t i = 0; i < count * BN_ATTENTION_ROWS; i++) {
        const bn_kernel *kernel = &kernels[i / BN_ATTENTION_ROWS];
        const size_t rows = i % BN_ATTENTION_ROWS + 1, tokens = i * i % 150 + 1, width = i * 7 % MOST;
        const size_t value_width = i * 11 % MOST + 1, padded = bn_round_up(tokens, BN_KEYS);
        const size_t value_stride = bn_round_up(value_width, BN_VALUES), size = rows * value_width * 4;
        if (strcmp(kernel->op, "attention") != 0 || !(allowed >> kernel->isa & 1)) {
            continue;
        }
        float *q = malloc(rows * width * 4 + 4), *keys = malloc(padded * width * 4 + 4);
        float *values = malloc(tokens * value_stride * 4), *mask = malloc(padded * 4);
        float *scores = malloc(rows * padded * 4), *y = malloc(size), *expected = malloc(size);
        if (q && keys && values && mask && scores && y && expected) {
            bn_attention_args args = {
                .q = q, .keys = keys, .values = values, .mask = mask, .scores = scores, .y = expected,
                .q_stride = width, .value_stride = value_stride, .y_stride = value_width, .rows = rows,
                .tokens = tokens, .width = width, .value_width = value_width, .scale = 0.3f,
                .nan_to_zero = (int)i % 2,
            };
            for (size_t j = 0; j < rows * width; j++) {
                q[j] = sinf((float)(j * j % 997));
            }
            for (size_t j = 0; j < padded * width; j++) {
                keys[j] = cosf((float)(j * j % 991));
            }
            for (size_t j = 0; j < tokens * value_stride; j++) {
                values[j] = sinf((float)(j * j % 983));
            }
            for (size_t t = 0; t < padded; t++) {
                mask[t] = t < tokens && i % 10 != 5 ? (float)(t % 5) - 2.0f : -INFINITY;
            }
            bn_attention_f32_scalar(&args);
            args.y = y;
            ((bn_attention_fn *)kernel->fn)(&args);
        }
        if (!y || !expected || memcmp(y, expected, size) != 0) {
            printf("attention %s is wrong with %zu rows\n", bn_isa_name(kernel->isa), rows);
            good = 0;
        }
        free(q);
        free(keys);
        free(values);
        free(mask);
        free(scores);
        free(y);
        free(expected);
    }
    return good;
}

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    uint32_t allowed = 0;
    const char *reason = bn_isas_allowed(&allowed);
    int good;

    if (!file || reason) {
        fprintf(stderr, "%s\n", reason ? reason : "usage: portable FILE");
        return 2;
    }
    good = run_self_check(allowed) & run_hadamard(allowed) & run_attention(allowed);
    for (int isa = 0; isa < BN_ISA_COUNT; isa++) {
        uint32_t isas = 0;
        if ((allowed >> isa & 1) && !bn_isas_up_to(bn_isa_name((bn_isa)isa), &isas)) {
            good &= run_cases(file, bn_isa_name((bn_isa)isa), isas);
        }
    }
    fclose(file);
    return good ? 0 : 1;
}
