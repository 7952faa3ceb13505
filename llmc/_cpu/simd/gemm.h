/* Matrix product on one thread: C (+)= A B (+ bias), any strides, any sizes.
 *
 *     C (M x N)   row i at c + i ldc
 *     A (M x K)   element (i, k) at a + i a_rs + k a_cs, one of the two strides being 1
 *     B (K x N)   element (k, j) at b + k b_rs + j b_cs, likewise
 *
 * The plan is Goto & van de Geijn's (2008).  B is packed, NC columns by KC rows at a time, into panels of
 * NR = 3 VL columns, a panel's row k being NR consecutive floats.  A tile of MR x NR accumulators stays
 * in registers while k runs over KC; per k it loads three vectors of B and broadcasts MR floats of A.
 *
 *              NR                          B panel (KC x NR)     stays in L1 while ...
 *         +----------+                     A block (MC x KC)     ... streams past it from L2
 *      MR |   tile   |
 *         +----------+
 *
 * A broadcast is a scalar load, so rows of A (a_cs = 1) are used where they lie; only a transposed A
 * (a_rs = 1, the weight gradient) is packed, MR rows side by side.
 *
 * Edges: a tile of m x v vectors exists for every m <= MR and v <= 3, so the last rows cost only what they
 * compute; the last vector of a row is stored under a mask.  B's panels are padded with zeros to whole
 * vectors.  Each element of C sums k in order, KC at a time, whatever block it falls into: results do not
 * depend on how the caller divides C among threads. */
#include "vec.h"

#include <string.h>

enum { NV = 3, NR = NV * VL, KC = 256, MC = 128, NC = 16 * NR };

/* Floats of scratch that gemm() needs: one block of B and one of a transposed A. */
enum { GEMM_SCRATCH = KC * NC + KC * MC };

/* One tile, m x (nv VL) with the last vector `tail` lanes wide.  m, nv and a_k are compile-time constants. */
ALWAYS_INLINE void tile_body(const int m, const int nv, const ptrdiff_t a_k, const float *restrict a, ptrdiff_t a_i,
                             const float *restrict b, ptrdiff_t kc, float *restrict c, ptrdiff_t ldc, ptrdiff_t tail,
                             int add, const float *restrict bias) {
    vec acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < m; i++)
#pragma GCC unroll 3
        for (int j = 0; j < nv; j++) acc[i][j] = v_set(0.0f);

    for (ptrdiff_t k = 0; k < kc; k++) {
        vec bv[NV];
#pragma GCC unroll 3
        for (int j = 0; j < nv; j++) bv[j] = v_load(b + k * NR + j * VL);
#pragma GCC unroll 8
        for (int i = 0; i < m; i++) {
            vec av = v_set(a[i * a_i + k * a_k]);
#pragma GCC unroll 3
            for (int j = 0; j < nv; j++) acc[i][j] = v_fma(av, bv[j], acc[i][j]);
        }
    }

