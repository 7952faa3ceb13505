/* What the machine can do at most, to judge the kernels by: multiply-adds on registers, bf16 dot products on registers
 * or tiles, and a stream through memory.
 *
 * A loop on registers needs independent chains of sums, latency times throughput of them or more: 8 on the x86 of
 * today, 16 on the widest ARM.  Twelve chains and two operands fit into 16 registers, 24 into 32.  KEEP makes an
 * operand opaque before each use, else products of what does not change would leave the loop, or be shared between
 * chains; it is no instruction. */
#include "kernels.h"
#include "vec.h"
/* and, with AMX, what gemm.h has of amx.h: kernels.c includes it first */

#if defined(__x86_64__)
#define KEEP(v) __asm__ volatile("" : "+v"(v))
#elif defined(__aarch64__)
#define KEEP(v) __asm__ volatile("" : "+w"(v))
#else
#define KEEP(v) __asm__ volatile("" : "+f"(v)) /* only the scalar table is built there */
#endif

#if defined(LLMC_ISA_SCALAR) || defined(LLMC_ISA_AVX2)
#define LLMC_CHAINS 12
#else
#define LLMC_CHAINS 24
#endif
enum { CHAINS = LLMC_CHAINS };

/* One loop of `rounds` times CHAINS operations; the value keeps the compiler from dropping it. */
#define REGISTER_LOOP(OPERATION)                                                                                       \
    vec acc[CHAINS], a = v_set(0.999f), b = v_set(1e-3f);                                                              \
    for (int i = 0; i < CHAINS; i++) acc[i] = v_set(0.0f);                                                             \
    for (ptrdiff_t k = 0; k < rounds; k++) {                                                                           \
        _Pragma("GCC unroll 24") for (int i = 0; i < CHAINS; i++) {                                                    \
            KEEP(a);                                                                                                   \
            acc[i] = OPERATION;                                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    for (int i = 1; i < CHAINS; i++) acc[0] = v_add(acc[0], acc[i]);                                                   \
    *value = v_sum(acc[0])

/* Returns the FLOPs done: two per lane and multiply-add. */
static double fma_loop(ptrdiff_t rounds, float *value) {
    REGISTER_LOOP(v_fma(a, b, acc[i]));
    return 2.0 * VL * CHAINS * (double)rounds;
}

/* The same of bf16: two products and two sums per lane.  A table without the instruction multiplies in fp32. */
#ifdef HAVE_AMX
/* A product of tiles begins every 16 cycles and takes 52 (Intel's optimization manual): six sums, 0 to 2 and 5 to 7,
 * of the same operands, 3 and 4.  The instructions have effects of their own to a compiler, which drops none. */
static double dot_loop(ptrdiff_t rounds, float *value) {
    enum { SIDE = 16, TILES = 6 };
    uint32_t a[SIDE][SIDE], b[SIDE][SIDE];
    float sums[SIDE][SIDE];
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) a[i][j] = 0x3F803F80u, b[i][j] = 0x3A803A80u; /* pairs of 1 and of 2^-10 */
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory"); /* they are read below, which GCC's header does not tell it */
    amx_begin();
    TILE_LOAD(3, a, sizeof a[0]);
    TILE_LOAD(4, b, sizeof b[0]);
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(5);
    TILE_ZERO(6);
    TILE_ZERO(7);
    for (ptrdiff_t k = 0; k < rounds; k++) {
        TILE_DOT(0, 3, 4);
        TILE_DOT(1, 3, 4);
        TILE_DOT(2, 3, 4);
        TILE_DOT(5, 3, 4);
        TILE_DOT(6, 3, 4);
        TILE_DOT(7, 3, 4);
    }
    TILE_STORE(7, sums, sizeof sums[0]);
    amx_end();
    *value = sums[SIDE - 1][SIDE - 1];
    return 2.0 * SIDE * SIDE * (2 * SIDE) * TILES * (double)rounds;
}
#else
static double dot_loop(ptrdiff_t rounds, float *value) {
#ifdef HAVE_DOT
    REGISTER_LOOP(v_dot(acc[i], a, b));
    return 4.0 * VL * CHAINS * (double)rounds;
#else
    return fma_loop(rounds, value);
#endif
}
#endif

/* n floats of each array in p: the first `reads` are read, the next `writes` written, the last `updates` both.  Four
 * vectors of an array at a time; n is a multiple of that. */
enum { STREAM_STEP = 4 * VL };

ALWAYS_INLINE float stream_body(float *const *p, const int reads, const int writes, const int updates, ptrdiff_t n) {
    vec sum[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
    for (ptrdiff_t i = 0; i < n; i += STREAM_STEP) {
#pragma GCC unroll 4
        for (int r = 0; r < reads; r++)
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) sum[q] = v_add(sum[q], v_load(p[r] + i + q * VL));
#pragma GCC unroll 4
        for (int w = reads; w < reads + writes; w++)
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) v_store(p[w] + i + q * VL, sum[q]);
#pragma GCC unroll 4
        for (int u = reads + writes; u < reads + writes + updates; u++)
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) v_store(p[u] + i + q * VL, v_add(v_load(p[u] + i + q * VL), sum[q]));
    }
    return v_sum(v_add(v_add(sum[0], sum[1]), v_add(sum[2], sum[3])));
}

/* The traffic of the ops there are has a loop of its own, whose counts the compiler knows: in the first two levels of
 * cache, loops over arrays would cost more than the memory. */
static float stream_span(float *const *p, int reads, int writes, int updates, ptrdiff_t n) {
#define OF(r, w, u)                                                                                                    \
    if (reads == r && writes == w && updates == u) return stream_body(p, r, w, u, n)
    OF(0, 1, 0);
    OF(1, 0, 0);
    OF(1, 1, 0);
    OF(1, 2, 0);
    OF(2, 1, 0);
    OF(1, 0, 1);
    OF(2, 0, 1);
    OF(1, 0, 3);
#undef OF
    return stream_body(p, reads, writes, updates, n);
}
