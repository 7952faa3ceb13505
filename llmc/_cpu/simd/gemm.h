/* Matrix product on one thread: C (+)= A B (+ bias), any strides, any sizes, in fp32 or with operands rounded to bf16.
 *
 *     C (M x N)   row i at c + i ldc
 *     A (M x K)   element (i, k) at a + i a_rs + k a_cs, one of the two strides being 1
 *     B (K x N)   element (k, j) at b + k b_rs + j b_cs, likewise
 *
 * The plan is Goto & van de Geijn's (2008).
 *
 *                 NR                     panel of B (KC x NR)   packed just before its first use
 *            +----------+                block of A (MC x KC)   stays in L2 while the panels pass
 *         MR |   tile   |                row panel (MR x KC)    in L1 for the length of a tile
 *            +----------+
 *
 * A tile of MR x NR accumulators stays in registers while k runs over KC; per k it loads NV vectors of B and broadcasts
 * MR numbers of A.  Where A's rows are contiguous a broadcast reads them where they lie; a transposed A (the weight
 * gradient) is packed, MR columns side by side.
 *
 * Packing a panel of B costs one read of memory, and most of that is waiting: so while the tiles of one panel are
 * computed, the source of the next one is prefetched into L2, a few lines per tile.
 *
 * bf16.  A word of a packed panel is 32 bits: one float or, where the machine multiplies pairs (HAVE_DOT), the bf16
 * numbers of k and k + 1.  Elsewhere words are floats rounded to bf16, whose products are exact in fp32: the same
 * mathematics, the same tile.  Both are rounded while they are packed, so memory holds fp32 alone.
 *
 * Edges: a tile of m x v vectors exists for every m <= MR and v <= NV, so the last rows cost only what they compute;
 * the last vector of a row is stored under a mask.  B's panels are padded with zeros to whole vectors. */
#include "kernels.h"
#include "vec.h"

#include <string.h>

/* KC counts words.  A block of A that is used in place is kept to IN_PLACE words: rows a power of two apart crowd into
 * a part of the cache's sets.  Other blocks of fp32 are half of what bf16 has: there the rows that are packed pass
 * through the same cache as well. */
enum { NR = NV * VL, KC = 512, MC = 256, MC_FP32 = 128, NC = 1536, IN_PLACE = 96 * 1024 };

/* Floats of scratch that gemm() needs: a block of A, a row of panels of B. */
enum { GEMM_SCRATCH = KC * (MC + NC) };

/* What a word is: a float as it is, a float rounded to bf16, two bf16 numbers. */
typedef enum Mode { FP32, ROUNDED, PAIRS } Mode;

/* ---- the tile --------------------------------------------------------------------------------------- */

ALWAYS_INLINE vec multiply_add(const int pairs, vec a, vec b, vec acc) {
#ifdef HAVE_DOT
    if (pairs) return v_dot(acc, a, b);
#endif
    (void)pairs;
    return v_fma(a, b, acc);
}

/* m x (nv VL), the last vector `tail` lanes wide.  m, nv, a_k and pairs are compile-time constants. */
ALWAYS_INLINE void tile_body(const int m, const int nv, const ptrdiff_t a_k, const int pairs, const float *restrict a,
                             ptrdiff_t a_i, const float *restrict b, ptrdiff_t kc, float *restrict c, ptrdiff_t ldc,
                             ptrdiff_t tail, int add, const float *restrict bias) {
    vec acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) {
            __builtin_prefetch(c + i * ldc + j * VL, 1);
            acc[i][j] = v_set(0.0f);
        }

    for (ptrdiff_t k = 0; k < kc; k++) {
        vec bv[NV];
#pragma GCC unroll 4
        for (int j = 0; j < nv; j++) bv[j] = v_load(b + k * NR + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec av = v_set(a[i * a_i + k * a_k]);
#pragma GCC unroll 4
            for (int j = 0; j < nv; j++) acc[i][j] = multiply_add(pairs, av, bv[j], acc[i][j]);
        }
    }

