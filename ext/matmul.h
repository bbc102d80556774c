/* One packed linear layer, ready to run: y = Q(x) W^T + bias.
 *
 * This is all that the glue (ops/ for ONNX Runtime, _native.pyx for Python) needs to know of the
 * kernels: make a layer from canonical bytes, run it on rows of activations, destroy it. */
#ifndef BN_MATMUL_H
#define BN_MATMUL_H

#include <stddef.h>
#include <stdint.h>

#include "formats.h"
#include "parallel.h"

typedef struct bn_matmul bn_matmul;

typedef enum { BN_FLOAT32, BN_FLOAT16 } bn_float_type;

typedef struct {
    size_t n, k;               /* outputs, inputs; both >= 1 */
    size_t planes;             /* 1 to 4 */
    size_t block_size;         /* inputs that share a scale; 0 means all of k */
    bn_format format;          /* of the weight */
    bool is_panels;            /* the weight is panels, see panel.h; blocks are multiples of 16 then */
    const uint8_t *weight;     /* (planes, n, row_bytes) canonical bytes, see formats.h, or planes of
                                  panels, which may be read in place and must outlive the layer */
    const float *scale;        /* (planes, scale_rows, ceil(k / block_size)) */
    const float *zero_point;   /* (planes, zero_point_rows, the same), or NULL: all are 1 */
    size_t scale_rows;         /* n, or 1 when all outputs share their scales */
    size_t zero_point_rows;    /* n or 1, where there are zero points */
    const float *bias;         /* (n), or NULL for none */
    int activation_bits;       /* 8, 16, or 32 for float activations */
    float activation_scale;    /* step of static quantization; 0 means dynamic, per row */
    bn_threads threads;        /* that share the work of making the layer */
} bn_matmul_desc;

/* Copies what it needs from desc, so its pointers (but panels) may be freed afterwards.  isas is the set of
 * instruction sets that may be used (cpu.h).  Returns NULL, or the reason why the layer is refused. */
const char *bn_matmul_create(const bn_matmul_desc *desc, uint32_t isas, bn_matmul **layer);

/* x is (m, k), y is (m, n), both dense and of the same type.  Safe to call from several threads at
 * once.
 * Returns NULL, or the reason for failure (out of memory). */
const char *bn_matmul_run(const bn_matmul *layer, const void *x, void *y, size_t m,
                          bn_float_type type, bn_threads threads);

void bn_matmul_destroy(bn_matmul *layer); /* NULL is allowed */

#endif
