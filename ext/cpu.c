/* CPU detection by feature bits and by what the OS saves (XCR0); never by model numbers, which
 * hypervisors make up. */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#include "cpu_x86.h"

#if defined(__x86_64__) || defined(_M_X64)

static int bn_cpu_has_avx2(void)
{
    const uint32_t fma_avx_f16c = BN_BIT(12) | BN_BIT(28) | BN_BIT(29); /* leaf 1, ecx */
    const uint32_t avx2 = BN_BIT(5);                                   /* leaf 7, ebx */
    return (os_saves() & 0x6) == 0x6 /* xmm, ymm */
           && has_all(cpuid(1, 0).c, fma_avx_f16c) && has_all(cpuid(7, 0).b, avx2);
}

static int bn_cpu_has_avxvnni(void)
{
    /* Leaf 7 has this in its subleaf 1, which exists if subleaf 0 says so in eax. */
    return bn_cpu_has_avx2() && cpuid(7, 0).a >= 1 && has_all(cpuid(7, 1).a, BN_BIT(4));
}

static int bn_cpu_has_avx512(void)
{
    const uint32_t f_dq_bw_vl =
        BN_BIT(16) | BN_BIT(17) | BN_BIT(30) | BN_BIT(31); /* leaf 7, ebx */
    return bn_cpu_has_avx2() && (os_saves() & 0xE6) == 0xE6 /* and opmask, zmm */
           && has_all(cpuid(7, 0).b, f_dq_bw_vl);
}

static int bn_cpu_has_avx512vnni(void)
{
    return bn_cpu_has_avx512() && has_all(cpuid(7, 0).c, BN_BIT(11));
}

static int bn_cpu_has_avx512vbmi(void)
{
    return bn_cpu_has_avx512vnni() && has_all(cpuid(7, 0).c, BN_BIT(1));
}

#else

static int bn_cpu_has_avx2(void)
{
    return 0;
}

static int bn_cpu_has_avxvnni(void)
{
    return 0;
}

static int bn_cpu_has_avx512(void)
{
    return 0;
}

static int bn_cpu_has_avx512vnni(void)
{
    return 0;
}

static int bn_cpu_has_avx512vbmi(void)
{
    return 0;
}

#endif

const char *bn_isa_name(bn_isa isa)
{
    static const char *const names[] = {
#define BN_ISA(name, flags, machine, test) #name,
#include "isa.inc"
#undef BN_ISA
    };
    return names[isa];
}

int bn_isa_compiled(bn_isa isa)
{
    static const int compiled[] = {
#define BN_ISA(name, flags, machine, test) BN_HAVE_##name,
#include "isa.inc"
#undef BN_ISA
    };
    return compiled[isa];
}

uint32_t bn_isas_here(void)
{
    uint32_t isas = 0;
#define BN_ISA(name, flags, machine, test)                                                          \
    if ((test) && BN_HAVE_##name) {                                                                 \
        isas |= UINT32_C(1) << BN_ISA_##name;                                                       \
    }
#include "isa.inc"
#undef BN_ISA
    return isas;
}

/* The row called `name`, or BN_ISA_COUNT. */
static bn_isa find_isa(const char *name)
{
    int isa = 0;

    while (isa < BN_ISA_COUNT && strcmp(name, bn_isa_name((bn_isa)isa)) != 0) {
        isa++;
    }
    return (bn_isa)isa;
}

const char *bn_isas_up_to(const char *name, uint32_t *isas)
{
    const uint32_t here = bn_isas_here();
    const bn_isa isa = name ? find_isa(name) : BN_ISA_scalar;

    if (isa == BN_ISA_COUNT) {
        return "no instruction set has this name; `onnx-bitnet kernels` lists them";
    }
    if (!(here >> isa & 1)) {
        return "this instruction set is not in this build or does not run on this CPU";
    }
    *isas = name ? here & ((UINT32_C(2) << isa) - 1) : here;
    return NULL;
}

const char *bn_isas_allowed(uint32_t *isas)
{
    const char *name = getenv("ONNX_BITNET_ISA");

    if (!name || !*name) {
        return bn_isas_up_to(NULL, isas);
    }
    if (find_isa(name) == BN_ISA_COUNT) {
        return "ONNX_BITNET_ISA names no instruction set; `onnx-bitnet kernels` lists them";
    }
    if (bn_isas_up_to(name, isas)) {
        return "ONNX_BITNET_ISA names an instruction set that is not in this build or does not run "
               "on this CPU; `onnx-bitnet kernels` lists those that do";
    }
    return NULL;
}
