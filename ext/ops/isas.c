/* Which instruction sets the ops may use: what the self-check found is kept in the host. */
#include <stdio.h>

#include "cpu.h"
#include "node.h"
#include "selfcheck.h"

static void warn(const bn_node *node, bn_isa isa)
{
    const ort_api *api = node->api;
    const ort_logger *logger = NULL;
    char message[192];

    snprintf(message, sizeof message,
             "onnx_bitnet: the %s kernels give wrong results on this machine and are not used; "
             "weaker ones take their place",
             bn_isa_name(isa));
    if (bn_succeeded(api, ort_KernelInfo_GetLogger(api)(node->info, &logger))) {
        bn_succeeded(api, ort_Logger_LogMessage(api)(logger, ORT_LOG_WARNING, message,
                                                     ORT_PATH(__FILE__), __LINE__, __func__));
    }
}

/* Checks what no one has checked so far.  Threads may do so at once; who is first warns. */
static uint64_t check(const bn_node *node, uint32_t allowed, uint64_t known)
{
    size_t count = 0;
    const bn_kernel *kernels = bn_kernels(&count);
    const uint32_t unknown = allowed & ~(uint32_t)(known | known >> 32);
    const uint32_t right = bn_right_isas(kernels, count, unknown);
    const uint64_t found = (uint64_t)(unknown & ~right) << 32 | right;
    const uint64_t before = atomic_fetch_or(&node->host->isas, found);

    for (int isa = 0; isa < BN_ISA_COUNT; isa++) {
        if ((found & ~before) >> 32 >> isa & 1) {
            warn(node, (bn_isa)isa);
        }
    }
    return before | found;
}

const char *bn_node_isas(const bn_node *node, uint32_t *isas)
{
    uint64_t known = atomic_load(&node->host->isas);
    const char *reason = bn_isas_allowed(isas);

    if (reason != NULL) {
        return reason;
    }
    if (*isas & ~(uint32_t)(known | known >> 32)) {
        known = check(node, *isas, known);
    }
    *isas &= (uint32_t)known;
    return NULL;
}
