/* Threads and pages while a model loads, see load.h.
 *
 * Threads  Sessions make their nodes one after the other, without the threads they will run with.  A
 *          panel of a few MB takes a millisecond and a thread some 20 us to start, so each panel gets its
 *          own: there is no pool to keep, to share between sessions or to end.
 * Pages    ONNX Runtime maps external data, privately and writable, and never gives it up.  Its pages
 *          count as memory of the process although nobody reads them once there are panels.
 *          MADV_DONTNEED takes them away but would also discard what was written to private memory.
 *          /proc/self/pagemap tells which pages are a file's own: if any page that is there is not, or
 *          one was swapped out (a file's own never is), or there is no pagemap, nothing is done. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity, madvise */
#endif
#include "load.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#if defined(__linux__)
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <unistd.h>
#endif

/* ---- Threads ---- */

#if !defined(_WIN32)

enum { MOST_THREADS = 8 };

typedef struct {
    void (*task)(void *arg, size_t index);
    void *arg;
    size_t count;
    atomic_size_t next;
} work;

static void *take_tasks(void *arg)
{
    work *w = arg;
    for (size_t i = atomic_fetch_add(&w->next, 1); i < w->count; i = atomic_fetch_add(&w->next, 1)) {
        w->task(w->arg, i);
    }
    return NULL;
}

static size_t cpus(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return (size_t)CPU_COUNT(&set);
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (size_t)online : 1;
}

static void run(void *context, void (*task)(void *arg, size_t index), size_t count, void *arg)
{
    work w = {task, arg, count, 0};
    pthread_t threads[MOST_THREADS];
    size_t wanted = cpus(), started = 0;

    (void)context;
    wanted = wanted < count ? wanted : count;
    wanted = wanted < MOST_THREADS ? wanted : MOST_THREADS;
    while (started + 1 < wanted && pthread_create(&threads[started], NULL, take_tasks, &w) == 0) {
        started++;
    }
    take_tasks(&w); /* all of them, should no thread have started */
    while (started > 0) {
        pthread_join(threads[--started], NULL);
    }
}

bn_threads bn_load_threads(void)
{
    return (bn_threads){.run = run, .count = cpus()};
}

#else

bn_threads bn_load_threads(void)
{
    return (bn_threads){.run = NULL};
}

#endif

/* ---- Pages ---- */

#if defined(__linux__)

#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_SWAPPED (UINT64_C(1) << 62)
#define PAGEMAP_OF_FILE (UINT64_C(1) << 61) /* or shared: no private copy either */

enum { ENTRIES = 1024 };

static bool are_of_file(int pagemap, size_t first, size_t count)
{
    uint64_t entries[ENTRIES];

    for (size_t done = 0; done < count;) {
        const size_t left = count - done, part = left < ENTRIES ? left : ENTRIES;
        const size_t bytes = part * sizeof *entries;
        const off_t at = (off_t)((first + done) * sizeof *entries);
        if (pread(pagemap, entries, bytes, at) != (ssize_t)bytes) {
            return false;
        }
        for (size_t i = 0; i < part; i++) {
            if ((entries[i] & PAGEMAP_SWAPPED) ||
                (entries[i] & (PAGEMAP_PRESENT | PAGEMAP_OF_FILE)) == PAGEMAP_PRESENT) {
                return false;
            }
        }
        done += part;
    }
    return true;
}

void bn_drop_file_pages(const void *data, size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t first = ((uintptr_t)data + page - 1) / page, last = ((uintptr_t)data + bytes) / page;

    if (first >= last) {
        return;
    }
    const int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (pagemap < 0) {
        return;
    }
    if (are_of_file(pagemap, first, last - first)) {
        (void)madvise((void *)(first * page), (last - first) * page, MADV_DONTNEED);
    }
    (void)close(pagemap);
}

#else

void bn_drop_file_pages(const void *data, size_t bytes)
{
    (void)data, (void)bytes;
}

#endif
