/* Runs packed layers without Python and compares them with the answers in a file; run_portable.py
 * makes the file and builds this program, for this machine or another one.
 *
 * The file: one bn_case after the other, each followed by weight, scale, zero_point, bias, x, y. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "layout.h"
#include "matmul.h"

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

static int is_equal(const bn_case *c, const void *y, const void *expected)
{
    const size_t count = (size_t)c->m * c->n;

    if (c->tolerance == 0.0f) {
        return memcmp(y, expected, count * (c->is_float16 ? 2 : 4)) == 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (!(fabsf(((const float *)y)[i] - ((const float *)expected)[i]) <= c->tolerance)) {
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

    for (int pass = 0; good && pass < 2; pass++) {
        reason = bn_matmul_run(layer, x, y, c->m, type, pass ? backwards : NULL, NULL);
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

int main(int argc, char **argv)
{
    FILE *file = argc == 2 ? fopen(argv[1], "rb") : NULL;
    uint32_t isas = 0;
    const char *reason = bn_isas_allowed(&isas);
    bn_case c;
    int cases = 0, good = 0;

    if (!file || reason) {
        fprintf(stderr, "%s\n", reason ? reason : "usage: portable FILE");
        return 2;
    }
    while (fread(&c, sizeof c, 1, file) == 1) {
        good += run_case(file, &c, isas);
        cases++;
    }
    fclose(file);
    printf("%d of %d layers right, instruction sets %#x\n", good, cases, isas);
    return good == cases && cases > 0 ? 0 : 1;
}
