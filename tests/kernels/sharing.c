/* Many threads make, run and destroy layers that hold the same weights, or almost the same; to be built
 * with -fsanitize=thread by test_sharing.py.  Every result must be right whatever the others do, and at
 * the end nothing may be left.
 *
 * Weights of one size differ in a single byte that the hash of share.c does not look at, so that they are
 * told apart by comparing alone, and are large enough to lie in regions (pages.c). */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "matmul.h"
#include "share.h"

enum { THREADS = 6, ROUNDS = 60, WEIGHTS = 4, HELD = 3, N = 640, K = 1024, ROW = K / 4 };

static uint8_t *weights[WEIGHTS];
static float answers[WEIGHTS][N], x[K], scale = 0.5f;
static uint32_t isas;
static atomic_int wrong;

static unsigned next(unsigned *state)
{
    *state = *state * 1664525u + 1013904223u;
    return *state >> 16;
}

/* Runs each task on a thread of its own, as a session does while it loads. */
typedef struct {
    void (*task)(void *arg, size_t index);
    void *arg;
    size_t index;
} piece;

static void *run_piece(void *arg)
{
    piece *p = arg;
    p->task(p->arg, p->index);
    return NULL;
}

static void spawn(void *context, void (*task)(void *arg, size_t index), size_t count, void *arg)
{
    (void)context;
    for (size_t first = 0; first < count; first += 2) {
        piece pieces[2] = {{task, arg, first}, {task, arg, first + 1}};
        pthread_t thread;
        const int two = first + 1 < count && pthread_create(&thread, NULL, run_piece, &pieces[1]) == 0;
        run_piece(&pieces[0]);
        if (two) {
            pthread_join(thread, NULL);
        } else if (first + 1 < count) {
            run_piece(&pieces[1]);
        }
    }
}

static bn_matmul *make(unsigned which)
{
    bn_matmul *layer = NULL;
    const bn_matmul_desc desc = {
        .n = N,
        .k = K,
        .planes = 1,
        .format = BN_FORMAT_i2s,
        .weight = weights[which],
        .scale = &scale,
        .scale_rows = 1,
        .activation_bits = 16,
        .threads = {spawn, NULL},
    };
    const char *reason = bn_matmul_create(&desc, isas, &layer);
    if (reason) {
        fprintf(stderr, "%s\n", reason);
        exit(2);
    }
    return layer;
}

static void check(const bn_matmul *layer, unsigned which)
{
    float y[N];
    if (bn_matmul_run(layer, x, y, 1, BN_FLOAT32, (bn_threads){.run = NULL}) ||
        memcmp(y, answers[which], sizeof y) != 0) {
        atomic_fetch_add(&wrong, 1);
    }
}

static void *hammer(void *arg)
{
    unsigned state = *(unsigned *)arg, which[HELD];
    bn_matmul *held[HELD] = {NULL};

    for (int round = 0; round < ROUNDS; round++) {
        const unsigned slot = next(&state) % HELD;
        if (held[slot]) {
            check(held[slot], which[slot]);
            bn_matmul_destroy(held[slot]);
        }
        which[slot] = next(&state) % WEIGHTS;
        held[slot] = make(which[slot]);
        check(held[slot], which[slot]);
    }
    for (int slot = 0; slot < HELD; slot++) {
        bn_matmul_destroy(held[slot]);
    }
    return NULL;
}

int main(void)
{
    pthread_t threads[THREADS];
    unsigned seeds[THREADS], state = 1;
    size_t pieces, bytes;
    const char *reason = bn_isas_allowed(&isas);

    if (reason) {
        fprintf(stderr, "%s\n", reason);
        return 2;
    }
    for (int i = 0; i < K; i++) {
        x[i] = (float)(next(&state) % 1000) - 500.0f;
    }
    for (unsigned w = 0; w < WEIGHTS; w++) {
        weights[w] = malloc(N * ROW);
        unsigned same = 7;
        for (size_t i = 0; i < N * ROW; i++) {
            weights[w][i] = (uint8_t)next(&same);
        }
        weights[w][ROW + 8] = (uint8_t)(w * 0x55); /* step 2 of output 1: bytes 512 to 767 of the panel */
        bn_matmul *layer = make(w);
        reason = bn_matmul_run(layer, x, answers[w], 1, BN_FLOAT32, (bn_threads){.run = NULL});
        bn_matmul_destroy(layer);
    }
    for (unsigned t = 0; t < THREADS; t++) {
        seeds[t] = t;
        pthread_create(&threads[t], NULL, hammer, &seeds[t]);
    }
    for (unsigned t = 0; t < THREADS; t++) {
        pthread_join(threads[t], NULL);
    }
    bn_matmul *twice[2] = {make(0), make(0)}, *other = make(1);
    bn_shared_totals(&pieces, &bytes);
    printf("%zu pieces for three layers of two weights\n", pieces);
    bn_matmul_destroy(twice[0]);
    bn_matmul_destroy(twice[1]);
    bn_matmul_destroy(other);
    for (unsigned w = 0; w < WEIGHTS; w++) {
        free(weights[w]);
    }
    const int different = memcmp(answers[0], answers[1], sizeof answers[0]) != 0;
    bn_shared_totals(&pieces, &bytes);
    printf("%d wrong, %zu pieces left, answers %s\n", atomic_load(&wrong), pieces,
           different ? "differ" : "are all the same");
    return atomic_load(&wrong) || pieces || bytes || !different || reason ? 1 : 0;
}
