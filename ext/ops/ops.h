/* The custom ops of this library, and how one is tied to the ONNX Runtime that hosts it. */
#ifndef BN_OPS_H
#define BN_OPS_H

#include <stdatomic.h>

#include "formats.h"
#include "ort.h"

/* One per ONNX Runtime in the process (register.c); lives to the end of the process. */
typedef struct {
    const ort_api *api;
    atomic_ulong fresh;     /* names given to unknown dimensions so far */
    _Atomic uint64_t isas; /* that passed the self-check; those that did not, << 32 */
} bn_host;

/* What ONNX Runtime is handed: an op for one format (if it has a weight) and one type of x.  Shape
 * inference gets nothing but a pointer to it, so it must lead to the host. */
typedef struct {
    ort_custom_op callbacks; /* first: a pointer to it is a pointer to the bn_op */
    bn_host *host;
    bn_format format;
    bool is_panels; /* its weight is panels */
    bool is_by_head; /* its heads come before rows */
    int x_type;
} bn_op;

extern const ort_custom_op bn_matmul_op; /* of every format (matmul.c) */
extern const ort_custom_op bn_block_hadamard;
extern const ort_custom_op bn_attention_op;

/* Callbacks that are the same for every op with x as input 0 and y as its only output, of shape
 * (..., N) where the op has an attribute N, else of that of x (common.c). */
const char *ORT_CALL bn_execution_provider(const ort_custom_op *op);
int ORT_CALL bn_output_type(const ort_custom_op *op, size_t index);
size_t ORT_CALL bn_output_count(const ort_custom_op *op);
int ORT_CALL bn_characteristic(const ort_custom_op *op, size_t index);
int ORT_CALL bn_memory_type(const ort_custom_op *op, size_t index);
int ORT_CALL bn_first_version(const ort_custom_op *op);
int ORT_CALL bn_last_version(const ort_custom_op *op);
ort_status *ORT_CALL bn_infer_shape(const ort_custom_op *op, ort_shape_context *context);

/* Gives y this type and shape; `symbols` are names of the dimensions that are -1, or NULL or empty. */
ort_status *bn_set_y_shape(bn_host *host, ort_shape_context *context, const int64_t *dims,
                           const char **symbols, int type, size_t rank);

/* All callbacks above but shape inference. */
#define BN_OP_COMMON                                                                               \
    .version = ORT_API_VERSION, .GetExecutionProviderType = bn_execution_provider,                 \
    .GetOutputType = bn_output_type, .GetOutputTypeCount = bn_output_count,                        \
    .GetInputCharacteristic = bn_characteristic, .GetOutputCharacteristic = bn_characteristic,     \
    .GetInputMemoryType = bn_memory_type, .GetStartVersion = bn_first_version,                     \
    .GetEndVersion = bn_last_version

#endif
