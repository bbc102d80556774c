/* MatMulI2S, MatMulTL1, MatMulTL2 and MatMulT5 as ONNX Runtime custom ops, one for each format, and
 * MatMulPanel: MatMulI2S whose weight lies in the file as the kernels read it (layout.h).  Reads and checks the node, then leaves the work to matmul.h. */
#include <math.h>
#include <stdlib.h>

#include "half.h"
#include "load.h"
#include "matmul.h"
#include "node.h"
#include "ops.h"

enum { X, WEIGHT, SCALE, ZERO_POINT }; /* then bias; zero_point only for four levels */
enum { MAX_PLANES = 4 };

static size_t bias_index(bn_format format)
{
    return bn_formats[format].four_levels ? ZERO_POINT + 1 : ZERO_POINT;
}

typedef struct {
    const ort_api *api;
    bn_matmul *layer;
    int64_t n, k;
    bn_float_type type;
    size_t cpus; /* of this process; how many threads a session has, ONNX Runtime does not say */
} kernel;

/* ---- Reading the node ---- */

static bool read_attributes(bn_node *node, bn_matmul_desc *desc)
{
    int64_t n, k, block_size, bits;
    float step;
    if (!bn_read_integer(node, "K", 1, &k) || !bn_read_integer(node, "N", 1, &n) ||
        !bn_read_integer(node, "block_size", 0, &block_size) ||
        !bn_read_integer(node, "activation_bits", 0, &bits) ||
        !bn_read_float(node, "activation_scale", &step)) {
        return false;
    }
    if (bits != 8 && bits != 16 && bits != 32) {
        return bn_refuse(node, "attribute activation_bits is %lld; it must be 8, 16 or 32",
                         (long long)bits);
    }
    if (!isfinite(step) || step < 0) {
        return bn_refuse(node, "attribute activation_scale is %g; it must be finite and 0 or more",
                         (double)step);
    }
    desc->n = (size_t)n;
    desc->k = (size_t)k;
    desc->block_size = (size_t)block_size;
    desc->activation_bits = (int)bits;
    desc->activation_scale = step;
    return true;
}

/* Rows of a plane and their bytes, as the weight's shape must say. */
static void weight_shape(const bn_matmul_desc *desc, int64_t *rows, int64_t *row_bytes)
{
    *rows = (int64_t)desc->n;
    *row_bytes = (int64_t)bn_formats[desc->format].row_bytes(desc->k);
    if (desc->is_panels) { /* super-panels of 64 outputs */
        *rows = (*rows + 63) / 64;
        *row_bytes = 16 * (((int64_t)desc->k + 15) / 16 * 16);
    }
}

static bool read_weight(bn_node *node, bn_matmul_desc *desc)
{
    int64_t rows, row_bytes;
    bn_constant c;
    if (!bn_read_constant(node, WEIGHT, "weight", 3, &c)) {
        return false;
    }
    if (c.type != ORT_UINT8) {
        return bn_refuse(node, "input weight must be uint8");
    }
    weight_shape(desc, &rows, &row_bytes);
    if (c.dims[0] < 1 || c.dims[0] > MAX_PLANES || c.dims[1] != rows || c.dims[2] != row_bytes) {
        return bn_refuse(node,
                         "input weight has shape [%lld, %lld, %lld]; with N = %zu and K = %zu it "
                         "must be [1 to %d, %lld, %lld]",
                         (long long)c.dims[0], (long long)c.dims[1], (long long)c.dims[2], desc->n,
                         desc->k, MAX_PLANES, (long long)rows, (long long)row_bytes);
    }
    desc->planes = (size_t)c.dims[0];
    desc->weight = c.data;
    return true;
}

/* A copy of scales or zero points as float32 (planes, rows, groups): matmul.h wants one for each
 * group even where the model has one for all.  NULL when memory is out or one is not finite. */
static float *copy_parameters(bn_node *node, const char *name, const bn_constant *c, size_t groups)
{
    const size_t in_row = (size_t)c->dims[2]; /* groups or 1 */
    const size_t rows = (size_t)c->dims[0] * (size_t)c->dims[1];
    float *copy = groups <= SIZE_MAX / sizeof *copy ? calloc(rows, groups * sizeof *copy) : NULL;
    if (copy == NULL) {
        bn_refuse(node, "out of memory");
        return NULL;
    }
    for (size_t row = 0; row < rows; row++) {
        for (size_t group = 0; group < groups; group++) {
            const size_t from = row * in_row + (in_row == 1 ? 0 : group);
            const float value = c->type == ORT_FLOAT
                                    ? ((const float *)c->data)[from]
                                    : bn_half_to_float(((const uint16_t *)c->data)[from]);
            if (!isfinite(value)) {
                bn_refuse(node, "input %s holds NaN or infinity", name);
                free(copy);
                return NULL;
            }
            copy[row * groups + group] = value;
        }
    }
    return copy;
}

