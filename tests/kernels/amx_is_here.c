/* In place of ext/cpu_amx.c where AMX is emulated. */
#include "cpu.h"

int bn_cpu_has_amx(void)
{
    return 1;
}
