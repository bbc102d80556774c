/* The table of shared bytes, see share.h: the one piece of state that all layers of a process share.
 *
 * Method  Chains by a hash that looks at a 64-byte line of every kilobyte, which finds candidates at
 *         next to no cost; whether one is the same is decided by comparing all bytes, so no collision
 *         can do harm.  One lock guards all, and memory comes and goes under it (pages.h). */
#include "share.h"

#include <stdlib.h>
#include <string.h>

#include "layout.h"
#include "lock.h"
#include "pages.h"

enum { CHAINS = 1024, SAMPLE_EVERY = 1024 };

struct bn_shared {
    void *bytes;
    size_t size, users; /* users: 0 until it is handed in */
    uint64_t hash;
    bn_region *region; /* where the bytes are from */
    bn_shared *next;
};

static struct {
    bn_lock lock;
    bn_shared *chains[CHAINS];
    bn_region *regions;
    size_t pieces, bytes; /* all there are */
} table = {.lock = BN_LOCK_INIT};

static uint64_t mix(uint64_t hash, uint64_t word)
{
    hash = (hash ^ word) * UINT64_C(0x9E3779B97F4A7C15);
    return hash ^ hash >> 29;
}

static uint64_t hash_of(const uint8_t *bytes, size_t size)
{
    uint64_t hash = mix(0, size), word;

    for (size_t line = 0; line + BN_VECTOR <= size; line += SAMPLE_EVERY) {
        for (size_t i = 0; i < BN_VECTOR; i += sizeof word) {
            memcpy(&word, bytes + line + i, sizeof word);
            hash = mix(hash, word);
        }
    }
    return hash;
}

bn_shared *bn_shared_new(size_t bytes)
{
    bn_shared *shared = calloc(1, sizeof *shared);

    if (!shared) {
        return NULL;
    }
    shared->size = bytes;
    bn_lock_take(&table.lock);
    shared->bytes = bn_pages_take(&table.regions, bytes, &shared->region);
    if (shared->bytes) {
        table.pieces++;
        table.bytes += bytes;
    } else {
        free(shared);
        shared = NULL;
    }
    bn_lock_give(&table.lock);
    return shared;
}

void *bn_shared_bytes(const bn_shared *shared)
{
    return shared ? shared->bytes : NULL;
}

/* With the lock held. */
static void discard(bn_shared *shared)
{
    bn_pages_give(&table.regions, shared->bytes, shared->size, shared->region);
    table.pieces--;
    table.bytes -= shared->size;
    free(shared);
}

bn_shared *bn_share(bn_shared *filled)
{
    filled->hash = hash_of(filled->bytes, filled->size);
    bn_shared **chain = &table.chains[filled->hash % CHAINS];

    bn_lock_take(&table.lock);
    bn_shared *found = *chain;
    while (found && (found->hash != filled->hash || found->size != filled->size ||
                     memcmp(found->bytes, filled->bytes, filled->size) != 0)) {
        found = found->next;
    }
    if (found) {
        discard(filled);
    } else {
        found = filled;
        found->next = *chain;
        *chain = found;
    }
    found->users++;
    bn_lock_give(&table.lock);
    return found;
}

void bn_shared_cut(bn_shared *filled, size_t bytes)
{
    bn_lock_take(&table.lock);
    bn_pages_cut(filled->bytes, filled->size, bytes, filled->region);
    table.bytes -= filled->size - bytes;
    filled->size = bytes;
    bn_lock_give(&table.lock);
}

void bn_shared_release(bn_shared *shared)
{
    if (!shared) {
        return;
    }
    bn_lock_take(&table.lock);
    if (shared->users <= 1) {
        bn_shared **at = &table.chains[shared->hash % CHAINS];
        while (*at && *at != shared) {
            at = &(*at)->next;
        }
        if (*at) {
            *at = shared->next;
        }
        discard(shared);
    } else {
        shared->users--;
    }
    bn_lock_give(&table.lock);
}

void bn_shared_totals(size_t *pieces, size_t *bytes)
{
    bn_lock_take(&table.lock);
    *pieces = table.pieces;
    *bytes = table.bytes;
    bn_lock_give(&table.lock);
}
