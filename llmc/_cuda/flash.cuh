// Causal attention on tensor cores, bf16 with fp32 sums (Dao et al. 2022; Dao 2023): the T x T matrix lives a tile at a
// time in the registers of a warp.
//
//     forward    S = scale Q K^T;  P = exp(S - lse);  O = P V
//     backward   dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta), delta = rowsum(dO O);  dQ = scale dS K;
//                dK = scale dS^T Q
//
// With SOFTCAP, which makes kernels of their own, S = softcap tanh(scale Q K^T / softcap), and dS gains the factor
// 1 - tanh^2.  A query sees the `window` keys up to its own; tiles that no row sees are passed over.
//
// A block of four warps owns BM rows of one head: queries in `forward` and `backward_queries`, keys in `backward_keys`,
// a warp 16 M of them.  It walks over tiles of BN rows of the other side, the next of which is copied while this one is
// computed.  Every result has one owner, which adds in the order of the tiles: no atomics.  The price is that the
// backward pass makes S and dP twice, seven products for five.  H / G neighbouring heads of queries share one of keys
// and values; who owns some of these walks over the queries of one head after another.
//
// What a warp computes stays in its registers: the sums of one product (rows g, g + 8; columns 2t, 2t + 1) are laid out
// as the left operand of the next, which therefore is P or dS in the first two kernels, P^T or dS^T in the third.
//
// The budget, for D = 64 on an H100, whose tensor cores take a product of 16 x 8 x 16 in about 6.2 cycles a quarter of
// an SM, 1.55 an SM (mma.sync reaches some 62 % of the peak), while ldmatrix x4 takes its shared memory 4 cycles and
// exponentials of a warp 8 a quarter.  With M = 2 a block of 16 x 16 that was read feeds four products, with M = 1 two:
// 2 cycles of shared memory for 1.55 of tensor cores.  Hence M = 2, and up to 255 registers: two blocks, eight warps an
// SM, of which one exponentiates while another multiplies.  A warp and tile:
//
//                       products   cycles   ldmatrix   cycles of 8 warps   exponentials   cycles
//     forward                128      790         36      1150 for 1590             68      540
//     backward_queries        96      600         40      1280 for 1190             32      260
//     backward_keys          128      790         48      1540 for 1590             32      260
//
// Wider heads have twice the sums and so half the rows (M = 1), smaller tiles, or for D = 256 dK and dV one at a time.

#pragma once

#include "common.cuh"

namespace {

constexpr int WARPS = 4, THREADS = 32 * WARPS;

// ---- tiles in shared memory, named by the byte where they begin, a multiple of 128 -------------------------------

__device__ __forceinline__ char *shared_at(unsigned offset) {
    SHARED(char, shared);
    return shared + offset;
}

// Where the 8 numbers from column 8 chunk of a row lie in a tile of D columns.  The chunks of a row change places so
// that ldmatrix, which reads the same chunk of 8 rows at a time, finds them in different banks.
template <int D> __device__ __forceinline__ unsigned place(unsigned row, unsigned chunk) {
    constexpr unsigned CHUNKS = D / 8, TURNS = CHUNKS < 8 ? CHUNKS : 8;
    return (row * CHUNKS + (chunk ^ (row / (8 / TURNS) % TURNS))) * 16;
}

// The same for a place that is `down` rows below and `right` chunks right of `from`: multiples of 16 and of 2.  As
// these are constants, an exclusive or and a displacement remain.
template <int D> __device__ __forceinline__ unsigned move(unsigned from, unsigned down, unsigned right) {
    constexpr unsigned CHUNKS = D / 8, TURNS = CHUNKS < 8 ? CHUNKS : 8;
    return (from ^ right % TURNS * 16) + (down * CHUNKS + right / TURNS * TURNS) * 16;
}

// Begins to copy ROWS rows, of which the first `present` exist; the others become 0.
template <int D, int ROWS>
__device__ __forceinline__ void load_tile(unsigned tile, const bf16 *rows, int stride, int present) {
    constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS; // rows that the block copies at a time
    const unsigned row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    rows += chunk * 8;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP)
        if (ROWS % STEP == 0 || i + row < ROWS) {
            const bool there = (int)(i + row) < present;
            cp_async_16(shared_at(tile + place<D>(i + row, chunk)), rows + (long long)(there ? i + row : 0) * stride,
                        there ? 16 : 0);
        }
}

