/* Canonical bytes to panels (layout.h). */
#ifndef BN_PANEL_H
#define BN_PANEL_H

#include "formats.h"
#include "layout.h"

/* weight is (n, row_bytes) canonical bytes of a format; panels gets bn_panel_bytes(n, groups, 2) bytes; code_sum,
 * where it is not NULL, gets (super-panels, groups, 64) sums of codes with their padding; outputs
 * past n have code 1 everywhere.  Returns NULL, or the reason why it failed: bytes that are not
 * canonical, or no memory. */
const char *bn_panel_build(bn_format format, const uint8_t *weight, size_t n,
                           const bn_groups *groups, uint8_t *panels, int32_t *code_sum);

/* Memory for panels: 64-byte aligned, in huge pages where it is large and the OS has them. */
void *bn_panel_alloc(size_t bytes);
void bn_panel_free(void *panels); /* NULL is allowed */

#endif
