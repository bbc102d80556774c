/* Reading a node: what is the same for every op. */
#include "node.h"

#include <stdarg.h>
#include <stdio.h>

bool bn_refuse(bn_node *node, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(node->reason, sizeof node->reason, format, args);
    va_end(args);
    return false;
}

/* ONNX Runtime does not say which node failed to load, so the message does. */
ort_status *bn_refusal(const bn_node *node, const char *op_type)
{
    const ort_api *api = node->api;
    char name[256] = "", message[576];
    size_t size = sizeof name;
    if (!bn_succeeded(api, ort_KernelInfo_GetNodeName(api)(node->info, name, &size))) {
        snprintf(name, sizeof name, "(a name of %zu bytes)", size);
    }
    snprintf(message, sizeof message, "%s node '%s': %s", op_type, name, node->reason);
    return ort_CreateStatus(api)(ORT_INVALID_GRAPH, message);
}

bool bn_succeeded(const ort_api *api, ort_status *status)
{
    if (status == NULL) {
        return true;
    }
    ort_ReleaseStatus(api)(status);
    return false;
}

bool bn_read_integer(bn_node *node, const char *name, int64_t lowest, int64_t *value)
{
    if (!bn_succeeded(node->api,
                      ort_KernelInfoGetAttribute_int64(node->api)(node->info, name, value))) {
        return bn_refuse(node, "attribute %s is missing or no integer", name);
    }
    if (*value < lowest || *value > INT32_MAX) {
        return bn_refuse(node, "attribute %s is %lld; it must be %lld to %lld", name,
                         (long long)*value, (long long)lowest, (long long)INT32_MAX);
    }
    return true;
}

bool bn_read_float(bn_node *node, const char *name, float *value)
{
    if (!bn_succeeded(node->api,
                      ort_KernelInfoGetAttribute_float(node->api)(node->info, name, value))) {
        return bn_refuse(node, "attribute %s is missing or no float", name);
    }
    return true;
}

/* Type and dimensions of a tensor, if it is one of this rank. */
static bool read_type_and_shape(const ort_api *api, const ort_value *value, size_t rank,
                                bn_constant *constant)
{
    ort_tensor_info *info = NULL;
    size_t count = 0;
    if (!bn_succeeded(api, ort_GetTensorTypeAndShape(api)(value, &info))) {
        return false;
    }
    const bool read =
        bn_succeeded(api, ort_GetTensorElementType(api)(info, &constant->type)) &&
        bn_succeeded(api, ort_GetDimensionsCount(api)(info, &count)) && count == rank &&
        bn_succeeded(api, ort_GetDimensions(api)(info, constant->dims, rank));
    ort_ReleaseTensorTypeAndShapeInfo(api)(info);
    return read;
}

bool bn_read_constant(bn_node *node, size_t index, const char *name, size_t rank,
                      bn_constant *constant)
{
    const ort_api *api = node->api;
    const ort_value *value = NULL;
    int is_constant = 0;
    void *data = NULL;

    if (!bn_succeeded(api, ort_KernelInfoGetConstantInput_tensor(api)(node->info, index,
                                                                      &is_constant, &value)) ||
        !is_constant || value == NULL) {
        return bn_refuse(node,
                         "input %s must be an initializer that is no graph input (before "
                         "onnxruntime 1.29: one of the node's own graph)",
                         name);
    }
    if (!read_type_and_shape(api, value, rank, constant)) {
        return bn_refuse(node, "input %s must be a tensor of rank %zu", name, rank);
    }
    if (!bn_succeeded(api, ort_GetTensorMutableData(api)((ort_value *)value, &data))) {
        return bn_refuse(node, "input %s has no data", name);
    }
    constant->data = data;
    return true;
}

/* ONNX Runtime drops the errors of shape inference, so a model whose x can never fit is refused
 * when it loads only if its kernels refuse it.  An input of unknown rank reports rank 0. */
bool bn_check_last_dimension(bn_node *node, size_t index, const char *name, size_t k)
{
    const ort_api *api = node->api;
    ort_type_info *type = NULL;
    const ort_tensor_info *info = NULL;
    size_t rank = 0;
    int64_t dims[BN_MAX_RANK] = {0};

    if (!bn_succeeded(api, ort_KernelInfo_GetInputTypeInfo(api)(node->info, index, &type))) {
        return true; /* no type is known yet */
    }
    const bool known =
        bn_succeeded(api, ort_CastTypeInfoToTensorInfo(api)(type, &info)) && info != NULL &&
        bn_succeeded(api, ort_GetDimensionsCount(api)(info, &rank)) && rank > 0 &&
        rank <= BN_MAX_RANK && bn_succeeded(api, ort_GetDimensions(api)(info, dims, rank));
    ort_ReleaseTypeInfo(api)(type);
    if (known && dims[rank - 1] >= 0 && dims[rank - 1] != (int64_t)k) {
        return bn_refuse(node, "the last dimension of input %s is %lld; it must be K = %zu", name,
                         (long long)dims[rank - 1], k);
    }
    return true;
}

