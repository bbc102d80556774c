/* BlockHadamard as an ONNX Runtime custom op: reads and checks the node, then shares the rows of x
 * out over the session's threads. */
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "kernel.h"
#include "node.h"
#include "ops.h"

enum { X, SIGNS, INPUT_COUNT };
enum { MAX_BLOCK = 4096 }; /* larger ones lose precision, and their matrix is too large to write out */

/* Values that make a task of their own worth while: some microseconds of work. */
enum { TASK_VALUES = 1 << 16 };

typedef struct {
    const ort_api *api;
    bn_hadamard_fn *transform;
    bn_widen_fn *widen;
    bn_narrow_fn *narrow;
    int x_type;
    size_t k, block;
    float signs[]; /* (k) */
} kernel;

/* ---- Reading the node ---- */

static bool read_block_size(bn_node *node, size_t *block)
{
    int64_t block_size;
    if (!bn_read_integer(node, "block_size", 1, &block_size)) {
        return false;
    }
    if (block_size > MAX_BLOCK || (block_size & (block_size - 1)) != 0) {
        return bn_refuse(node, "attribute block_size is %lld; it must be a power of two up to %d",
                         (long long)block_size, MAX_BLOCK);
    }
    *block = (size_t)block_size;
    return true;
}

static bool read_signs(bn_node *node, size_t block, size_t *k, const float **signs)
{
    bn_constant c;
    if (!bn_read_constant(node, SIGNS, "signs", 1, &c)) {
        return false;
    }
    if (c.type != ORT_FLOAT) {
        return bn_refuse(node, "input signs must be float32");
    }
    if (c.dims[0] < 1 || c.dims[0] % (int64_t)block != 0) {
        return bn_refuse(node,
                         "input signs has length K = %lld; it must be a multiple of block_size = "
                         "%zu, and not 0",
                         (long long)c.dims[0], block);
    }
    *k = (size_t)c.dims[0];
    *signs = c.data;
    for (size_t i = 0; i < *k; i++) {
        if ((*signs)[i] != 1.0f && (*signs)[i] != -1.0f) {
            return bn_refuse(node, "input signs holds %.9g at %zu; it must be 1 or -1 everywhere",
                             (double)(*signs)[i], i);
        }
    }
    return true;
}

/* The kernel ops of one instruction set and those below it; bn_find never returns NULL for them. */
static bool find_kernels(bn_node *node, kernel *k)
{
    uint32_t isas = 0;
    const char *reason = bn_node_isas(node, &isas);
    if (reason != NULL) {
        return bn_refuse(node, "%s", reason);
    }
    k->transform = (bn_hadamard_fn *)bn_find("hadamard", "f32", isas)->fn;
    k->widen = (bn_widen_fn *)bn_find("widen", "f16", isas)->fn;
    k->narrow = (bn_narrow_fn *)bn_find("narrow", "f16", isas)->fn;
    return true;
}

/* ---- The kernel ---- */

static kernel *make_kernel(bn_node *node)
{
    size_t block = 0, k = 0;
    const float *signs = NULL;

    if (!read_block_size(node, &block) || !read_signs(node, block, &k, &signs) ||
        !bn_check_last_dimension(node, X, "x", k)) {
        return NULL;
    }
    kernel *made = malloc(sizeof *made + k * sizeof *signs);
    if (made == NULL) {
        bn_refuse(node, "out of memory");
        return NULL;
    }
    *made = (kernel){.api = node->api, .k = k, .block = block};
    memcpy(made->signs, signs, k * sizeof *signs);
    if (!find_kernels(node, made)) {
        free(made);
        return NULL;
    }
    return made;
}

static ort_status *ORT_CALL create_kernel(const ort_custom_op *op, const ort_api *api,
                                          const ort_kernel_info *info, void **created)
{
    bn_node node = {.api = api, .host = ((const bn_op *)op)->host, .info = info};
    kernel *k = make_kernel(&node);
    if (k == NULL) {
        return bn_refusal(&node, op->GetName(op));
    }
    k->x_type = ((const bn_op *)op)->x_type;
    *created = k;
    return NULL;
}

static void ORT_CALL destroy_kernel(void *state)
{
    free(state);
}

typedef struct {
    const kernel *kernel;
    const void *x;
    void *y;
    size_t rows, task_rows;
} job;

/* A row of float16 goes through float32 a few blocks at a time. */
static void transform_half(const kernel *k, const uint16_t *x, uint16_t *y)
{
    float buffer[MAX_BLOCK]; /* a whole number of blocks */

    for (size_t at = 0; at < k->k; at += MAX_BLOCK) {
        const size_t count = k->k - at < MAX_BLOCK ? k->k - at : MAX_BLOCK;
        k->widen(&(bn_widen_args){x + at, buffer, count});
        k->transform(&(bn_hadamard_args){buffer, k->signs + at, buffer, 1, count, k->block});
        k->narrow(&(bn_narrow_args){buffer, y + at, count});
    }
}

static void run_task(void *arg, size_t index)
{
    const job *j = arg;
    const kernel *k = j->kernel;
    const size_t first = index * j->task_rows;
    const size_t rows = j->rows - first < j->task_rows ? j->rows - first : j->task_rows;

    if (k->x_type == ORT_FLOAT) {
        k->transform(&(bn_hadamard_args){(const float *)j->x + first * k->k, k->signs,
                                         (float *)j->y + first * k->k, rows, k->k, k->block});
        return;
    }
    for (size_t row = first; row < first + rows; row++) {
        transform_half(k, (const uint16_t *)j->x + row * k->k, (uint16_t *)j->y + row * k->k);
    }
}

static ort_status *run_rows(const kernel *k, const ort_kernel_context *context, job *j)
{
    j->task_rows = k->k < TASK_VALUES ? TASK_VALUES / k->k : 1;
    const size_t tasks = (j->rows + j->task_rows - 1) / j->task_rows;
    if (tasks == 1) {
        run_task(j, 0);
        return NULL;
    }
    return ort_KernelContext_ParallelFor(k->api)(context, run_task, tasks, 0, j);
}

static ort_status *ORT_CALL run_kernel(void *state, ort_kernel_context *context)
{
    const kernel *k = state;
    bn_rows run;

    ort_status *status = bn_open_rows(k->api, context, (int64_t)k->k, (int64_t)k->k, &run);
    if (status != NULL || run.rows == 0) {
        return status;
    }
    return run_rows(k, context, &(job){k, run.x, run.y, run.rows, 0});
}

/* ---- The op ---- */

static const char *ORT_CALL op_name(const ort_custom_op *op)
{
    (void)op;
    return "BlockHadamard";
}

static int ORT_CALL input_type(const ort_custom_op *op, size_t index)
{
    return index == X ? ((const bn_op *)op)->x_type : ORT_FLOAT;
}

static size_t ORT_CALL input_count(const ort_custom_op *op)
{
    (void)op;
    return INPUT_COUNT;
}

const ort_custom_op bn_block_hadamard = {
    BN_OP_COMMON,
    .InferOutputShapeFn = bn_infer_shape,
    .GetName = op_name,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .CreateKernelV2 = create_kernel,
    .KernelDestroy = destroy_kernel,
    .KernelComputeV2 = run_kernel,
};