// The same of one number a row.
template <int ROWS> __device__ __forceinline__ void load_statistics(unsigned to, const float *from, int present) {
    const bool there = (int)threadIdx.x < present;
    if (threadIdx.x < ROWS)
        cp_async_4(shared_at(to + 4 * threadIdx.x), from + (there ? threadIdx.x : 0), there ? 4 : 0);
}

// What a lane points ldmatrix at, in a block of 16 x 16 at the start of a tile: for a left operand, quarters top left,
// bottom left, top right, bottom right, and so for a right operand, read transposed ...
template <int D> __device__ __forceinline__ unsigned lane_columns() {
    const unsigned lane = threadIdx.x % 32;
    return place<D>(lane % 16, lane / 16);
}

// ... and for the block's transpose as a right operand: either way a right operand's columns 0 to 7 are registers 0 and
// 1, its columns 8 to 15 registers 2 and 3 (the product wants pairs side by side).
template <int D> __device__ __forceinline__ unsigned lane_rows() {
    const unsigned lane = threadIdx.x % 32;
    return place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// The warp's 16 M rows of a tile, of which `rows` is the first, as left operands.  Those of the first KEPT steps of 16
// columns stay in registers for the whole kernel; the others are read again for each product.
template <int D, int M, int KEPT> struct Left {
    unsigned rows;
    unsigned kept[KEPT < D / 16 ? KEPT + 1 : KEPT][M][4];

    __device__ __forceinline__ void begin(unsigned tile, int first) {
        rows = tile + first * (D * 2);
#pragma unroll
        for (int k = 0; k < KEPT; k++) read(k, k);
    }

    __device__ __forceinline__ const unsigned (&get(int k))[M][4] {
        if (k >= KEPT) read(KEPT, k);
        return kept[k < KEPT ? k : KEPT];
    }

    __device__ __forceinline__ void read(int slot, int k) {
#pragma unroll
        for (int m = 0; m < M; m++)
            ldmatrix_x4(kept[slot][m], shared_at(move<D>(rows + lane_columns<D>(), 16 * m, 2 * k)));
    }
};

template <int M, int N> __device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[m][n][e] = 0.0f;
}

