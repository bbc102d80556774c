/* Attention and AttentionByHead as ONNX Runtime custom ops: check the shapes of a run, then leave the work to
 * attention.h. */
#include "attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "node.h"
#include "ops.h"

enum { Q, K, V, MASK, INPUT_COUNT };
enum { RANK = 4 };
enum { BATCH, MASK_HEAD, MASK_ROW, MASK_TOKEN }; /* dimensions of the mask, the first one of all */
enum { ELEMENT = 3 };                            /* the last one of the others */

/* Dimensions of q, k, v and y: a row is one of q, or a token of k and v. */
typedef struct {
    size_t row, head;
} order;

typedef struct {
    const ort_api *api;
    uint32_t isas;
    order order;
    float scale;
    int nan_to_zero;
} kernel;

static order order_of(const ort_custom_op *op)
{
    return ((const bn_op *)op)->is_by_head ? (order){.head = 1, .row = 2} : (order){.row = 1, .head = 2};
}

static bool read_attributes(bn_node *node, kernel *k)
{
    int64_t nan_to_zero;

    if (!bn_read_float(node, "scale", &k->scale) ||
        !bn_read_integer(node, "nan_to_zero", 0, &nan_to_zero)) {
        return false;
    }
    if (!isfinite(k->scale)) {
        return bn_refuse(node, "attribute scale is %g; it must be finite", (double)k->scale);
    }
    if (nan_to_zero > 1) {
        return bn_refuse(node, "attribute nan_to_zero is %lld; it must be 0 or 1", (long long)nan_to_zero);
    }
    k->nan_to_zero = (int)nan_to_zero;
    return true;
}

static ort_status *ORT_CALL create_kernel(const ort_custom_op *op, const ort_api *api,
                                          const ort_kernel_info *info, void **created)
{
    bn_node node = {.api = api, .host = ((const bn_op *)op)->host, .info = info};
    kernel found = {.api = api, .order = order_of(op)};

    if (!read_attributes(&node, &found)) {
        return bn_refusal(&node, op->GetName(op));
    }
    const char *reason = bn_node_isas(&node, &found.isas);
    kernel *k = reason == NULL ? malloc(sizeof *k) : NULL;
    if (k == NULL) {
        bn_refuse(&node, "%s", reason != NULL ? reason : "out of memory");
        return bn_refusal(&node, op->GetName(op));
    }
    *k = found;
    *created = k;
    return NULL;
}

static void ORT_CALL destroy_kernel(void *state)
{
    free(state);
}

/* ---- A run ---- */

static bn_head_strides dense_strides(const int64_t *dims, order o)
{
    const size_t inner = (size_t)dims[ELEMENT], outer = (size_t)dims[2] * inner;
    return (bn_head_strides){
        .batch = (size_t)dims[1] * outer,
        .row = o.row == 1 ? outer : inner,
        .head = o.head == 1 ? outer : inner,
    };
}

/* A batch or head that is alone serves all. */
static bn_head_strides strides_of(const int64_t *dims, order o)
{
    bn_head_strides strides = dense_strides(dims, o);
    strides.batch = dims[BATCH] == 1 ? 0 : strides.batch;
    strides.head = dims[o.head] == 1 ? 0 : strides.head;
    return strides;
}

static bn_head_strides mask_strides_of(const int64_t *dims)
{
    const size_t row = (size_t)dims[MASK_TOKEN], head = (size_t)dims[MASK_ROW] * row;
    return (bn_head_strides){
        .batch = dims[BATCH] == 1 ? 0 : (size_t)dims[MASK_HEAD] * head,
        .row = dims[MASK_ROW] == 1 ? 0 : row,
        .head = dims[MASK_HEAD] == 1 ? 0 : head,
    };
}

/* What four dimensions broadcast to; -1 if they do not. */
static int64_t broadcast(int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t dims[] = {a, b, c, d};
    int64_t joint = 1;

    for (size_t i = 0; i < 4; i++) {
        if (dims[i] != 1 && joint != 1 && dims[i] != joint) {
            return -1;
        }
        joint = dims[i] == 1 ? joint : dims[i];
    }
    return joint;
}

