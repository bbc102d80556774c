/* Panels of i2s to those of t5 (layout.h). */
#ifndef BN_T5_PANELS_H
#define BN_T5_PANELS_H

#include "layout.h"

/* Panels of one plane become those of t5 where they are, and shorter, unless a code is 3: then they stay
 * as they are.  Returns the bytes that they now have, or 0 where they stay. */
size_t bn_squeeze_panels(uint8_t *panels, size_t n, const bn_groups *groups);

#endif
