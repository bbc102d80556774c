/* AMX: the CPU has it, the OS saves its registers, and this process may use them.
 *
 * Linux gives the tile registers (8 KiB per thread) only to processes that ask.  The permission is
 * for all threads, present and future, and lasts; asking again changes nothing.  Windows saves the
 * registers for everyone whose XCR0 says so. */
#include "cpu.h"
#include "cpu_x86.h"

#if defined(__x86_64__) || defined(_M_X64)

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

long syscall(long number, ...); /* strict C11 hides it */

static int is_permitted(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 }; /* asm/prctl.h of Linux 5.16 */
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#else
static int is_permitted(void)
{
    return 1;
}
#endif

int bn_cpu_has_amx(void)
{
    const uint64_t tiles = UINT64_C(3) << 17;            /* XCR0: configuration and data */
    const uint32_t tile_int8 = BN_BIT(24) | BN_BIT(25); /* leaf 7, edx */
    return (os_saves() & tiles) == tiles && has_all(cpuid(7, 0).d, tile_int8) && is_permitted();
}

#else

int bn_cpu_has_amx(void)
{
    return 0;
}

#endif