// s += left right^T: the warp's 16 M rows of one tile by the BN rows of another, over D columns.
template <int D, int BN, int M, int KEPT>
__device__ __forceinline__ void multiply_rows(float (&s)[M][BN / 8][4], Left<D, M, KEPT> &left, unsigned right) {
    right += lane_rows<D>();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const unsigned(&a)[M][4] = left.get(k);
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            unsigned b[4];
            ldmatrix_x4(b, shared_at(move<D>(right, 16 * n, 2 * k)));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(s[m][2 * n], a[m], b[0], b[1]);
                mma_bf16(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// sum += p right: p, rounded to bf16, are the sums of `multiply_rows`; right has BN rows of D columns.
template <int D, int BN, int M>
__device__ __forceinline__ void multiply_add(float (&sum)[M][D / 8][4], const float (&p)[M][BN / 8][4],
                                             unsigned right) {
    right += lane_columns<D>();
#pragma unroll
    for (int k = 0; k < BN / 16; k++) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[m][i] = pack_bf16(p[m][2 * k + i / 2][i % 2 * 2], p[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            unsigned b[4];
            ldmatrix_x4_trans(b, shared_at(move<D>(right, 16 * k, 2 * n)));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(sum[m][2 * n], a[m], b[0], b[1]);
                mma_bf16(sum[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// What a product of a query and a key becomes before it is multiplied by `outer` to be a score: itself or, with
// SOFTCAP, a tanh, 1 - 2 / (1 + e^2x), which is off by some 2^-22 of 1: for the score as little as that of softcap.
struct Scores {
    float inner, outer; // the former times 2 log2(e)

    __device__ __forceinline__ Scores(float scale, float softcap)
        : inner(2.0f * LOG2E * scale / softcap), outer(SOFTCAP ? softcap : scale) {}

    template <int M, int N> __device__ __forceinline__ void squash(float (&s)[M][N][4]) const {
        if constexpr (SOFTCAP) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        s[m][n][e] = 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(s[m][n][e] * inner));
        }
    }
};

// p times the slope of a tanh where it is `squashed`, or -inf where nothing is seen, and p 0.
__device__ __forceinline__ float sloped(float p, float squashed) {
    return SOFTCAP ? p * fmaxf(fmaf(-squashed, squashed, 1.0f), 0.0f) : p;
}

// Sets to -inf what a query does not see.  Query minus key is `apart` plus that of rows and columns in the products,
// of queries by keys or, if `TURNED`, of keys by queries.
template <bool TURNED, int M, int N> __device__ __forceinline__ void mask(float (&s)[M][N][4], int apart, int window) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    apart += TURNED ? 2 * t - g : g - 2 * t;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int more = 16 * m + e / 2 * 8 - 8 * n - e % 2;
                if ((unsigned)(apart + (TURNED ? -more : more)) >= (unsigned)window) s[m][n][e] = -INFINITY;
            }
}

// Writes the warp's sums times `factor` of their row as rows of `out`, those that exist, 16 bytes at a time. They pass
// through the warp's own rows of a tile that nobody else reads.
template <int D, int M>
__device__ __forceinline__ void store_rows(bf16 *out, int stride, int present, const float (&sum)[M][D / 8][4],
                                           const float (&factor)[M][2], unsigned tile, int first) {
    constexpr int CHUNKS = D / 8;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float f = factor[m][half];
                unsigned *to = (unsigned *)shared_at(tile + place<D>(first + 16 * m + 8 * half + g, n));
                to[t] = pack_bf16(sum[m][n][2 * half] * f, sum[m][n][2 * half + 1] * f);
            }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
        const int row = first + i / CHUNKS, chunk = i % CHUNKS;
        if (row < present)
            *(uint4 *)(out + (long long)row * stride + chunk * 8) =
                *(const uint4 *)shared_at(tile + place<D>(row, chunk));
    }
}

// ---- who owns what -----------------------------------------------------------------------------------------------

struct Task {
    int head, rank;
};

// Blocks are started in the order of their number: `group` heads, whose keys and values fit in L2, at a time, and of
// these first all that have rank 0, the most work.
__device__ __forceinline__ Task task(int heads, int group, int ranks) {
    const int round = blockIdx.x / (group * ranks), left = blockIdx.x % (group * ranks);
    const int size = min(group, heads - round * group);
    return {round * group + left % size, left / size};
}

// ---- forward -----------------------------------------------------------------------------------------------------

// Reads qkv (B,T,(H + 2 G) D); writes the block's rows of out (B,T,H D) and lse (B,H,T).
//
// A running maximum and denominator for each row; sums are rescaled when the maximum grows (Milakov & Gimelshein 2018).
// exp(outer s - m) is 2^(s c - m c), one fused multiply-add and one instruction, with c = log2(e) outer.  The first
// tile of a warp is that of its rows' own keys, so that no row ever has seen none.
template <int D, int BM, int BN>
__device__ __forceinline__ void forward(bf16 *out, float *lse, const bf16 *qkv, int T, int H, int G, int heads,
                                        int group, int window, float scale, float softcap) {
    constexpr int M = BM / WARPS / 16;
    static_assert(BN % (16 * M) == 0, "the keys that are a warp's own lie in one tile");
    constexpr unsigned OWN = BM * D * 2, OTHER = BN * D * 2; // bytes of a tile
    constexpr unsigned q_tile = 0, k_tiles = OWN, v_tiles = k_tiles + 2 * OTHER;
    const int blocks = (T + BM - 1) / BM;
    const Task own = task(heads, group, blocks);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int C = H * D, stride = C + 2 * G * D, b = own.head / H, h = own.head % H;
    const int q0 = (blocks - 1 - own.rank) * BM, first = warp * 16 * M, row0 = q0 + first;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const bf16 *queries = qkv + (long long)b * T * stride + h * D;
    const bf16 *keys = qkv + (long long)b * T * stride + (H + h / (H / G)) * D, *values = keys + G * D;
    const int last = max(0, q0 - window + 1) / BN * BN, begin = (min(T, q0 + BM) - 1) / BN * BN;

    load_tile<D, BM>(q_tile, queries + (long long)q0 * stride, stride, T - q0);
    load_tile<D, BN>(k_tiles + begin / BN % 2 * OTHER, keys + (long long)begin * stride, stride, T - begin);
    load_tile<D, BN>(v_tiles + begin / BN % 2 * OTHER, values + (long long)begin * stride, stride, T - begin);
    cp_async_commit();
    float sum[M][D / 8][4], largest[M][2], total[M][2];
    clear(sum);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) largest[m][half] = -INFINITY, total[m][half] = 0.0f;
    Left<D, M, D <= 64 ? (D / 16 + 1) / 2 : 0> q;
    cp_async_wait<0>();
    __syncthreads();
    q.begin(q_tile, first);

#pragma unroll 1
    for (int k0 = begin; k0 >= last; k0 -= BN) {
        const unsigned stage = k0 / BN % 2 * OTHER;
        if (k0 > last) {
            const long long next = (long long)(k0 - BN) * stride;
            load_tile<D, BN>(k_tiles + (stage ^ OTHER), keys + next, stride, BN);
            load_tile<D, BN>(v_tiles + (stage ^ OTHER), values + next, stride, BN);
            cp_async_commit();
        }
        if (k0 < row0 + 16 * M && k0 + BN - 1 > row0 - window) { // else none of these rows sees any of it
            float s[M][BN / 8][4];
            clear(s);
            multiply_rows<D, BN>(s, q, k_tiles + stage);
            scores.squash(s);
            if (k0 + BN - 1 > row0 || k0 < row0 + 16 * M - window) mask<false>(s, row0 - k0, window);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float top = largest[m][half];
#pragma unroll
                    for (int n = 0; n < BN / 8; n++) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
                    const float keep = exp2_approx((largest[m][half] - top) * c), shift = top * c;
                    largest[m][half] = top;
                    float l = total[m][half] * keep;
#pragma unroll
                    for (int n = 0; n < BN / 8; n++)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; e++) {
                            s[m][n][e] = exp2_approx(fmaf(s[m][n][e], c, -shift));
                            l += s[m][n][e];
                        }
                    total[m][half] = l;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) sum[m][n][2 * half] *= keep, sum[m][n][2 * half + 1] *= keep;
                }
            multiply_add<D, BN>(sum, s, v_tiles + stage);
        }
        cp_async_wait<0>();
        __syncthreads();
    }

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float l = total[m][half];
            l += __shfl_xor_sync(ALL_LANES, l, 1);
            l += __shfl_xor_sync(ALL_LANES, l, 2);
            total[m][half] = 1.0f / l;
            const int row = row0 + 16 * m + 8 * half + g;
            if (t == 0 && row < T) lse[(long long)own.head * T + row] = largest[m][half] * scores.outer + logf(l);
        }
    store_rows<D>(out + ((long long)b * T + q0) * C + h * D, C, T - q0, sum, total, q_tile, first);
}

