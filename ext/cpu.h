/* Which instruction sets this build has and this machine can run. */
#ifndef BN_CPU_H
#define BN_CPU_H

#include <stdint.h>

/* BN_HAVE_<name> is 1 when the build compiled that row of isa.inc, else 0; setup.py sets all of
 * them. */
typedef enum {
#define BN_ISA(name, flags, machine, test) BN_ISA_##name,
#include "isa.inc"
#undef BN_ISA
    BN_ISA_COUNT
} bn_isa;

/* The tests of isa.inc that are not in cpu.c; 0 on machines of another kind. */
int bn_cpu_has_amx(void); /* asks the OS for the tile registers */
int bn_cpu_has_dotprod(void);
int bn_cpu_has_i8mm(void);

const char *bn_isa_name(bn_isa isa);
int bn_isa_compiled(bn_isa isa);

/* The set (bit 1 << bn_isa) of compiled instruction sets that this CPU and its OS can run. */
uint32_t bn_isas_here(void);

/* The rows of isa.inc up to and including `name` that run here; all that run here for NULL.
 * Returns NULL, or the reason why there is no such set. */
const char *bn_isas_up_to(const char *name, uint32_t *isas);

/* bn_isas_up_to with the name in the environment variable ONNX_BITNET_ISA, where it is set. */
const char *bn_isas_allowed(uint32_t *isas);

#endif
