/* How the core shares out work: it starts no threads, whoever calls it brings them. */
#ifndef BN_PARALLEL_H
#define BN_PARALLEL_H

#include <stddef.h>

/* Runs task(arg, 0) .. task(arg, count - 1), each exactly once, in any order and on any threads. */
typedef void bn_parallel_for(void *context, void (*task)(void *arg, size_t index), size_t count,
                             void *arg);

typedef struct {
    bn_parallel_for *run; /* NULL: everything runs on the calling thread */
    void *context;
    size_t count; /* at most so many run at once; 0 where that is not known */
} bn_threads;

static inline void bn_run_tasks(bn_threads threads, void (*task)(void *arg, size_t index),
                                size_t count, void *arg)
{
    if (threads.run && count > 1) {
        threads.run(threads.context, task, count, arg);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        task(arg, i);
    }
}

#endif