#pragma GCC unroll 3
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
ALWAYS_INLINE void tile_any(int m, int nv, const ptrdiff_t a_k, const float *a, ptrdiff_t a_i, const float *b,
                            ptrdiff_t kc, float *c, ptrdiff_t ldc, ptrdiff_t tail, int add, const float *bias) {
#define TILE(M, V)                                                                                                     \
    case (M) * 4 + (V):                                                                                                \
        tile_body(M, V, a_k, a, a_i, b, kc, c, ldc, tail, add, bias);                                                  \
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

__attribute__((noinline)) static void tile_rows(int m, int nv, const float *a, ptrdiff_t a_i, const float *b,
                                                ptrdiff_t kc, float *c, ptrdiff_t ldc, ptrdiff_t tail, int add,
                                                const float *bias) {
    tile_any(m, nv, 1, a, a_i, b, kc, c, ldc, tail, add, bias);
}

__attribute__((noinline)) static void tile_packed(int m, int nv, const float *a, const float *b, ptrdiff_t kc, float *c,
                                                  ptrdiff_t ldc, ptrdiff_t tail, int add, const float *bias) {
    tile_any(m, nv, MR, a, 1, b, kc, c, ldc, tail, add, bias);
}

/* Pack kc x n of B (n <= NR) as one panel; columns from n to the next whole vector become zero. */
static void pack_panel(float *restrict out, const float *restrict b, ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t kc,
                       ptrdiff_t n) {
    if (b_cs == 1) { /* rows lie as the panel wants them: copy */
        for (ptrdiff_t k = 0; k < kc; k++)
            for (ptrdiff_t j = 0; j < n; j += VL) v_store(out + k * NR + j, load_upto(b + k * b_rs + j, n - j));
        return;
    }
    for (ptrdiff_t j = 0; j < n; j += VL) { /* columns are contiguous: transpose VL x VL blocks */
        ptrdiff_t columns = n - j < VL ? n - j : VL;
        for (ptrdiff_t k = 0; k < kc; k += VL) {
            ptrdiff_t depth = kc - k < VL ? kc - k : VL;
            vec block[VL];
            for (ptrdiff_t i = 0; i < VL; i++)
                block[i] = i < columns ? load_upto(b + (j + i) * b_cs + k, depth) : v_set(0.0f);
            v_transpose(block);
            for (ptrdiff_t i = 0; i < depth; i++) v_store(out + (k + i) * NR + j, block[i]);
        }
    }
}

/* Pack m <= MR rows of a transposed A (a_rs = 1): MR floats per k, unused ones left alone. */
static void pack_rows(float *restrict out, const float *restrict a, ptrdiff_t a_cs, ptrdiff_t kc, ptrdiff_t m) {
    if (m == MR)
        for (ptrdiff_t k = 0; k < kc; k++) memcpy(out + k * MR, a + k * a_cs, MR * sizeof(float));
    else
        for (ptrdiff_t k = 0; k < kc; k++) memcpy(out + k * MR, a + k * a_cs, (size_t)m * sizeof(float));
}

static void gemm(float *c, ptrdiff_t ldc, const float *a, ptrdiff_t a_rs, ptrdiff_t a_cs, const float *b,
                 ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add, const float *bias,
                 float *scratch) {
    float *packed_b = scratch, *packed_a = scratch + (ptrdiff_t)KC * NC;
    /* An A of one row, or of one column, has a stride that means nothing: treat it as rows. */
    int rows = a_cs == 1;
    for (ptrdiff_t jc = 0; jc < N; jc += NC) {
        ptrdiff_t nc = N - jc < NC ? N - jc : NC;
        ptrdiff_t pc = 0;
        do { /* once even where K is 0: C is then the bias, or zero */
            ptrdiff_t kc = K - pc < KC ? K - pc : KC;
            int add_block = add || pc > 0;
            for (ptrdiff_t j = 0; j < nc; j += NR)
                pack_panel(packed_b + j * kc, b + pc * b_rs + (jc + j) * b_cs, b_rs, b_cs, kc,
                           nc - j < NR ? nc - j : NR);
            for (ptrdiff_t ic = 0; ic < M; ic += MC) {
                ptrdiff_t mc = M - ic < MC ? M - ic : MC;
                const float *a_block = a + ic * a_rs + pc * a_cs;
                if (!rows)
                    for (ptrdiff_t i = 0; i < mc; i += MR)
                        pack_rows(packed_a + i * kc, a_block + i, a_cs, kc, mc - i < MR ? mc - i : MR);
                for (ptrdiff_t j = 0; j < nc; j += NR) {
                    ptrdiff_t n = nc - j < NR ? nc - j : NR;
                    int nv = (int)((n + VL - 1) / VL);
                    ptrdiff_t tail = n - (nv - 1) * VL;
                    const float *panel = packed_b + j * kc;
                    const float *bj = bias ? bias + jc + j : NULL;
                    for (ptrdiff_t i = 0; i < mc; i += MR) {
                        int m = (int)(mc - i < MR ? mc - i : MR);
                        float *cij = c + (ic + i) * ldc + jc + j;
                        if (rows)
                            tile_rows(m, nv, a_block + i * a_rs, a_rs, panel, kc, cij, ldc, tail, add_block, bj);
                        else
                            tile_packed(m, nv, packed_a + i * kc, panel, kc, cij, ldc, tail, add_block, bj);
                    }
                }
            }
            pc += KC;
        } while (pc < K);
    }
}

/* out[j] = dot(x, w_j) + bias[j] for n rows w_j of length K, ldw apart: a matrix of one row times a
 * transposed one, where packing would cost more than the product.  Four rows share the loads of x. */
static void dot_rows(float *out, const float *x, const float *w, ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n,
                     const float *bias) {
    for (ptrdiff_t j = 0; j < n; j += 4) {
        ptrdiff_t rows = n - j < 4 ? n - j : 4;
        const float *row[4];
        for (ptrdiff_t r = 0; r < 4; r++) row[r] = w + (j + (r < rows ? r : 0)) * ldw;
        vec acc[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
        ptrdiff_t k = 0;
        for (; k + VL <= K; k += VL) {
            vec xv = v_load(x + k);
            for (int r = 0; r < 4; r++) acc[r] = v_fma(xv, v_load(row[r] + k), acc[r]);
        }
        if (k < K) {
            vec xv = v_load_n(x + k, K - k);
            for (int r = 0; r < 4; r++) acc[r] = v_fma(xv, v_load_n(row[r] + k, K - k), acc[r]);
        }
        for (ptrdiff_t r = 0; r < rows; r++) out[j + r] = v_sum(acc[r]) + (bias ? bias[j + r] : 0.0f);
    }
}
