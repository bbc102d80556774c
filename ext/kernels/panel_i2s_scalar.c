/* panel, scalar: word by word. */
#include "kernel.h"

void bn_panel_i2s_scalar(const bn_panel_args *a)
{
    uint8_t *to = a->panel;

    for (size_t step = 0; step < a->steps; step++) {
        for (size_t output = 0; output < a->panels * BN_PANEL; output++, to += 4) {
            const uint8_t *from = a->rows + output * a->row_stride + 4 * step;
            const uint32_t w = bn_transpose_fields(bn_load_word(from));
            bn_store_word(to, w);
        }
    }
}