// ---- backward ----------------------------------------------------------------------------------------------------

// Reads dout, out (B,T,H D), qkv, lse (B,H,T); writes the block's rows of dQ in dqkv (B,T,(H + 2 G) D) and of delta
// (B,H,T), which `backward_keys` reads after it.
template <int D, int BM, int BN>
__device__ __forceinline__ void backward_queries(bf16 *dqkv, float *delta, const bf16 *dout, const bf16 *qkv,
                                                 const bf16 *out, const float *lse, int T, int H, int G, int heads,
                                                 int group, int window, float scale, float softcap) {
    constexpr int M = BM / WARPS / 16, CHUNKS = D / 8;
    constexpr int KEPT = D <= 32 ? D / 16 : 0;
    constexpr unsigned OWN = BM * D * 2, OTHER = BN * D * 2;
    constexpr unsigned q_tile = 0, do_tile = OWN, k_tiles = 2 * OWN, v_tiles = k_tiles + 2 * OTHER;
    const int blocks = (T + BM - 1) / BM;
    const Task own = task(heads, group, blocks);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int C = H * D, stride = C + 2 * G * D, b = own.head / H, h = own.head % H;
    const int q0 = (blocks - 1 - own.rank) * BM, first = warp * 16 * M, row0 = q0 + first;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const bf16 *queries = qkv + (long long)b * T * stride + h * D;
    const bf16 *keys = qkv + (long long)b * T * stride + (H + h / (H / G)) * D, *values = keys + G * D;
    const long long block = ((long long)b * T + q0) * C + h * D, statistics = (long long)own.head * T;
    const int begin = max(0, q0 - window + 1) / BN * BN, end = min(T, q0 + BM);

    load_tile<D, BM>(q_tile, queries + (long long)q0 * stride, stride, T - q0);
    load_tile<D, BM>(do_tile, dout + block, C, T - q0);
    load_tile<D, BN>(k_tiles, keys + (long long)begin * stride, stride, T - begin);
    load_tile<D, BN>(v_tiles, values + (long long)begin * stride, stride, T - begin);
    cp_async_commit();

    // delta: D / 8 lanes a row; then each lane fetches those of the rows it has a part in. Rows that do not exist are
    // the last that does, as a branch would have each load waited for before the next.
    float shift[M][2], own_delta[M][2], factor[M][2];
    constexpr int EACH = M * CHUNKS / 2, TOGETHER = EACH < 4 ? EACH : 4; // 16 bytes of dout and out; those under way
#pragma unroll
    for (int i = 0; i < EACH; i += TOGETHER) {
        uint4 x[TOGETHER], y[TOGETHER];
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const int at = (i + u) * 32 + lane, row = min(first + at / CHUNKS, T - 1 - q0);
            const long long from = block + (long long)row * C + at % CHUNKS * 8;
            x[u] = *(const uint4 *)(dout + from), y[u] = *(const uint4 *)(out + from);
        }
#pragma unroll
        for (int u = 0; u < TOGETHER; u++) {
            const int at = (i + u) * 32 + lane, row = q0 + first + at / CHUNKS;
            const unsigned xs[4] = {x[u].x, x[u].y, x[u].z, x[u].w}, ys[4] = {y[u].x, y[u].y, y[u].z, y[u].w};
            float dot = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                dot = fmaf(__uint_as_float(xs[w] << 16), __uint_as_float(ys[w] << 16), dot);
                dot = fmaf(__uint_as_float(xs[w] & 0xffff0000u), __uint_as_float(ys[w] & 0xffff0000u), dot);
            }
#pragma unroll
            for (int step = CHUNKS / 2; step > 0; step /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, step);
            if (at % CHUNKS == 0 && row < T) delta[statistics + row] = dot;
        }
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + 16 * m + 8 * half + g;
            shift[m][half] = row < T ? lse[statistics + row] * LOG2E : INFINITY; // P = 0
            own_delta[m][half] = row < T ? delta[statistics + row] : 0.0f;
            factor[m][half] = scale;
        }
    float sum[M][D / 8][4];
    clear(sum);
    Left<D, M, KEPT> q, o;
    cp_async_wait<0>();
    __syncthreads();
    q.begin(q_tile, first);
    o.begin(do_tile, first);

