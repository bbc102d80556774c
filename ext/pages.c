/* Memory for panels, see pages.h.
 *
 * Reason  Streaming weights from pages of 4 KB is a third slower than from pages of 2 MB, which Linux
 *         gives to aligned ranges that ask for them.  A panel of its own pages would fill its last one
 *         only in part, and that is a third of a panel of 4.4 MB.
 * Method  Regions of 64 MB, or of a larger piece alone, in which pieces lie one after the other in the
 *         order in which they are taken, which is that of the nodes of a model.  What lies past the last
 *         piece was never touched and takes no memory.  A piece gives its pages back to the OS, and its
 *         place, if it was the last, to the next one.  A region ends with its last piece.  Small pieces
 *         are malloc's, where sanitizers watch over their ends. */
#if defined(__linux__) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* madvise */
#endif
#include "pages.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#elif defined(_MSC_VER)
#include <malloc.h>
#endif

#include "layout.h"

#if defined(__linux__)

#define HUGE_PAGE ((size_t)2 << 20)
#define REGION ((size_t)64 << 20)
#define SMALL ((size_t)128 << 10)

struct bn_region {
    char *memory;
    size_t size, used, pieces;
    bn_region *next;
};

/* `size`, a multiple of huge pages, that begins with one. */
static char *map(size_t size)
{
    char *memory = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    const size_t before = bn_round_up((uintptr_t)memory, HUGE_PAGE) - (uintptr_t)memory;
    if (before > 0) {
        (void)munmap(memory, before);
    }
    if (before < HUGE_PAGE) {
        (void)munmap(memory + before + size, HUGE_PAGE - before);
    }
    (void)madvise(memory + before, size, MADV_HUGEPAGE);
    return memory + before;
}

static bn_region *grow(bn_region **regions, size_t bytes)
{
    bn_region *region = calloc(1, sizeof *region);
    if (!region) {
        return NULL;
    }
    region->size = bytes > REGION ? bn_round_up(bytes, HUGE_PAGE) : REGION;
    region->memory = map(region->size);
    if (!region->memory) {
        free(region);
        return NULL;
    }
    region->next = *regions;
    *regions = region;
    return region;
}

static void end(bn_region **regions, bn_region *region)
{
    while (*regions != region) {
        regions = &(*regions)->next;
    }
    *regions = region->next;
    (void)munmap(region->memory, region->size);
    free(region);
}

void *bn_pages_take(bn_region **regions, size_t bytes, bn_region **from)
{
    const size_t size = bn_round_up(bytes, BN_VECTOR);
    bn_region *region = *regions;

    *from = NULL;
    if (size < SMALL) {
        return aligned_alloc(BN_VECTOR, size);
    }
    while (region && region->size - region->used < size) {
        region = region->next;
    }
    if (!region) {
        region = grow(regions, size);
    }
    if (!region) {
        return NULL;
    }
    void *memory = region->memory + region->used;
    region->used += size;
    region->pieces++;
    *from = region;
    return memory;
}

void bn_pages_give(bn_region **regions, void *memory, size_t bytes, bn_region *from)
{
    const size_t size = bn_round_up(bytes, BN_VECTOR);

    if (!from) {
        free(memory);
        return;
    }
    const size_t at = (size_t)((char *)memory - from->memory);
    const size_t first = bn_round_up(at, HUGE_PAGE), last = (at + size) / HUGE_PAGE * HUGE_PAGE;
    if (--from->pieces == 0) {
        end(regions, from);
        return;
    }
    if (first < last) { /* whole huge pages, for one that is cut stays cut */
        (void)madvise(from->memory + first, last - first, MADV_DONTNEED);
    }
    if (at + size == from->used) {
        from->used = at;
    }
}

void bn_pages_cut(void *memory, size_t bytes, size_t kept, bn_region *from)
{
    const size_t end = from ? (size_t)((char *)memory - from->memory) + bn_round_up(bytes, BN_VECTOR) : 0;

    if (from && end == from->used) { /* the next piece begins there */
        from->used = end - bn_round_up(bytes, BN_VECTOR) + bn_round_up(kept, BN_VECTOR);
    }
}

#else

void *bn_pages_take(bn_region **regions, size_t bytes, bn_region **from)
{
    const size_t size = bn_round_up(bytes, BN_VECTOR);
    (void)regions;
    *from = NULL;
#if defined(_MSC_VER)
    return _aligned_malloc(size, BN_VECTOR);
#else
    return aligned_alloc(BN_VECTOR, size);
#endif
}

void bn_pages_cut(void *memory, size_t bytes, size_t kept, bn_region *from)
{
    (void)memory, (void)bytes, (void)kept, (void)from;
}

void bn_pages_give(bn_region **regions, void *memory, size_t bytes, bn_region *from)
{
    (void)regions, (void)bytes, (void)from;
#if defined(_MSC_VER)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

#endif
