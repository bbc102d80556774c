/* The machine's limits as a C program can reach them; bench/machine.py compiles this with the flags of one
 * row of ext/isa.inc and calls it.
 *
 * bn_read     ors 64 bytes after 64 bytes of a buffer, `ahead` bytes of it prefetched: read bandwidth.
 * bn_dot_peak issues byte dot products on registers alone and returns how many multiplications and
 *             additions these are.  Ten chains of sums hide the latency.  AVX2 has no 4-way product: its
 *             count is that of maddubs with the 16-bit addition that every kernel needs, the widening to
 *             32 bits left out, so that no kernel can reach it.  AMX multiplies tiles of 16 x 64 and 64 x 16 into
 *             four tiles of sums, in the middle of a thread that has no tiles otherwise. */
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

typedef uint64_t wide __attribute__((vector_size(64)));

uint64_t bn_read(const unsigned char *data, size_t bytes, size_t ahead)
{
    wide sum[4] = {{0}};

    for (size_t at = 0; at + 256 <= bytes; at += 256) {
        for (size_t i = 0; i < 4; i++) {
            if (ahead != 0) {
                __builtin_prefetch(data + at + 64 * i + ahead);
            }
            sum[i] |= *(const wide *)(data + at + 64 * i);
        }
    }
    sum[0] |= sum[1] | sum[2] | sum[3];
    return sum[0][0] | sum[0][1] | sum[0][2] | sum[0][3] | sum[0][4] | sum[0][5] | sum[0][6] | sum[0][7];
}

/* VECTOR, ZERO, STEP(sum, a, b), and the products that a STEP adds. */
#if defined(__AVX512VNNI__)
#define VECTOR __m512i
#define ZERO _mm512_setzero_si512()
#define STEP(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#define PRODUCTS 64
#elif defined(__AVXVNNI__)
#define VECTOR __m256i
#define ZERO _mm256_setzero_si256()
#define STEP(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#define PRODUCTS 32
#elif defined(__AVX512BW__)
#define VECTOR __m512i
#define ZERO _mm512_setzero_si512()
#define STEP(sum, a, b) _mm512_add_epi16(sum, _mm512_maddubs_epi16(a, b))
#define PRODUCTS 64
#elif defined(__AVX2__)
#define VECTOR __m256i
#define ZERO _mm256_setzero_si256()
#define STEP(sum, a, b) _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b))
#define PRODUCTS 32
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#define VECTOR int32x4_t
#define ZERO vdupq_n_s32(0)
#define STEP(sum, a, b) vmmlaq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
#define PRODUCTS 32
#elif defined(__ARM_FEATURE_DOTPROD)
#define VECTOR int32x4_t
#define ZERO vdupq_n_s32(0)
#define STEP(sum, a, b) vdotq_s32(sum, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b))
#define PRODUCTS 16
#endif

#if defined(__AVX512F__)
#define KEEP(vector) __asm__ volatile("" : "+v"(vector))
#elif defined(__AVX2__)
#define KEEP(vector) __asm__ volatile("" : "+x"(vector))
#else
#define KEEP(vector) __asm__ volatile("" : "+w"(vector))
#endif

#if defined(__AMX_INT8__)
/* Eight tiles of 16 rows x 64 bytes, as ldtilecfg reads them. */
static const unsigned char tiles[64] = {1,  [16] = 64, [18] = 64, [20] = 64, [22] = 64, [24] = 64,
                                        [26] = 64, [28] = 64, [30] = 64, [48] = 16, 16, 16, 16,
                                        16, 16, 16, 16};

static double tile_peak(size_t rounds)
{
    _tile_loadconfig(tiles);
    for (size_t round = 0; round < rounds; round++) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 4 * 16 * 16 * 64 * (double)rounds;
}
#endif

double bn_dot_peak(size_t rounds)
{
#if defined(__AMX_INT8__)
    return tile_peak(rounds);
#elif defined(VECTOR)
    VECTOR a = ZERO, b = ZERO, s0 = ZERO, s1 = ZERO, s2 = ZERO, s3 = ZERO, s4 = ZERO;
    VECTOR s5 = ZERO, s6 = ZERO, s7 = ZERO, s8 = ZERO, s9 = ZERO;

    /* For all that the compiler knows, a and b change all the time and every sum is looked at. */
#define ADD(sum) \
    KEEP(a);     \
    KEEP(b);     \
    sum = STEP(sum, a, b); \
    KEEP(sum)

    for (size_t round = 0; round < rounds; round++) {
        ADD(s0);
        ADD(s1);
        ADD(s2);
        ADD(s3);
        ADD(s4);
        ADD(s5);
        ADD(s6);
        ADD(s7);
        ADD(s8);
        ADD(s9);
    }
    return 2.0 * 10 * PRODUCTS * (double)rounds;
#else
    (void)rounds;
    return 0.0;
#endif
}