#pragma unroll 1
    for (int k0 = begin, stage = 0; k0 < end; k0 += BN, stage ^= OTHER) {
        if (k0 + BN < end) {
            const long long next = (long long)(k0 + BN) * stride;
            load_tile<D, BN>(k_tiles + (stage ^ OTHER), keys + next, stride, T - k0 - BN);
            load_tile<D, BN>(v_tiles + (stage ^ OTHER), values + next, stride, T - k0 - BN);
            cp_async_commit();
        }
        if (k0 < row0 + 16 * M && k0 + BN - 1 > row0 - window) {
            float s[M][BN / 8][4], dp[M][BN / 8][4];
            clear(s);
            multiply_rows<D, BN>(s, q, k_tiles + stage);
            scores.squash(s);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) dp[m][n][e] = -own_delta[m][e / 2];
            multiply_rows<D, BN>(dp, o, v_tiles + stage);
            if (k0 + BN - 1 > row0 || k0 < row0 + 16 * M - window) mask<false>(s, row0 - k0, window);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < BN / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float p = exp2_approx(fmaf(s[m][n][e], c, -shift[m][e / 2]));
                        s[m][n][e] = sloped(p, s[m][n][e]) * dp[m][n][e];
                    }
            multiply_add<D, BN>(sum, s, k_tiles + stage);
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    store_rows<D>(dqkv + ((long long)b * T + q0) * stride + h * D, stride, T - q0, sum, factor, q_tile, first);
}

