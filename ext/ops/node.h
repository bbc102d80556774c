/* Reading a node: when its kernel is created, and its tensors when it runs.
 *
 * A model may come from anyone, so all that an op relies on is checked here or by the op:
 * attributes against their ranges, then every constant's type and shape against the attributes.
 * ONNX Runtime guarantees that a tensor holds as many bytes as its shape says.
 *
 * Functions that can refuse the node return false after putting the reason into it. */
#ifndef BN_NODE_H
#define BN_NODE_H

#include <stdbool.h>

#include "ops.h"
#include "ort.h"

enum { BN_MAX_RANK = 32 }; /* of x and y */

typedef struct {
    const ort_api *api;
    bn_host *host;
    const ort_kernel_info *info;
    char reason[256]; /* why the node is refused */
} bn_node;

typedef struct {
    int type;
    int64_t dims[3]; /* as many as the rank that was asked for, 1 to 3 */
    const void *data;
} bn_constant;

#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
bool bn_refuse(bn_node *node, const char *format, ...);

/* The status that reports the refusal. */
ort_status *bn_refusal(const bn_node *node, const char *op_type);

/* Whether a call succeeded; releases its status where not. */
bool bn_succeeded(const ort_api *api, ort_status *status);

/* The attribute must lie in lowest .. INT32_MAX. */
bool bn_read_integer(bn_node *node, const char *name, int64_t lowest, int64_t *value);
bool bn_read_float(bn_node *node, const char *name, float *value);

/* The input must be a constant tensor of this rank. */
bool bn_read_constant(bn_node *node, size_t index, const char *name, size_t rank,
                      bn_constant *constant);

/* The last dimension of the input must not be known to differ from k. */
bool bn_check_last_dimension(bn_node *node, size_t index, const char *name, size_t k);

/* The instruction sets that the node's kernels may use: those that run here, up to ONNX_BITNET_ISA, and
 * that are right (selfcheck.h).  The first node that may use one has it checked; if it is wrong, ONNX
 * Runtime's log gets a warning.  Returns NULL, or the reason why there are none. */
const char *bn_node_isas(const bn_node *node, uint32_t *isas);

/* ---- When the node runs ---- */

/* The tensors of a run; without rows they are NULL. */
typedef struct {
    const void *x; /* (rows, k), input 0 */
    void *y;       /* (rows, n) */
    size_t rows;
} bn_rows;

/* Checks x, whose last dimension must be k, and makes y. */
ort_status *bn_open_rows(const ort_api *api, ort_kernel_context *context, int64_t k, int64_t n,
                         bn_rows *rows);

/* An input of a run.  Where it has a smaller rank than asked for, dimensions of 1 come first. */
typedef struct {
    int64_t dims[4];
    const void *data;
} bn_tensor;

/* Reads an input whose rank must be `rank`, at most 4, or up to that where it need not be exact. */
ort_status *bn_open_tensor(const ort_api *api, ort_kernel_context *context, size_t index, const char *name,
                           bool is_exact, size_t rank, bn_tensor *tensor);

/* The session's threads.  The first failure is kept; nothing runs after. */
typedef struct {
    const ort_api *api;
    const ort_kernel_context *context;
    ort_status *status;
} bn_pool;

/* A bn_parallel_for (parallel.h) whose context is a bn_pool. */
void bn_run_in_pool(void *pool, void (*task)(void *arg, size_t index), size_t count, void *arg);

#endif
