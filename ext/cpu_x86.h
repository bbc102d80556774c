/* CPUID, and what the OS saves of a thread's registers (XCR0): the facts that tests of instruction
 * sets of x86-64 rest on. */
#ifndef BN_CPU_X86_H
#define BN_CPU_X86_H

#include <stdint.h>

#if defined(__x86_64__) || defined(_M_X64)

typedef struct {
    uint32_t a, b, c, d;
} registers;

#if defined(_MSC_VER)
#include <intrin.h>

static inline registers cpuid(uint32_t leaf, uint32_t subleaf)
{
    int r[4];
    __cpuidex(r, (int)leaf, (int)subleaf);
    return (registers){(uint32_t)r[0], (uint32_t)r[1], (uint32_t)r[2], (uint32_t)r[3]};
}

static inline uint64_t saved_state(void)
{
    return _xgetbv(0);
}
#else
#include <cpuid.h>

static inline registers cpuid(uint32_t leaf, uint32_t subleaf)
{
    registers r = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) {
        return (registers){0, 0, 0, 0};
    }
    return r;
}

static inline uint64_t saved_state(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}
#endif

#define BN_BIT(n) (UINT32_C(1) << (n))

static inline int has_all(uint32_t value, uint32_t bits)
{
    return (value & bits) == bits;
}

/* XCR0, or 0 when the OS has not enabled XSAVE (then xgetbv itself would fault). */
static inline uint64_t os_saves(void)
{
    return has_all(cpuid(1, 0).c, BN_BIT(27)) ? saved_state() : 0;
}

#endif

#endif