// Reads dout (B,T,H D), qkv, lse, delta (B,H,T); writes the block's rows of dK (with KEYS) and dV (with VALUES) in dqkv
// (B,T,(H + 2 G) D). Both at once, where the registers hold their sums. `heads` is B G.
template <int D, int BM, int BN, bool KEYS, bool VALUES>
__device__ __forceinline__ void backward_keys(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float *lse,
                                              const float *delta, int T, int H, int G, int heads, int group, int window,
                                              float scale, float softcap) {
    constexpr int M = BM / WARPS / 16;
    static_assert(!(SOFTCAP && KEYS && VALUES), "P, or P with the slope: one of them is kept");
    constexpr unsigned OWN = BM * D * 2, OTHER = BN * D * 2, STATISTICS = BN * 4;
    constexpr unsigned k_tile = 0, v_tile = OWN, q_tiles = v_tile + (KEYS ? OWN : 0), do_tiles = q_tiles + 2 * OTHER;
    constexpr unsigned lses = do_tiles + 2 * OTHER, deltas = lses + 2 * STATISTICS;
    const int blocks = (T + BM - 1) / BM;
    const Task own = task(heads, group, blocks);
    const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
    const int C = H * D, stride = C + 2 * G * D, b = own.head / G, g_own = own.head % G, h = g_own * (H / G);
    const int k0 = own.rank * BM, first = warp * 16 * M, row0 = k0 + first;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const bf16 *queries = qkv + (long long)b * T * stride + h * D, *douts = dout + (long long)b * T * C + h * D;
    const bf16 *keys = qkv + (long long)b * T * stride + (H + g_own) * D, *values = keys + G * D;

    long long statistics = (long long)(b * H + h) * T;
    load_tile<D, BM>(k_tile, keys + (long long)k0 * stride, stride, T - k0);
    if (KEYS) load_tile<D, BM>(v_tile, values + (long long)k0 * stride, stride, T - k0);
    load_tile<D, BN>(q_tiles, queries + (long long)k0 * stride, stride, T - k0);
    load_tile<D, BN>(do_tiles, douts + (long long)k0 * C, C, T - k0);
    load_statistics<BN>(lses, lse + statistics + k0, T - k0);
    load_statistics<BN>(deltas, delta + statistics + k0, T - k0);
    cp_async_commit();
    float dk[M][KEYS ? D / 8 : 1][4], dv[M][VALUES ? D / 8 : 1][4];
    clear(dk), clear(dv);
    Left<D, M, 0> k, v;
    k.begin(k_tile, first);
    v.begin(v_tile, first);
    cp_async_wait<0>();
    __syncthreads();

#pragma unroll 1
    for (int q0 = k0, next, left = H / G, stage = 0; left > 0; q0 = next, stage ^= 1) {
        next = q0 + BN;
        if (next >= T || next - k0 >= BM - 1 + window) { // the next head
            next = k0, left--;
            queries += D, douts += D, statistics += T;
        }
        if (left > 0) {
            load_tile<D, BN>(q_tiles + (stage ^ 1) * OTHER, queries + (long long)next * stride, stride, T - next);
            load_tile<D, BN>(do_tiles + (stage ^ 1) * OTHER, douts + (long long)next * C, C, T - next);
            load_statistics<BN>(lses + (stage ^ 1) * STATISTICS, lse + statistics + next, T - next);
            load_statistics<BN>(deltas + (stage ^ 1) * STATISTICS, delta + statistics + next, T - next);
            cp_async_commit();
        }
        const int apart = q0 - row0;
        if (apart > -BN && apart < 16 * M - 1 + window) { // else none of it sees any of these keys
            float s[M][BN / 8][4];
            clear(s);
            multiply_rows<D, BN>(s, k, q_tiles + stage * OTHER);
            scores.squash(s);
            if (apart < 16 * M - 1 || apart > window - BN) mask<true>(s, apart, window);
#pragma unroll
            for (int n = 0; n < BN / 8; n++) {
                const float2 l = *(const float2 *)shared_at(lses + stage * STATISTICS + 4 * (8 * n + 2 * t));
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float p = exp2_approx(fmaf(s[m][n][e], c, -LOG2E * (e % 2 ? l.y : l.x)));
                        s[m][n][e] = KEYS ? sloped(p, s[m][n][e]) : p;
                    }
            }
            if constexpr (VALUES) multiply_add<D, BN>(dv, s, do_tiles + stage * OTHER);
            if constexpr (KEYS) {
                float dp[M][BN / 8][4];
#pragma unroll
                for (int n = 0; n < BN / 8; n++) {
                    const float2 d = *(const float2 *)shared_at(deltas + stage * STATISTICS + 4 * (8 * n + 2 * t));
#pragma unroll
                    for (int m = 0; m < M; m++)
#pragma unroll
                        for (int e = 0; e < 4; e++) dp[m][n][e] = e % 2 ? -d.y : -d.x;
                }
                multiply_rows<D, BN>(dp, v, do_tiles + stage * OTHER);
#pragma unroll
                for (int m = 0; m < M; m++)
#pragma unroll
                    for (int n = 0; n < BN / 8; n++)
#pragma unroll
                        for (int e = 0; e < 4; e++) s[m][n][e] *= dp[m][n][e];
                multiply_add<D, BN>(dk, s, q_tiles + stage * OTHER);
            }
        }
        cp_async_wait<0>();
        __syncthreads();
    }

    float factor[M][2];
    bf16 *rows = dqkv + ((long long)b * T + k0) * stride + (H + g_own) * D;
    if constexpr (KEYS) {
#pragma unroll
        for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = scale;
        store_rows<D>(rows, stride, T - k0, dk, factor, k_tile, first);
    }
    if constexpr (VALUES) {
#pragma unroll
        for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = 1.0f;
        store_rows<D>(rows + G * D, stride, T - k0, dv, factor, k_tile, first);
    }
}

} // namespace