/* The shape of y; returns NULL, or what does not fit. */
static const char *y_shape(const bn_tensor *in, order o, int64_t *dims)
{
    const int64_t *q = in[Q].dims, *k = in[K].dims, *v = in[V].dims, *mask = in[MASK].dims;

    dims[BATCH] = broadcast(q[BATCH], k[BATCH], v[BATCH], mask[BATCH]);
    dims[o.row] = q[o.row];
    dims[o.head] = broadcast(q[o.head], k[o.head], v[o.head], mask[MASK_HEAD]);
    dims[ELEMENT] = v[ELEMENT];
    if (q[ELEMENT] != k[ELEMENT]) {
        return "q and k must have the same last dimension";
    }
    if (k[o.row] != v[o.row]) {
        return "k and v must have the same number of tokens";
    }
    if (dims[BATCH] < 0 || dims[o.head] < 0) {
        return "the batches and the heads of q, k, v and mask must be the same, or 1";
    }
    if ((mask[MASK_ROW] != 1 && mask[MASK_ROW] != q[o.row]) ||
        (mask[MASK_TOKEN] != 1 && mask[MASK_TOKEN] != k[o.row])) {
        return "mask must end in the rows of q and the tokens of k, or in 1; convert with attention = 'keep'";
    }
    return NULL;
}

static bn_attention_call make_call(const kernel *of, const bn_tensor *in, const int64_t *y_dims, float *y)
{
    const order o = of->order;
    return (bn_attention_call){
        .q = in[Q].data,
        .k = in[K].data,
        .v = in[V].data,
        .mask = in[MASK].data,
        .y = y,
        .q_strides = strides_of(in[Q].dims, o),
        .k_strides = strides_of(in[K].dims, o),
        .v_strides = strides_of(in[V].dims, o),
        .y_strides = dense_strides(y_dims, o),
        .mask_strides = mask_strides_of(in[MASK].dims),
        .mask_token_stride = in[MASK].dims[MASK_TOKEN] == 1 ? 0 : 1,
        .batches = (size_t)y_dims[BATCH],
        .rows = (size_t)y_dims[o.row],
        .heads = (size_t)y_dims[o.head],
        .tokens = (size_t)in[V].dims[o.row],
        .width = (size_t)in[Q].dims[ELEMENT],
        .value_width = (size_t)y_dims[ELEMENT],
        .scale = of->scale,
        .nan_to_zero = of->nan_to_zero,
    };
}

static ort_status *ORT_CALL run_kernel(void *state, ort_kernel_context *context)
{
    static const char *const names[INPUT_COUNT] = {"q", "k", "v", "mask"};
    const kernel *k = state;
    bn_tensor in[INPUT_COUNT];
    ort_value *y = NULL;
    void *y_data = NULL;

    for (size_t i = 0; i < INPUT_COUNT; i++) {
        ort_status *status = bn_open_tensor(k->api, context, i, names[i], i != MASK, RANK, &in[i]);
        if (status != NULL) {
            return status;
        }
    }
    int64_t dims[RANK];
    const char *reason = y_shape(in, k->order, dims);
    if (reason != NULL) {
        return ort_CreateStatus(k->api)(ORT_INVALID_ARGUMENT, reason);
    }
    ort_status *status = ort_KernelContext_GetOutput(k->api)(context, 0, dims, RANK, &y);
    if (status == NULL) {
        status = ort_GetTensorMutableData(k->api)(y, &y_data);
    }
    if (status != NULL) {
        return status;
    }
    bn_pool pool = {k->api, context, NULL};
    const bn_attention_call call = make_call(k, in, dims, y_data);
    reason = bn_attention_run(&call, k->isas, (bn_threads){.run = bn_run_in_pool, .context = &pool});
    if (pool.status != NULL || reason == NULL) {
        return pool.status;
    }
    return ort_CreateStatus(k->api)(ORT_FAIL, reason);
}

/* ---- The op ---- */