/* The shape of x: rank, then dims, and the number of rows. */
static ort_status *read_x_shape(const ort_api *api, const ort_value *x, int64_t k,
                                int64_t dims[BN_MAX_RANK], size_t *rank, size_t *rows)
{
    ort_tensor_info *info = NULL;
    size_t elements = 0;

    ort_status *status = ort_GetTensorTypeAndShape(api)(x, &info);
    if (status != NULL) {
        return status;
    }
    status = ort_GetDimensionsCount(api)(info, rank);
    if (status == NULL && (*rank < 1 || *rank > BN_MAX_RANK)) {
        char message[96];
        snprintf(message, sizeof message, "input x has rank %zu; it must have rank 1 to %d", *rank,
                 BN_MAX_RANK);
        status = ort_CreateStatus(api)(ORT_INVALID_ARGUMENT, message);
    }
    if (status == NULL) {
        status = ort_GetDimensions(api)(info, dims, *rank);
    }
    if (status == NULL) {
        status = ort_GetTensorShapeElementCount(api)(info, &elements);
    }
    ort_ReleaseTensorTypeAndShapeInfo(api)(info);
    if (status == NULL && dims[*rank - 1] != k) {
        char message[96];
        snprintf(message, sizeof message,
                 "the last dimension of input x is %lld; it must be K = %lld",
                 (long long)dims[*rank - 1], (long long)k);
        status = ort_CreateStatus(api)(ORT_INVALID_ARGUMENT, message);
    }
    *rows = elements / (size_t)k;
    return status;
}

ort_status *bn_open_rows(const ort_api *api, ort_kernel_context *context, int64_t k, int64_t n,
                         bn_rows *rows)
{
    const ort_value *x = NULL;
    ort_value *y = NULL;
    void *x_data = NULL;
    int64_t dims[BN_MAX_RANK] = {0};
    size_t rank = 0;

    *rows = (bn_rows){NULL, NULL, 0};
    ort_status *status = ort_KernelContext_GetInput(api)(context, 0, &x);
    if (status == NULL) {
        status = read_x_shape(api, x, k, dims, &rank, &rows->rows);
    }
    if (status == NULL) {
        dims[rank - 1] = n;
        status = ort_KernelContext_GetOutput(api)(context, 0, dims, rank, &y);
    }
    if (status == NULL && rows->rows > 0) {
        status = ort_GetTensorMutableData(api)((ort_value *)x, &x_data);
        rows->x = x_data;
    }
    if (status == NULL && rows->rows > 0) {
        status = ort_GetTensorMutableData(api)(y, &rows->y);
    }
    return status;
}

ort_status *bn_open_tensor(const ort_api *api, ort_kernel_context *context, size_t index, const char *name,
                           bool is_exact, size_t rank, bn_tensor *tensor)
{
    const ort_value *value = NULL;
    ort_tensor_info *info = NULL;
    void *data = NULL;
    size_t count = 0;

    ort_status *status = ort_KernelContext_GetInput(api)(context, index, &value);
    if (status == NULL) {
        status = ort_GetTensorTypeAndShape(api)(value, &info);
    }
    if (status != NULL) {
        return status;
    }
    status = ort_GetDimensionsCount(api)(info, &count);
    if (status == NULL && (count > rank || (is_exact && count < rank))) {
        char message[96];
        snprintf(message, sizeof message, "input %s has rank %zu; it must have rank %s%zu", name, count,
                 is_exact ? "" : "up to ", rank);
        status = ort_CreateStatus(api)(ORT_INVALID_ARGUMENT, message);
    }
    for (size_t i = 0; status == NULL && i < rank - count; i++) {
        tensor->dims[i] = 1;
    }
    if (status == NULL) {
        status = ort_GetDimensions(api)(info, tensor->dims + (rank - count), count);
    }
    ort_ReleaseTensorTypeAndShapeInfo(api)(info);
    if (status == NULL) {
        status = ort_GetTensorMutableData(api)((ort_value *)value, &data);
        tensor->data = data;
    }
    return status;
}

void bn_run_in_pool(void *context, void (*task)(void *arg, size_t index), size_t count, void *arg)
{
    bn_pool *pool = context;
    if (pool->status == NULL) {
        pool->status = ort_KernelContext_ParallelFor(pool->api)(pool->context, task, count, 0, arg);
    }
}