// ---- one kernel a head size; tiles as in attention.py ------------------------------------------------------------

#define FORWARD(NAME, D, BM, BN)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        NAME##_##D(bf16 *out, float *lse, const bf16 *qkv, int T, int H, int G, int heads, int group, int window,      \
                   float scale, float softcap) {                                                                       \
        forward<D, BM, BN>(out, lse, qkv, T, H, G, heads, group, window, scale, softcap);                              \
    }

#define BACKWARD_QUERIES(NAME, D, BM, BN)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        NAME##_##D(bf16 *dqkv, float *delta, const bf16 *dout, const bf16 *qkv, const bf16 *out, const float *lse,     \
                   int T, int H, int G, int heads, int group, int window, float scale, float softcap) {                \
        backward_queries<D, BM, BN>(dqkv, delta, dout, qkv, out, lse, T, H, G, heads, group, window, scale, softcap);  \
    }

#define BACKWARD_KEYS(NAME, D, BM, BN, KEYS, VALUES)                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        NAME##_##D(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float *lse, const float *delta, int T, int H,  \
                   int G, int heads, int group, int window, float scale, float softcap) {                              \
        backward_keys<D, BM, BN, KEYS, VALUES>(dqkv, dout, qkv, lse, delta, T, H, G, heads, group, window, scale,      \
                                               softcap);                                                               \
    }
