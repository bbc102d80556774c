/* What ONNX Runtime asks of every op, above all the shape of y: that of x, with N as its last
 * dimension if the op has one. */
#include <stdio.h>

#include "node.h"
#include "ops.h"

/* An unknown dimension without a name reads -1 with an empty symbol.  Given back like that, ONNX
 * Runtime takes -1 for a length and folds a Shape of y to it, so such a dimension gets a name that
 * no other has. */
ort_status *bn_set_y_shape(bn_host *host, ort_shape_context *context, const int64_t *dims,
                           const char **symbols, int type, size_t rank)
{
    const ort_api *api = host->api;
    char fresh[BN_MAX_RANK][32];
    ort_tensor_info *y = NULL;

    ort_status *status = ort_CreateTensorTypeAndShapeInfo(api)(&y);
    if (status != NULL) {
        return status;
    }
    for (size_t i = 0; i < rank; i++) {
        if (dims[i] >= 0) {
            symbols[i] = "";
        } else if (symbols[i] == NULL || symbols[i][0] == '\0') {
            snprintf(fresh[i], sizeof fresh[i], "onnx_bitnet_%lu",
                     atomic_fetch_add(&host->fresh, 1));
            symbols[i] = fresh[i];
        }
    }
    status = ort_SetTensorElementType(api)(y, type);
    if (status == NULL) {
        status = ort_SetDimensions(api)(y, dims, rank);
    }
    if (status == NULL) {
        status = ort_SetSymbolicDimensions(api)(y, symbols, rank);
    }
    if (status == NULL) {
        status = ort_ShapeInferContext_SetOutputTypeShape(api)(context, 0, y);
    }
    ort_ReleaseTensorTypeAndShapeInfo(api)(y);
    return status;
}

/* ONNX Runtime makes one schema of the ops that share a name and calls the first one's shape
 * inference for all of them, so the type of y is that of the node's x, not that of the op's. */
ort_status *ORT_CALL bn_infer_shape(const ort_custom_op *op, ort_shape_context *context)
{
    bn_host *host = ((const bn_op *)op)->host;
    const ort_api *api = host->api;
    ort_tensor_info *x = NULL;
    const ort_attribute *attribute = NULL;
    int64_t n = 0, dims[BN_MAX_RANK];
    const char *symbols[BN_MAX_RANK];
    size_t rank = 0, size = 0;
    int type = ORT_FLOAT;

    ort_status *status = ort_ShapeInferContext_GetInputTypeShape(api)(context, 0, &x);
    if (status == NULL) {
        status = ort_GetTensorElementType(api)(x, &type);
    }
    if (status == NULL) {
        status = ort_GetDimensionsCount(api)(x, &rank);
    }
    const bool has_n = status == NULL && bn_succeeded(api, ort_ShapeInferContext_GetAttribute(api)(
                                                               context, "N", &attribute));
    if (has_n) {
        status = ort_ReadOpAttr(api)(attribute, ORT_ATTRIBUTE_INT, &n, sizeof n, &size);
    }
    /* Rank 0 may mean that the rank is unknown: then nothing is said.  A wrong or missing N is
     * refused when the kernel is created. */
    if (status != NULL || rank == 0 || rank > BN_MAX_RANK || (has_n && n < 1)) {
        return status;
    }
    status = ort_GetDimensions(api)(x, dims, rank);
    if (status == NULL) {
        status = ort_GetSymbolicDimensions(api)(x, symbols, rank);
    }
    if (status != NULL) {
        return status;
    }
    if (has_n) {
        dims[rank - 1] = n;
    }
    return bn_set_y_shape(host, context, dims, symbols, type, rank);
}

const char *ORT_CALL bn_execution_provider(const ort_custom_op *op)
{
    (void)op;
    return NULL; /* the CPU */
}

int ORT_CALL bn_output_type(const ort_custom_op *op, size_t index)
{
    (void)index;
    return ((const bn_op *)op)->x_type;
}

size_t ORT_CALL bn_output_count(const ort_custom_op *op)
{
    (void)op;
    return 1;
}

/* All inputs are required: where an optional input is left out in the middle, ONNX Runtime before
 * 1.24 reads a null pointer. */
int ORT_CALL bn_characteristic(const ort_custom_op *op, size_t index)
{
    (void)op, (void)index;
    return ORT_REQUIRED;
}

int ORT_CALL bn_memory_type(const ort_custom_op *op, size_t index)
{
    (void)op, (void)index;
    return ORT_DEFAULT_MEMORY;
}

int ORT_CALL bn_first_version(const ort_custom_op *op)
{
    (void)op;
    return 1;
}

/* So high that a model which does not import our domain finds the ops too. */
int ORT_CALL bn_last_version(const ort_custom_op *op)
{
    (void)op;
    return 1000;
}
