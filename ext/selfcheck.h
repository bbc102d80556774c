/* Whether the kernels of an instruction set give the results that they should on this machine.
 *
 * A CPU, a hypervisor or a compiler may get an instruction wrong; then a slower kernel is better than wrong
 * numbers.  A level that faults instead cannot be caught here: ONNX_BITNET_ISA leaves it out. */
#ifndef BN_SELFCHECK_H
#define BN_SELFCHECK_H

#include "dispatch.h"

/* Those of `isas` whose kernels for running ops (not for making weights) equal the scalar ones on a small
 * fixed case: all numbers of rows that a kernel may treat differently, groups that end anywhere, all codes.
 * Takes one or two ms.  The table is bn_kernels(), or a test's. */
uint32_t bn_right_isas(const bn_kernel *kernels, size_t count, uint32_t isas);

#endif
