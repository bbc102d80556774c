/* CPU detection on 64-bit ARM: feature bits as the OS reports them, and one quirk, the maker of the
 * core.  NEON is part of every such CPU. */
#include "cpu.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Bits of the Linux ABI, given here because older headers lack some. */
#define DOTPROD (1UL << 20) /* AT_HWCAP */
#define CPUID (1UL << 11)   /* AT_HWCAP: the kernel lets user programs read ID registers */
#define I8MM (1UL << 13)    /* AT_HWCAP2 */

/* smmla is issued at half the rate of sdot on Apple's cores, so it gains nothing there, and making
 * its operands costs.  All cores of such a machine have the same maker. */
static int is_made_by_apple(void)
{
    unsigned long midr;

    if (!(getauxval(AT_HWCAP) & CPUID)) {
        return 0;
    }
    __asm__("mrs %0, MIDR_EL1" : "=r"(midr));
    return (midr >> 24 & 0xFF) == 0x61;
}

int bn_cpu_has_dotprod(void)
{
    return (getauxval(AT_HWCAP) & DOTPROD) != 0;
}

int bn_cpu_has_i8mm(void)
{
    return bn_cpu_has_dotprod() && (getauxval(AT_HWCAP2) & I8MM) && !is_made_by_apple();
}

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

int bn_cpu_has_dotprod(void)
{
    int has = 0;
    size_t size = sizeof has;

    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
}

/* Apple's cores have it and do not gain by it: smmla is issued at half the rate of sdot. */
int bn_cpu_has_i8mm(void)
{
    return 0;
}

#else

/* Other systems: what the compiler was told that every CPU has. */
int bn_cpu_has_dotprod(void)
{
#if defined(__ARM_FEATURE_DOTPROD)
    return 1;
#else
    return 0;
#endif
}

int bn_cpu_has_i8mm(void)
{
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return bn_cpu_has_dotprod();
#else
    return 0;
#endif
}

#endif
