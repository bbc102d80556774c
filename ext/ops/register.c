/* The library's entry point: puts the ops into a session's options.
 *
 * Lifetime  ONNX Runtime keeps pointers to the domain and its ops and never says when the last
 *           session that uses them is gone.  Both are therefore made once per host, that is per
 *           table of API functions (a process may hold several ONNX Runtimes), and kept until the
 *           process ends.  Registering on any number of session options costs no more memory.
 * Threads   Hosts form a list that only grows, at its head, by compare and swap.  Threads that race
 *           to be the first may add their host twice; each uses its own, which does no harm. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

/* One row per op and type of x.  Rows of the same op must agree in all but that type. */
static const struct {
    const ort_custom_op *callbacks;
    bn_format format;
    bool is_panels, is_by_head;
    int x_type;
} OPS[] = {
#define BN_FORMAT(name, op, four_levels)                                                           \
    {&bn_matmul_op, BN_FORMAT_##name, .x_type = ORT_FLOAT},                                         \
    {&bn_matmul_op, BN_FORMAT_##name, .x_type = ORT_FLOAT16},
#include "formats.inc"
#undef BN_FORMAT
    {&bn_matmul_op, BN_FORMAT_i2s, .is_panels = true, .x_type = ORT_FLOAT},
    {&bn_matmul_op, BN_FORMAT_i2s, .is_panels = true, .x_type = ORT_FLOAT16},
    {.callbacks = &bn_block_hadamard, .x_type = ORT_FLOAT},
    {.callbacks = &bn_block_hadamard, .x_type = ORT_FLOAT16},
    {.callbacks = &bn_attention_op, .x_type = ORT_FLOAT},
    {.callbacks = &bn_attention_op, .is_by_head = true, .x_type = ORT_FLOAT},
};
enum { OP_COUNT = sizeof OPS / sizeof OPS[0] };

typedef struct domain domain;
struct domain {
    bn_host host;
    bn_op ops[OP_COUNT];
    ort_domain *handle;
    domain *next;
};

static _Atomic(domain *) domains;

/* Whether the slots of ort.h mean what we think: a status must come back as it was made. */
static int api_is_as_declared(const ort_api *api)
{
    static const char probe[] = "onnx_bitnet self check";
    ort_status *status = ort_CreateStatus(api)(ORT_NOT_IMPLEMENTED, probe);
    if (status == NULL) {
        return 0;
    }
    const int same = ort_GetErrorCode(api)(status) == ORT_NOT_IMPLEMENTED &&
                     strcmp(ort_GetErrorMessage(api)(status), probe) == 0;
    ort_ReleaseStatus(api)(status);
    return same;
}

static ort_status *make_domain(const ort_api *api, domain **made)
{
    domain *d = calloc(1, sizeof *d);
    if (d == NULL) {
        return ort_CreateStatus(api)(ORT_FAIL, "onnx_bitnet: out of memory");
    }
    d->host.api = api;
    atomic_init(&d->host.fresh, 0);
    atomic_init(&d->host.isas, 0);
    ort_status *status = ort_CreateCustomOpDomain(api)("onnx_bitnet", &d->handle);
    for (size_t i = 0; status == NULL && i < OP_COUNT; i++) {
        d->ops[i] = (bn_op){*OPS[i].callbacks, &d->host,         OPS[i].format, OPS[i].is_panels,
                            OPS[i].is_by_head, OPS[i].x_type};
        status = ort_CustomOpDomain_Add(api)(d->handle, &d->ops[i].callbacks);
    }
    if (status != NULL) {
        if (d->handle != NULL) {
            ort_ReleaseCustomOpDomain(api)(d->handle);
        }
        free(d);
        return status;
    }
    *made = d;
    return NULL;
}

static ort_status *find_domain(const ort_api *api, domain **found)
{
    for (domain *d = atomic_load(&domains); d != NULL; d = d->next) {
        if (d->host.api == api) {
            *found = d;
            return NULL;
        }
    }
    ort_status *status = make_domain(api, found);
    if (status == NULL) {
        (*found)->next = atomic_load(&domains);
        while (!atomic_compare_exchange_weak(&domains, &(*found)->next, *found)) {
        }
    }
    return status;
}

ORT_EXPORT ort_status *ORT_CALL RegisterCustomOps(ort_session_options *options,
                                                  const ort_api_base *base);

ORT_EXPORT ort_status *ORT_CALL RegisterCustomOps(ort_session_options *options,
                                                  const ort_api_base *base)
{
    const ort_api *api = base->GetApi(ORT_API_VERSION);
    if (api == NULL) {
        /* NULL would look like success; every ONNX Runtime has API 1, which can make a status. */
        char message[160];
        snprintf(message, sizeof message,
                 "onnx_bitnet needs onnxruntime 1.%d or newer, but this is onnxruntime %s",
                 ORT_API_VERSION, base->GetVersionString());
        return ort_CreateStatus(base->GetApi(1))(ORT_NOT_IMPLEMENTED, message);
    }
    if (!api_is_as_declared(api)) {
        return ort_CreateStatus(api)(
            ORT_FAIL, "onnx_bitnet: this onnxruntime's table of functions is not the known one");
    }
    domain *d = NULL;
    ort_status *status = find_domain(api, &d);
    return status != NULL ? status : ort_AddCustomOpDomain(api)(options, d->handle);
}
