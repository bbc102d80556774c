/* Bytes that are filled once and then only read, kept once however many layers hold the same.
 *
 * Sessions of one model, and nodes that share a weight, come to the same panels and tables.  Each makes
 * its own and hands it in; who comes second gets the first one's and its own is freed.  What bytes mean
 * plays no part: equal bytes are as good as each other, whatever layer, format or shape they belong to.
 * Safe to call from any threads. */
#ifndef BN_SHARE_H
#define BN_SHARE_H

#include <stddef.h>

typedef struct bn_shared bn_shared;

/* Memory to fill, 64-byte aligned, in huge pages where it is large and the OS has them; NULL when there
 * is none.  Until bn_share it belongs to the caller alone. */
bn_shared *bn_shared_new(size_t bytes);
void *bn_shared_bytes(const bn_shared *shared); /* NULL for NULL */

/* Before it is handed in: keeps the first bytes alone. */
void bn_shared_cut(bn_shared *filled, size_t bytes);

/* Hands in what is filled.  Returns the holder of the same bytes to use from now on, which has one more
 * user; its bytes may not be written. */
bn_shared *bn_share(bn_shared *filled);

/* One user fewer; the last one frees it.  Also ends what was never handed in.  NULL is allowed. */
void bn_shared_release(bn_shared *shared);

/* How many pieces there are, and their bytes: for tests. */
void bn_shared_totals(size_t *pieces, size_t *bytes);

#endif