#pragma GCC unroll 4
    for (int j = 0; j < nv; j++) {
        ptrdiff_t lanes = j == nv - 1 ? tail : VL;
        vec bj = bias ? load_upto(bias + j * VL, lanes) : v_set(0.0f);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            float *p = c + i * ldc + j * VL;
            vec sum = acc[i][j];
            if (add)
                sum = v_add(load_upto(p, lanes), sum);
            else if (bias)
                sum = v_add(bj, sum);
            store_upto(p, sum, lanes);
        }
    }
}

/* The same for any m <= MR and nv <= NV: one branch per tile picks the constants. */
ALWAYS_INLINE void tile_any(int m, int nv, const ptrdiff_t a_k, const int pairs, const float *a, ptrdiff_t a_i,
                            const float *b, ptrdiff_t kc, float *c, ptrdiff_t ldc, ptrdiff_t tail, int add,
                            const float *bias) {
#define TILE(M, V)                                                                                                     \
    case (M) * 4 + (V):                                                                                                \
        tile_body(M, V, a_k, pairs, a, a_i, b, kc, c, ldc, tail, add, bias);                                           \
        break;
#define TILES(M) TILE(M, 1) TILE(M, 2) TILE(M, 3)
    switch (m * 4 + nv) {
        TILES(1)
        TILES(2)
        TILES(3)
        TILES(4)
#if LLMC_MR > 4
        TILES(5)
        TILES(6)
        TILES(7)
        TILES(8)
#endif
    }
#undef TILES
#undef TILE
}

#ifdef HAVE_AMX
#include "amx.h"
#endif

typedef void Tile(int m, int nv, const float *a, ptrdiff_t a_i, const float *b, ptrdiff_t kc, float *c, ptrdiff_t ldc,
                  ptrdiff_t tail, int add, const float *bias);

#define TILE_FUNCTION(NAME, A_K, PAIRS)                                                                                \
    __attribute__((noinline)) static void NAME(int m, int nv, const float *a, ptrdiff_t a_i, const float *b,           \
                                               ptrdiff_t kc, float *c, ptrdiff_t ldc, ptrdiff_t tail, int add,         \
                                               const float *bias) {                                                    \
        tile_any(m, nv, A_K, PAIRS, a, a_i, b, kc, c, ldc, tail, add, bias);                                           \
    }
TILE_FUNCTION(tile_rows, 1, 0)     /* A's k are consecutive */
TILE_FUNCTION(tile_columns, MR, 0) /* A's rows are consecutive: packed */
#ifdef HAVE_AMX
enum { MR_PAIRS = AMX_ROWS, DEPTH_PAIRS = AMX_DEPTH };
#elif defined(HAVE_DOT)
enum { MR_PAIRS = MR, DEPTH_PAIRS = 1 };
TILE_FUNCTION(tile_rows_pairs, 1, 1)
TILE_FUNCTION(tile_columns_pairs, MR, 1)
#else
enum { MR_PAIRS = MR, DEPTH_PAIRS = 1 };
#endif

/* ---- packing ---------------------------------------------------------------------------------------- */

/* Words from one or two rows of floats: word j of row k is x[j] or, in pairs, (x[j], next[j]). */
ALWAYS_INLINE vec words(const Mode mode, const float *x, const float *next, ptrdiff_t n) {
    vec v = load_upto(x, n);
#ifdef HAVE_DOT
    if (mode == PAIRS) return v_pairs(v, next ? load_upto(next, n) : v_set(0.0f));
#endif
    (void)next;
    return mode == ROUNDED ? v_round_bf16(v) : v;
}

/* Words from one row whose k are consecutive: n floats, in pairs (x[2i], x[2i+1]). */
ALWAYS_INLINE vec words_along(const Mode mode, const float *x, ptrdiff_t n) {
#ifdef HAVE_DOT
    if (mode == PAIRS) return v_pairs_along(load_upto(x, n), n > VL ? load_upto(x + VL, n - VL) : v_set(0.0f));
#endif
    return mode == ROUNDED ? v_round_bf16(load_upto(x, n)) : load_upto(x, n);
}

