/* The table of kernels and the one question asked of it. */
#ifndef BN_DISPATCH_H
#define BN_DISPATCH_H

#include <stddef.h>
#include <stdint.h>

#include "cpu.h"

typedef void bn_any_fn(void); /* cast to the op's function type before the call */

typedef struct {
    const char *op, *format;
    bn_isa isa;
    bn_any_fn *fn;
} bn_kernel;

/* All kernels of this build, in the order of kernels.inc. */
const bn_kernel *bn_kernels(size_t *count);

/* The kernel of the strongest instruction set in the set `isas`, or NULL. */
const bn_kernel *bn_find(const char *op, const char *format, uint32_t isas);

#endif
