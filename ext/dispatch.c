/* The table of kernels, made from kernels.inc. */
#include "dispatch.h"

#include <string.h>

#include "kernel.h"

static const bn_kernel kernels[] = {
#define BN_KERNEL(op, format, isa)                                                                  \
    {#op, #format, BN_ISA_##isa, (bn_any_fn *)bn_##op##_##format##_##isa},
#include "kernels.inc"
#undef BN_KERNEL
};

const bn_kernel *bn_kernels(size_t *count)
{
    *count = sizeof kernels / sizeof kernels[0];
    return kernels;
}

const bn_kernel *bn_find(const char *op, const char *format, uint32_t isas)
{
    const bn_kernel *best = NULL;

    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        const bn_kernel *row = &kernels[i];
        if ((isas >> row->isa & 1) && (!best || row->isa > best->isa) &&
            strcmp(row->op, op) == 0 && strcmp(row->format, format) == 0) {
            best = row;
        }
    }
    return best;
}