/* Rows of k, contiguous: n columns of kc words become panels of W words per k, `panel` floats apart. */
ALWAYS_INLINE void pack_across(const Mode mode, const int W, float *restrict out, ptrdiff_t panel, const float *x,
                               ptrdiff_t ld, ptrdiff_t K, ptrdiff_t n) {
    const int step = mode == PAIRS ? 2 : 1;
    for (ptrdiff_t k = 0; k < K; k += step, out += W) {
        const float *row = x + k * ld, *next = step == 2 && k + 1 < K ? row + ld : NULL;
        float *to = out;
        if (W >= VL) {
            for (ptrdiff_t j = 0; j < n; j += W, to += panel)
                for (ptrdiff_t i = 0; i < W && i + j < n; i += VL)
                    v_store(to + i, words(mode, row + j + i, next ? next + j + i : NULL, n - j - i));
        } else {
            for (ptrdiff_t j = 0; j < n; j += VL) {
                float buffer[VL];
                v_store(buffer, words(mode, row + j, next ? next + j : NULL, n - j));
                for (int i = 0; i < VL && j + i < n; i += W, to += panel) memcpy(to, buffer + i, W * sizeof(float));
            }
        }
    }
}

/* Columns contiguous: VL x VL blocks of words are transposed.  One panel of n <= NR columns. */
ALWAYS_INLINE void pack_along(const Mode mode, float *restrict out, const float *x, ptrdiff_t ld, ptrdiff_t K,
                              ptrdiff_t n) {
    const ptrdiff_t deep = mode == PAIRS ? 2 * VL : VL; /* floats of k in a block */
    for (ptrdiff_t k = 0; k < K; k += deep) {
        ptrdiff_t left = K - k < deep ? K - k : deep, depth = mode == PAIRS ? (left + 1) / 2 : left;
        for (ptrdiff_t j = 0; j < n; j += VL) {
            vec block[VL];
            for (ptrdiff_t i = 0; i < VL; i++)
                block[i] = j + i < n ? words_along(mode, x + (j + i) * ld + k, left) : v_set(0.0f);
            v_transpose(block);
            float *to = out + (mode == PAIRS ? k / 2 : k) * NR + j;
            for (ptrdiff_t i = 0; i < depth; i++) v_store(to + i * NR, block[i]);
        }
    }
}

/* Rows of A as rows of words.  Each row is a stretch of its own, too short for the machine to see it coming: it is
 * asked for two rows before. */
ALWAYS_INLINE void pack_rows(const Mode mode, float *restrict out, ptrdiff_t ldo, const float *x, ptrdiff_t ld,
                             ptrdiff_t K, ptrdiff_t m) {
    const ptrdiff_t deep = mode == PAIRS ? 2 * VL : VL;
    for (ptrdiff_t i = 0; i < m; i++)
        for (ptrdiff_t k = 0; k < K; k += deep) {
            ptrdiff_t left = K - k < deep ? K - k : deep, depth = mode == PAIRS ? (left + 1) / 2 : left;
            for (ptrdiff_t line = 0; line < deep; line += 64 / (ptrdiff_t)sizeof(float))
                __builtin_prefetch(x + (i + 2) * ld + k + line);
            store_upto(out + i * ldo + (mode == PAIRS ? k / 2 : k), words_along(mode, x + i * ld + k, left), depth);
        }
}

/* Columns of A, contiguous, as rows of words: VL x VL blocks of words are transposed.  For tiles that take rows alone.
 */
ALWAYS_INLINE void pack_turned(const Mode mode, float *restrict out, ptrdiff_t ldo, const float *x, ptrdiff_t ld,
                               ptrdiff_t K, ptrdiff_t m) {
    const ptrdiff_t step = mode == PAIRS ? 2 : 1;
    for (ptrdiff_t k = 0; k < K; k += step * VL)
        for (ptrdiff_t i = 0; i < m; i += VL) {
            vec block[VL];
            for (ptrdiff_t w = 0; w < VL; w++) {
                const float *row = x + (k + w * step) * ld + i;
                const float *next = step == 2 && k + w * step + 1 < K ? row + ld : NULL;
                block[w] = k + w * step < K ? words(mode, row, next, m - i) : v_set(0.0f);
            }
            v_transpose(block);
            for (ptrdiff_t r = 0; r < VL && i + r < m; r++) v_store(out + (i + r) * ldo + k / step, block[r]);
        }
}

