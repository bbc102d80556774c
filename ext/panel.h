/* Canonical bytes, or panels from a file, to panels (layout.h). */
#ifndef BN_PANEL_H
#define BN_PANEL_H

#include "formats.h"
#include "layout.h"
#include "parallel.h"

typedef struct {
    bn_format format;
    bool is_panels;        /* the weight is panels already */
    const uint8_t *weight; /* (n, row_bytes) canonical bytes of the format, or (super-panels, 16 * padded)
                              panels of 64 outputs each, the last one too */
    size_t n;
    bn_groups groups;
    uint32_t isas;      /* instruction sets that may be used, scalar among them */
    bn_threads threads; /* that share the work */
} bn_panel_source;

/* One plane: panels gets bn_panel_bytes(n, groups, 2) bytes, unless it is NULL because those of the source
 * serve as they are; code_sum, where it is not NULL, gets (super-panels, groups, 64) sums of codes with
 * their padding, and 0 where there is no panel; outputs past n have code 1 everywhere.  Returns NULL, or
 * the reason why it failed: bytes that are not canonical, or no memory. */
const char *bn_panel_build(const bn_panel_source *source, uint8_t *panels, int32_t *code_sum);

/* The reverse for a source that is panels: rows gets (n, row_bytes) of i2s.  Returns as bn_panel_build. */
const char *bn_panel_rows(const bn_panel_source *source, uint8_t *rows);

/* Whether the panels of a source can serve as they are: all are of full width, and they are aligned. */
bool bn_panel_serves(const bn_panel_source *source);

#endif