/* Sets rows to N or 1, and parameters to new memory of the caller's. */
static bool read_parameters(bn_node *node, size_t index, const char *name,
                            const bn_matmul_desc *desc, size_t *rows, float **parameters)
{
    const size_t groups =
        desc->block_size == 0 ? 1 : (desc->k + desc->block_size - 1) / desc->block_size;
    bn_constant c;
    if (!bn_read_constant(node, index, name, 3, &c)) {
        return false;
    }
    if (c.type != ORT_FLOAT && c.type != ORT_FLOAT16) {
        return bn_refuse(node, "input %s must be float32 or float16", name);
    }
    if (c.dims[0] != (int64_t)desc->planes || (c.dims[1] != (int64_t)desc->n && c.dims[1] != 1) ||
        (c.dims[2] != (int64_t)groups && c.dims[2] != 1)) {
        return bn_refuse(node,
                         "input %s has shape [%lld, %lld, %lld]; it must be "
                         "[%zu, %zu or 1, %zu or 1]",
                         name, (long long)c.dims[0], (long long)c.dims[1], (long long)c.dims[2],
                         desc->planes, desc->n, groups);
    }
    *rows = (size_t)c.dims[1];
    *parameters = copy_parameters(node, name, &c, groups);
    return *parameters != NULL;
}

static bool read_bias(bn_node *node, bn_matmul_desc *desc)
{
    bn_constant c;
    if (!bn_read_constant(node, bias_index(desc->format), "bias", 1, &c)) {
        return false;
    }
    if (c.type != ORT_FLOAT || c.dims[0] != (int64_t)desc->n) {
        return bn_refuse(node, "input bias must be float32 [%zu]", desc->n);
    }
    desc->bias = c.data;
    return true;
}

static bool create_layer(bn_node *node, bn_matmul_desc *desc, bn_matmul **layer)
{
    float *scale = NULL, *zero_point = NULL;
    uint32_t isas = 0;

    bool good = read_attributes(node, desc) &&
                bn_check_last_dimension(node, X, "x", desc->k) && read_weight(node, desc) &&
                read_parameters(node, SCALE, "scale", desc, &desc->scale_rows, &scale) &&
                (!bn_formats[desc->format].four_levels ||
                 read_parameters(node, ZERO_POINT, "zero_point", desc, &desc->zero_point_rows,
                                 &zero_point)) &&
                read_bias(node, desc);
    if (good) {
        desc->scale = scale;
        desc->zero_point = zero_point;
        desc->threads = bn_load_threads();
        const char *reason = bn_node_isas(node, &isas);
        if (reason == NULL) {
            reason = bn_matmul_create(desc, isas, layer);
        }
        good = reason == NULL || bn_refuse(node, "%s", reason);
    }
    if (good && !desc->is_panels) {
        bn_drop_file_pages(desc->weight, desc->planes * desc->n *
                                             bn_formats[desc->format].row_bytes(desc->k));
    }
    free(scale);
    free(zero_point);
    return good;
}

/* ---- The kernel ---- */

static ort_status *ORT_CALL create_kernel(const ort_custom_op *op, const ort_api *api,
                                          const ort_kernel_info *info, void **created)
{
    bn_node node = {.api = api, .host = ((const bn_op *)op)->host, .info = info};
    bn_matmul_desc desc = {
        .format = ((const bn_op *)op)->format,
        .is_panels = ((const bn_op *)op)->is_panels,
    };
    bn_matmul *layer = NULL;

    kernel *k = malloc(sizeof *k);
    if (k == NULL) {
        return ort_CreateStatus(api)(ORT_FAIL, "onnx_bitnet: out of memory");
    }
    if (!create_layer(&node, &desc, &layer)) {
        free(k);
        return bn_refusal(&node, op->GetName(op));
    }
    *k = (kernel){
        .api = api,
        .layer = layer,
        .n = (int64_t)desc.n,
        .k = (int64_t)desc.k,
        .type = ((const bn_op *)op)->x_type == ORT_FLOAT ? BN_FLOAT32 : BN_FLOAT16,
        .cpus = desc.threads.count,
    };
    *created = k;
    return NULL;
}

static void ORT_CALL destroy_kernel(void *state)
{
    kernel *k = state;
    if (k != NULL) {
        bn_matmul_destroy(k->layer);
        free(k);
    }
}

static ort_status *ORT_CALL run_kernel(void *state, ort_kernel_context *context)
{
    const kernel *k = state;
    bn_rows run;

    ort_status *status = bn_open_rows(k->api, context, k->k, k->n, &run);
    if (status != NULL || run.rows == 0) {
        return status;
    }
    bn_pool pool = {k->api, context, NULL};
    const bn_threads threads = {bn_run_in_pool, &pool, k->cpus};
    const char *reason = bn_matmul_run(k->layer, run.x, run.y, run.rows, k->type, threads);
    if (pool.status != NULL || reason == NULL) {
        return pool.status;
    }
    return ort_CreateStatus(k->api)(ORT_FAIL, reason);
}

/* ---- The op ---- */

static const char *ORT_CALL op_name(const ort_custom_op *op)
{
    const bn_op *matmul = (const bn_op *)op;
    return matmul->is_panels ? "MatMulPanel" : bn_formats[matmul->format].op_type;
}

static int ORT_CALL input_type(const ort_custom_op *op, size_t index)
{
    if (index == X) {
        return ((const bn_op *)op)->x_type;
    }
    if (index == WEIGHT) {
        return ORT_UINT8;
    }
    /* read_parameters checks the others */
    return index == bias_index(((const bn_op *)op)->format) ? ORT_FLOAT : ORT_ANY_TYPE;
}

static size_t ORT_CALL input_count(const ort_custom_op *op)
{
    return bias_index(((const bn_op *)op)->format) + 1;
}

const ort_custom_op bn_matmul_op = {
    BN_OP_COMMON,
    .InferOutputShapeFn = bn_infer_shape,
    .GetName = op_name,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .CreateKernelV2 = create_kernel,
    .KernelDestroy = destroy_kernel,
    .KernelComputeV2 = run_kernel,
};