/* ---- the walk --------------------------------------------------------------------------------------- */

/* A rectangle of memory that is asked for ahead of time, a few cache lines at once. */
typedef struct Ahead {
    const char *row;
    ptrdiff_t stride, bytes, at, rows;
} Ahead;

ALWAYS_INLINE void ahead(Ahead *s, int lines) {
    for (; lines > 0 && s->rows > 0; lines--) {
        __builtin_prefetch(s->row + s->at, 0, 2);
        s->at += 64;
        if (s->at >= s->bytes) {
            s->at = 0;
            s->row += s->stride;
            s->rows--;
        }
    }
}

ALWAYS_INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
/* n in equal parts of at most `most`, each a multiple of `unit` */
ALWAYS_INLINE ptrdiff_t part(ptrdiff_t n, ptrdiff_t most, ptrdiff_t unit) {
    ptrdiff_t parts = (n + most - 1) / most;
    return parts > 1 ? least(most, ((n + parts - 1) / parts + unit - 1) / unit * unit) : most;
}

ALWAYS_INLINE void gemm_any(const Mode mode, float *c, ptrdiff_t ldc, const float *a, ptrdiff_t a_rs, ptrdiff_t a_cs,
                            const float *b, ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K,
                            int add, const float *bias, float *scratch) {
    const ptrdiff_t per_word = mode == PAIRS ? 2 : 1, tall = mode == PAIRS ? MR_PAIRS : MR;
    /* An A of one row, or of one column, has a stride that means nothing: treat it as rows. */
    const int rows = a_cs == 1;
#ifdef HAVE_AMX
    Tile *tile = mode == PAIRS ? tile_amx : rows ? tile_rows : tile_columns;
    const int turned = mode == PAIRS && !rows;
    if (mode == PAIRS) amx_begin();
#elif defined(HAVE_DOT)
    Tile *tile = mode == PAIRS ? (rows ? tile_rows_pairs : tile_columns_pairs) : rows ? tile_rows : tile_columns;
    const int turned = 0;
#else
    const int turned = 0;
    Tile *tile = rows ? tile_rows : tile_columns;
#endif
    ptrdiff_t kc = part(K, KC * per_word, 2 * VL);
    const ptrdiff_t in_place = least(MC, IN_PLACE / (K > 0 ? least(kc, K) : 1) / tall * tall);
    const ptrdiff_t mc = part(M, mode != FP32 ? MC : rows ? in_place : MC_FP32, tall);
    /* Panels as equal as whole vectors allow: 64 columns are twice 32, not 48 and a slow 16. */
    const ptrdiff_t vectors = (N + VL - 1) / VL, panels = (N + NR - 1) / NR;
    const ptrdiff_t width = panels ? (vectors + panels - 1) / panels * VL : NR;
    const ptrdiff_t nc_most = NC / NR * width;
    float *packed_a = scratch, *packed_b = scratch + MC * KC;
    for (ptrdiff_t jc = 0; jc < N; jc += nc_most) {
        ptrdiff_t nc = least(nc_most, N - jc), pc = 0;
        do { /* once even where K is 0: C is then the bias, or zero */
            ptrdiff_t depth = least(kc, K - pc), kw = (depth + per_word - 1) / per_word;
            if (mode == PAIRS) kw = (kw + DEPTH_PAIRS - 1) / DEPTH_PAIRS * DEPTH_PAIRS;
            int add_block = add || pc > 0;
            for (ptrdiff_t ic = 0; ic < M; ic += mc) {
                ptrdiff_t m = least(mc, M - ic), a_i = kw; /* row i of the block at a_i i, packed or where it lies */
                const float *block = a + ic * a_rs + pc * a_cs, *lies = packed_a;
                if (mode == PAIRS && DEPTH_PAIRS > 1) memset(packed_a, 0, (size_t)(m * kw) * sizeof(float));
                if (turned)
                    pack_turned(mode, packed_a, kw, block, a_cs, depth, m);
                else if (!rows)
                    pack_across(mode, MR, packed_a, kw * MR, block, a_cs, depth, m);
                else if (mode != FP32)
                    pack_rows(mode, packed_a, kw, block, a_rs, depth, m);
                else
                    lies = block, a_i = a_rs;
                for (ptrdiff_t j = 0; j < nc; j += width) {
                    ptrdiff_t n = least(width, nc - j), nv = (n + VL - 1) / VL, tail = n - (nv - 1) * VL;
                    float *panel = M > mc ? packed_b + j / width * NR * kw : packed_b; /* one block of A: used once */
                    const float *bj = b + pc * b_rs + (jc + j) * b_cs;
                    Ahead next = {0};
                    if (ic == 0) {
                        if (mode == PAIRS && DEPTH_PAIRS > 1) memset(panel, 0, (size_t)(kw * NR) * sizeof(float));
                        if (b_cs == 1)
                            pack_across(mode, NR, panel, 0, bj, b_rs, depth, n);
                        else
                            pack_along(mode, panel, bj, b_cs, depth, n);
                        if (j + width < nc) {
                            ptrdiff_t more = least(width, nc - j - width);
                            next = b_cs == 1 ? (Ahead){(const char *)(bj + width), b_rs * 4, more * 4, 0, depth}
                                             : (Ahead){(const char *)(bj + width * b_cs), b_cs * 4, depth * 4, 0, more};
                        }
                    }
                    int lines = (int)(next.rows * ((next.bytes + 63) / 64) * tall / m + 1);
                    for (ptrdiff_t i = 0; i < m; i += tall) {
                        ahead(&next, lines);
                        tile((int)least(tall, m - i), (int)nv, lies + i * a_i, rows || turned ? a_i : 1, panel, kw,
                             c + (ic + i) * ldc + jc + j, ldc, tail, add_block, bias ? bias + jc + j : NULL);
                    }
                }
            }
            pc += kc;
        } while (pc < K);
    }
#ifdef HAVE_AMX
    if (mode == PAIRS) amx_end();
#endif
}