/* What is known of an input's shape: dims, and names where they are -1. */
typedef struct {
    int64_t dims[RANK];
    const char *symbols[RANK];
    size_t rank; /* 0 may mean that it is unknown */
} known_shape;

/* Where a shape has fewer dimensions, those of 1 come first; without any nothing is known. */
static ort_status *read_known_shape(const ort_api *api, ort_shape_context *context, size_t index,
                                    known_shape *shape)
{
    ort_tensor_info *info = NULL;

    ort_status *status = ort_ShapeInferContext_GetInputTypeShape(api)(context, index, &info);
    if (status == NULL) {
        status = ort_GetDimensionsCount(api)(info, &shape->rank);
    }
    for (size_t i = 0; i < RANK; i++) {
        shape->dims[i] = shape->rank > 0 ? 1 : -1;
        shape->symbols[i] = NULL;
    }
    if (status != NULL || shape->rank > RANK) {
        return status;
    }
    const size_t first = RANK - shape->rank;
    status = ort_GetDimensions(api)(info, shape->dims + first, shape->rank);
    return status != NULL ? status
                          : ort_GetSymbolicDimensions(api)(info, shape->symbols + first, shape->rank);
}

static bool is_named(const char *symbol)
{
    return symbol != NULL && symbol[0] != '\0';
}

/* What a dimension of y broadcasts to: a known one that is not 1, else the name that all share which are not
 * known to be 1, else nothing that is known. */
static void join_dimension(const known_shape *in, size_t axis, size_t mask_axis, int64_t *dim,
                           const char **symbol)
{
    bool is_shared = true;

    *dim = 1;
    *symbol = NULL;
    for (size_t i = 0; i < INPUT_COUNT; i++) {
        const size_t at = i == MASK ? mask_axis : axis;
        const int64_t own = in[i].dims[at];
        if (own != 1 && *dim != -1 && *dim != 1) {
            continue; /* it is settled */
        }
        if (own >= 0 && own != 1) {
            *dim = own;
        } else if (own < 0) {
            is_shared = is_shared && is_named(in[i].symbols[at]) &&
                        (*dim == 1 || strcmp(*symbol, in[i].symbols[at]) == 0);
            *dim = -1;
            *symbol = is_shared ? in[i].symbols[at] : NULL;
        }
    }
}

static ort_status *ORT_CALL infer_shape(const ort_custom_op *op, ort_shape_context *context)
{
    bn_host *host = ((const bn_op *)op)->host;
    const order o = order_of(op);
    known_shape in[INPUT_COUNT];

    for (size_t i = 0; i < INPUT_COUNT; i++) {
        ort_status *status = read_known_shape(host->api, context, i, &in[i]);
        if (status != NULL || (i != MASK && in[i].rank != RANK)) {
            return status;
        }
    }
    int64_t dims[RANK];
    const char *symbols[RANK];
    join_dimension(in, BATCH, BATCH, &dims[BATCH], &symbols[BATCH]);
    join_dimension(in, o.head, MASK_HEAD, &dims[o.head], &symbols[o.head]);
    dims[o.row] = in[Q].dims[o.row];
    symbols[o.row] = in[Q].symbols[o.row];
    dims[ELEMENT] = in[V].dims[ELEMENT];
    symbols[ELEMENT] = in[V].symbols[ELEMENT];
    return bn_set_y_shape(host, context, dims, symbols, ORT_FLOAT, RANK);
}

static const char *ORT_CALL op_name(const ort_custom_op *op)
{
    return ((const bn_op *)op)->is_by_head ? "AttentionByHead" : "Attention";
}

static int ORT_CALL input_type(const ort_custom_op *op, size_t index)
{
    (void)op, (void)index;
    return ORT_FLOAT;
}

static size_t ORT_CALL input_count(const ort_custom_op *op)
{
    (void)op;
    return INPUT_COUNT;
}

const ort_custom_op bn_attention_op = {
    BN_OP_COMMON,
    .InferOutputShapeFn = infer_shape,
    .GetName = op_name,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .CreateKernelV2 = create_kernel,
    .KernelDestroy = destroy_kernel,
    .KernelComputeV2 = run_kernel,
};
