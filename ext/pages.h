/* Memory for panels and tables, from huge pages where the OS has them. */
#ifndef BN_PAGES_H
#define BN_PAGES_H

#include <stddef.h>

typedef struct bn_region bn_region;

/* Memory of this size, 64-byte aligned, or NULL.  *regions is the list that it may be cut from, and *from
 * tells where it came from; both are for bn_pages_give.  Not safe for two threads on one list. */
void *bn_pages_take(bn_region **regions, size_t bytes, bn_region **from);

/* Of these only the first `kept` bytes are still needed. */
void bn_pages_cut(void *memory, size_t bytes, size_t kept, bn_region *from);

void bn_pages_give(bn_region **regions, void *memory, size_t bytes, bn_region *from);

#endif