static void gemm(float *c, ptrdiff_t ldc, const float *a, ptrdiff_t a_rs, ptrdiff_t a_cs, const float *b,
                 ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add, const float *bias,
                 float *scratch) {
    gemm_any(FP32, c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias, scratch);
}

/* The same with A and B rounded to bf16 (to nearest, ties to even); sums stay fp32. */
static void gemm_bf16(float *c, ptrdiff_t ldc, const float *a, ptrdiff_t a_rs, ptrdiff_t a_cs, const float *b,
                      ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add, const float *bias,
                      float *scratch) {
#ifdef HAVE_DOT
    gemm_any(PAIRS, c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias, scratch);
#else
    gemm_any(ROUNDED, c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias, scratch);
#endif
}

/* ---- a row or a few ---------------------------------------------------------------------------------- */

/* A row of w at a time: memory is then one stream, which the machine sees coming; several at once, rows being short,
 * halve the bandwidth.  DOT_ROWS rows of x meet it in registers, each with DOT_SUMS sums that are added at the end. */
enum { DOT_ROWS = 4, DOT_SUMS = 2 };

/* m rows of x and n of w.  Vectors of w come in pairs: where it is narrow, even and odd elements from one load.  x has
 * them alike, those of one step for all rows side by side, in `turned`; a wide w meets x as it is. */
