/* Panels of i2s to those of t5 (layout.h). */
#ifndef BN_T5_PANELS_H
#define BN_T5_PANELS_H

#include "layout.h"

/* Panels of one plane with codes 0 to 2 become those of t5 where they are, and shorter.  Returns the bytes
 * that they have now. */
size_t bn_squeeze_panels(uint8_t *panels, size_t n, const bn_groups *groups);

#endif