ALWAYS_INLINE void dot_body(const int m, const int narrow, float *out, ptrdiff_t ldo, const float *x, ptrdiff_t ldx,
                            const char *w, ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n, const float *bias, float *turned) {
    enum { STEP = DOT_SUMS * VL };
    const ptrdiff_t whole = K / STEP * STEP;
    for (ptrdiff_t k = 0; narrow && k < whole; k += STEP)
        for (int i = 0; i < m; i++)
            for (int c = 0; c < STEP; c++) turned[k * m + i * STEP + c] = x[i * ldx + k + c % VL * 2 + c / VL];
    for (ptrdiff_t j = 0; j < n; j++, w += ldw * (narrow ? 2 : 4)) {
        const uint16_t *half = (const uint16_t *)w;
        const float *full = (const float *)w;
        vec acc[DOT_ROWS][DOT_SUMS];
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) acc[i][0] = acc[i][1] = v_set(0.0f);
        for (ptrdiff_t k = 0; k < whole; k += STEP) {
            vec w0, w1;
            if (narrow)
                v_load_bf16_pairs(half + k, &w0, &w1);
            else
                w0 = v_load(full + k), w1 = v_load(full + k + VL);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) {
                const float *p = narrow ? turned + k * m + i * STEP : x + i * ldx + k;
                acc[i][0] = v_fma(v_load(p), w0, acc[i][0]);
                acc[i][1] = v_fma(v_load(p + VL), w1, acc[i][1]);
            }
        }
        for (ptrdiff_t k = whole; k < K; k += VL) {
            vec wv = narrow ? load_bf16_upto(half + k, K - k) : load_upto(full + k, K - k);
#pragma GCC unroll 4
            for (int i = 0; i < m; i++) acc[i][0] = v_fma(load_upto(x + i * ldx + k, K - k), wv, acc[i][0]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < m; i++) out[i * ldo + j] = v_sum(v_add(acc[i][0], acc[i][1])) + (bias ? bias[j] : 0.0f);
    }
}

ALWAYS_INLINE void dot_any(const int narrow, float *out, ptrdiff_t ldo, const float *x, ptrdiff_t ldx, ptrdiff_t M,
                           const char *w, ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n, const float *bias, float *turned) {
    for (ptrdiff_t i = 0; i < M; i += DOT_ROWS) {
#define DOT(ROWS)                                                                                                      \
    case (ROWS):                                                                                                       \
        dot_body(ROWS, narrow, out + i * ldo, ldo, x + i * ldx, ldx, w, ldw, K, n, bias, turned);                      \
        break;
        switch (M - i < DOT_ROWS ? M - i : DOT_ROWS) {
            DOT(1)
            DOT(2)
            DOT(3)
            DOT(4)
        }
#undef DOT
    }
}

/* out[i, j] = dot(x_i, w_j) + bias[j] for M rows x_i and n rows w_j of length K: a matrix of a few rows times a
 * transposed one, where packing would cost more than the product.  w is read once for DOT_ROWS rows of x, and each sum
 * is taken in the same order whatever M is.  `scratch` is not used. */
static void dot_rows(float *out, ptrdiff_t ldo, const float *x, ptrdiff_t ldx, ptrdiff_t M, const void *w,
                     ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n, const float *bias, float *scratch) {
    dot_any(0, out, ldo, x, ldx, M, w, ldw, K, n, bias, scratch);
}

/* The same for a w of bf16 numbers, which are widened in registers.  scratch: DOT_ROWS K floats. */
static void dot_rows_bf16(float *out, ptrdiff_t ldo, const float *x, ptrdiff_t ldx, ptrdiff_t M, const void *w,
                          ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n, const float *bias, float *scratch) {
    dot_any(1, out, ldo, x, ldx, M, w, ldw, K, n, bias, scratch);
}

/* out += the sum of factor[j] x_j over `rows` rows of n floats, ldx apart */
static void mix_rows(float *out, const float *factor, const float *x, ptrdiff_t ldx, ptrdiff_t rows, ptrdiff_t n) {
    ptrdiff_t i = 0;
    for (; i + 4 * VL <= n; i += 4 * VL) {
        vec acc[4];
        for (int q = 0; q < 4; q++) acc[q] = v_load(out + i + q * VL);
        for (ptrdiff_t j = 0; j < rows; j++)
            for (int q = 0; q < 4; q++) acc[q] = v_fma(v_set(factor[j]), v_load(x + j * ldx + i + q * VL), acc[q]);
        for (int q = 0; q < 4; q++) v_store(out + i + q * VL, acc[q]);
    }
    for (; i < n; i += VL) {
        vec acc = load_upto(out + i, n - i);
        for (ptrdiff_t j = 0; j < rows; j++) acc = v_fma(v_set(factor[j]), load_upto(x + j * ldx + i, n - i), acc);
        store_upto(out + i, acc, n - i);
    }
}
