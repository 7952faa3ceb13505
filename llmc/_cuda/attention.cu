// Causal attention without tensor cores: fp32 arithmetic, any type of storage, any head of up to 256 channels, and
// decoding from a cache. `flash.cuh` is the fast path of bf16; the algorithm is the same, and here to be read.
//
//     forward    S = scale Q K^T;  P = exp(S - lse);  O = P V
//     backward   dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta), delta = rowsum(dO O);  dQ = scale dS K;
//                dK = scale dS^T Q
//
// With softcap > 0 S = softcap tanh(scale Q K^T / softcap), and dS gains the factor 1 - tanh^2. A query sees the
// `window` keys up to its own. H / G neighbouring heads of queries share one of keys and values, whose gradients are
// sums over them, one head after another.
//
// A block of 8 x 8 threads owns 8 R rows of one head, queries or keys, and walks over tiles of as many rows of the
// other side. Of a product of two tiles thread (y, x) computes rows y + 8 i, columns x + 8 j; of sums over D columns
// rows y + 8 i, columns 4 (x + 8 j) to 4 (x + 8 j) + 3. Whatever concerns one row is thus within 8 neighbouring lanes.

#include "common.cuh"

namespace {

constexpr int SIDE = 8, THREADS = SIDE * SIDE;

// Rows that a thread computes, and a block: fewer where the sums of wide heads fill the registers.
template <int WIDEST> struct Tile {
    static constexpr int R = WIDEST > 128 ? 2 : 4, ROWS = SIDE * R;
    static constexpr int PITCH = ROWS + 4; // floats from a row of P to the next
};

// Floats from a row of D columns to the next: an odd number of 16 bytes, so that 8 rows begin in different banks.
__device__ __forceinline__ int padded(int D) { return ((D + 3) / 4 | 1) * 4; }

// Begins to copy rows, of which the first `present` exist, to shared memory; rows that do not become 0. The copies that
// thread (y, x) makes are of rows y + 8 i, columns 4 (x + 8 j) to 4 (x + 8 j) + 3, all under way at once and past the
// registers: they have arrived after `cp_async_wait` and a barrier. Numbers that must be converted, or do not lie at
// multiples of 16 bytes, go one by one.
template <int WIDEST>
__device__ __forceinline__ void load_tile(float *tile, const floatX *rows, long long stride, int present, int D) {
    constexpr int R = Tile<WIDEST>::R, ROWS = Tile<WIDEST>::ROWS;
    const int width = padded(D);
    if (sizeof(floatX) == 4 && D % 4 == 0 && (unsigned long long)rows % 16 == 0) {
        const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < WIDEST / (4 * SIDE); j++) {
                const int row = y + SIDE * i, column = 4 * (x + SIDE * j);
                const bool there = row < present;
                if (column < D)
                    cp_async_16(tile + row * width + column, rows + (there ? row : 0) * stride + column,
                                there ? 16 : 0);
            }
    } else {
        const int lane = threadIdx.x % WARP;
        for (int row = threadIdx.x / WARP; row < ROWS; row += THREADS / WARP)
            for (int column = lane; column < width; column += WARP)
                tile[row * width + column] = row < present && column < D ? to_float(rows[row * stride + column]) : 0.0f;
    }
    cp_async_commit();
}

// Waits until what this thread has begun to copy is there, and then for the others: all may read it, and overwrite what
// they read before.
__device__ __forceinline__ void arrived() {
    cp_async_wait<0>();
    __syncthreads();
}

__device__ __forceinline__ float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// s = left right^T, of two tiles.
template <int R>
__device__ __forceinline__ void multiply_rows(float (&s)[R][R], const float *left, const float *right, int D) {
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE, width = padded(D);
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++) s[i][j] = 0.0f;
    for (int d = 0; d < D; d += 4) {
        float4 a[R], b[R];
#pragma unroll
        for (int i = 0; i < R; i++) {
            a[i] = *(const float4 *)(left + (y + SIDE * i) * width + d);
            b[i] = *(const float4 *)(right + (x + SIDE * i) * width + d);
        }
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++) s[i][j] = dot4(a[i], b[j], s[i][j]);
    }
}

// sum += p right: p (ROWS, ROWS) comes through shared memory, `scratch`, and only to the lanes of its row.
template <int WIDEST, int R = Tile<WIDEST>::R>
__device__ __forceinline__ void multiply_add(float (&sum)[R][WIDEST / SIDE], const float (&p)[R][R], float *scratch,
                                             const float *right, int D) {
    constexpr int PITCH = Tile<WIDEST>::PITCH;
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE, width = padded(D);
    __syncwarp(); // the product before may still be reading
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int j = 0; j < R; j++) scratch[(y + SIDE * i) * PITCH + x + SIDE * j] = p[i][j];
    __syncwarp();
    for (int row = 0; row < Tile<WIDEST>::ROWS; row++) {
        float a[R];
#pragma unroll
        for (int i = 0; i < R; i++) a[i] = scratch[(y + SIDE * i) * PITCH + row];
#pragma unroll
        for (int j = 0; j < WIDEST / (4 * SIDE); j++) {
            const int column = 4 * (x + SIDE * j);
            if (column < D) {
                const float4 b = *(const float4 *)(right + row * width + column);
#pragma unroll
                for (int i = 0; i < R; i++) {
                    sum[i][4 * j] = fmaf(a[i], b.x, sum[i][4 * j]);
                    sum[i][4 * j + 1] = fmaf(a[i], b.y, sum[i][4 * j + 1]);
                    sum[i][4 * j + 2] = fmaf(a[i], b.z, sum[i][4 * j + 2]);
                    sum[i][4 * j + 3] = fmaf(a[i], b.w, sum[i][4 * j + 3]);
                }
            }
        }
    }
}

// Writes sums times `factor` as rows that exist.
template <int R, int N>
__device__ __forceinline__ void store_rows(floatX *rows, long long stride, int present, const float (&sum)[R][N],
                                           const float (&factor)[R], int D) {
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int row = y + SIDE * i, column = 4 * (x + SIDE * (n / 4)) + n % 4;
            if (row < present && column < D) rows[row * stride + column] = from_float<floatX>(sum[i][n] * factor[i]);
        }
}

template <int R, int N> __device__ __forceinline__ void clear(float (&sum)[R][N]) {
#pragma unroll
    for (int i = 0; i < R; i++)
#pragma unroll
        for (int n = 0; n < N; n++) sum[i][n] = 0.0f;
}

// Of the 8 lanes of a row; each gets the result.
template <typename Op> __device__ __forceinline__ float row_reduce(float value) {
#pragma unroll
    for (int step = SIDE / 2; step > 0; step /= 2) value = Op()(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

// What a product of a query and a key becomes before it is multiplied by `outer` to be a score: itself, or a tanh.
struct Scores {
    float inner, outer;
    bool capped;

    __device__ __forceinline__ Scores(float scale, float softcap)
        : inner(scale / softcap), outer(softcap > 0.0f ? softcap : scale), capped(softcap > 0.0f) {}

    __device__ __forceinline__ float squash(float product) const { return capped ? tanhf(product * inner) : product; }

    template <int R> __device__ __forceinline__ void squash(float (&s)[R][R]) const {
        if (!capped) return;
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++) s[i][j] = tanhf(s[i][j] * inner);
    }

    // Of what has been squashed, by what went in, over `inner`.
    __device__ __forceinline__ float slope(float squashed) const {
        return capped ? fmaf(-squashed, squashed, 1.0f) : 1.0f;
    }
};

// Whether a query sees a key: neither a later one nor one before its window.
__device__ __forceinline__ bool sees(int query, int key, int window) {
    return (unsigned)(query - key) < (unsigned)window;
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Reads qkv (B,T,(H + 2 G) D); writes the block's rows of out (B,T,H D) and lse (B,H,T).
//
// Each row has a running maximum and denominator; its sums are rescaled when the maximum grows (Milakov & Gimelshein
// 2018). exp(outer s - m) is 2^(s c - m c) with c = log2(e) outer. Of keys and values one tile travels while the other
// is in use. The tile of the diagonal comes first, so that each row has seen a key when it meets a tile of which it
// sees none.
template <int WIDEST>
__device__ __forceinline__ void forward(floatX *out, float *lse, const floatX *qkv, int T, int H, int G, int heads,
                                        int D, int window, float scale, float softcap) {
    constexpr int R = Tile<WIDEST>::R, ROWS = Tile<WIDEST>::ROWS;
    SHARED(float, shared);
    const int size = ROWS * padded(D);
    float *q_tile = shared, *k_tile = q_tile + size, *v_tile = k_tile + size, *scratch = v_tile + size;
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    const int head = blockIdx.x % heads, b = head / H, h = head % H, C = H * D;
    const int q0 = ((T + ROWS - 1) / ROWS - 1 - (int)(blockIdx.x / heads)) * ROWS; // the longest rows are begun first
    const int last = max(0, q0 - window + 1) / ROWS * ROWS;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const long long stride = (long long)(H + 2 * G) * D;
    const floatX *queries = qkv + b * T * stride + h * D;
    const floatX *keys = qkv + b * T * stride + (H + h / (H / G)) * D, *values = keys + G * D;

    load_tile<WIDEST>(q_tile, queries + q0 * stride, stride, T - q0, D);
    load_tile<WIDEST>(k_tile, keys + q0 * stride, stride, T - q0, D);
    float sum[R][WIDEST / SIDE], largest[R], total[R];
    clear(sum);
#pragma unroll
    for (int i = 0; i < R; i++) largest[i] = -INFINITY, total[i] = 0.0f;
    for (int k0 = q0; k0 >= last; k0 -= ROWS) {
        const int next = k0 - ROWS;
        arrived(); // keys
        load_tile<WIDEST>(v_tile, values + k0 * stride, stride, T - k0, D);
        float s[R][R];
        multiply_rows(s, q_tile, k_tile, D);
        arrived(); // values
        if (next >= last) load_tile<WIDEST>(k_tile, keys + next * stride, stride, ROWS, D);
        scores.squash(s);
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int row = q0 + y + SIDE * i;
            float top = largest[i];
#pragma unroll
            for (int j = 0; j < R; j++) {
                if (!sees(row, k0 + x + SIDE * j, window)) s[i][j] = -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = row_reduce<Max>(top);
            const float keep = exp2_approx((largest[i] - top) * c);
            largest[i] = top;
            total[i] *= keep;
#pragma unroll
            for (int j = 0; j < R; j++) {
                s[i][j] = exp2_approx(fmaf(s[i][j], c, -(top * c)));
                total[i] += s[i][j];
            }
#pragma unroll
            for (int n = 0; n < WIDEST / SIDE; n++) sum[i][n] *= keep;
        }
        multiply_add<WIDEST>(sum, s, scratch, v_tile, D);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = q0 + y + SIDE * i;
        const float l = row_reduce<Sum>(total[i]);
        if (x == 0 && row < T) lse[(long long)head * T + row] = largest[i] * scores.outer + logf(l);
        total[i] = 1.0f / l;
    }
    store_rows(out + ((long long)b * T + q0) * C + h * D, C, T - q0, sum, total, D);
}

// ---- backward ---------------------------------------------------------------------------------------------------

// Reads dout, out (B,T,H D), qkv, lse (B,H,T); writes the block's rows of dQ in dqkv (B,T,(H + 2 G) D) and of delta
// (B,H,T), which `backward_keys` reads after it.
template <int WIDEST>
__device__ __forceinline__ void backward_queries(floatX *dqkv, float *delta, const floatX *dout, const floatX *qkv,
                                                 const floatX *out, const float *lse, int T, int H, int G, int heads,
                                                 int D, int window, float scale, float softcap) {
    constexpr int R = Tile<WIDEST>::R, ROWS = Tile<WIDEST>::ROWS;
    SHARED(float, shared);
    const int size = ROWS * padded(D);
    float *q_tile = shared, *do_tile = q_tile + size, *k_tile = do_tile + size, *v_tile = k_tile + size;
    float *scratch = v_tile + size;
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    const int head = blockIdx.x % heads, b = head / H, h = head % H, C = H * D;
    const int q0 = ((T + ROWS - 1) / ROWS - 1 - (int)(blockIdx.x / heads)) * ROWS;
    const int first = max(0, q0 - window + 1) / ROWS * ROWS;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const long long stride = (long long)(H + 2 * G) * D, at = ((long long)b * T + q0) * C + h * D;
    const floatX *queries = qkv + b * T * stride + h * D;
    const floatX *keys = qkv + b * T * stride + (H + h / (H / G)) * D, *values = keys + G * D;

    load_tile<WIDEST>(q_tile, queries + q0 * stride, stride, T - q0, D);
    load_tile<WIDEST>(do_tile, dout + at, C, T - q0, D);
    load_tile<WIDEST>(v_tile, values + first * stride, stride, T - first, D);
    arrived();
    float sum[R][WIDEST / SIDE], shift[R], row_delta[R], factor[R];
    clear(sum);
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = y + SIDE * i;
        const long long statistic = (long long)head * T + q0 + row;
        const bool there = q0 + row < T;
        float d = 0.0f;
        for (int column = x; column < D && there; column += SIDE)
            d = fmaf(do_tile[row * padded(D) + column], to_float(out[at + (long long)row * C + column]), d);
        row_delta[i] = row_reduce<Sum>(d);
        if (x == 0 && there) delta[statistic] = row_delta[i];
        shift[i] = there ? lse[statistic] * LOG2E : 0.0f;
        factor[i] = scale;
    }
    for (int k0 = first; k0 <= q0; k0 += ROWS) {
        const int next = k0 + ROWS;
        arrived(); // values
        load_tile<WIDEST>(k_tile, keys + k0 * stride, stride, T - k0, D);
        float s[R][R], dp[R][R];
        multiply_rows(dp, do_tile, v_tile, D);
        arrived(); // keys
        if (next <= q0) load_tile<WIDEST>(v_tile, values + next * stride, stride, T - next, D);
        multiply_rows(s, q_tile, k_tile, D);
        scores.squash(s);
#pragma unroll
        for (int i = 0; i < R; i++)
#pragma unroll
            for (int j = 0; j < R; j++) {
                const bool seen = sees(q0 + y + SIDE * i, k0 + x + SIDE * j, window);
                const float p = exp2_approx(fmaf(s[i][j], c, -shift[i]));
                s[i][j] = seen ? p * (dp[i][j] - row_delta[i]) * scores.slope(s[i][j]) : 0.0f;
            }
        multiply_add<WIDEST>(sum, s, scratch, k_tile, D);
    }
    store_rows(dqkv + ((long long)b * T + q0) * stride + h * D, stride, T - q0, sum, factor, D);
}

// Reads dout (B,T,H D), qkv, lse, delta (B,H,T); writes the block's rows of dK and dV in dqkv (B,T,(H + 2 G) D). Walks
// over the queries that see its keys of one head after another; `heads` is B G.
template <int WIDEST>
__device__ __forceinline__ void backward_keys(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse,
                                              const float *delta, int T, int H, int G, int heads, int D, int window,
                                              float scale, float softcap) {
    constexpr int R = Tile<WIDEST>::R, ROWS = Tile<WIDEST>::ROWS;
    SHARED(float, shared);
    const int size = ROWS * padded(D);
    float *k_tile = shared, *v_tile = k_tile + size, *q_tile = v_tile + size, *do_tile = q_tile + size;
    float *scratch = do_tile + size;
    const int y = threadIdx.x / SIDE, x = threadIdx.x % SIDE;
    const int b = blockIdx.x % heads / G, g = blockIdx.x % heads % G, C = H * D, h = g * (H / G);
    const int k0 = (int)(blockIdx.x / heads) * ROWS, end = min(T, k0 + ROWS - 1 + window);
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const long long stride = (long long)(H + 2 * G) * D, own = (b * (long long)T + k0) * stride + (H + g) * D;
    const floatX *queries = qkv + b * T * stride + h * D, *douts = dout + (long long)b * T * C + h * D;

    lse += (long long)(b * H + h) * T, delta += (long long)(b * H + h) * T;
    load_tile<WIDEST>(k_tile, qkv + own, stride, T - k0, D);
    load_tile<WIDEST>(v_tile, qkv + own + G * D, stride, T - k0, D);
    load_tile<WIDEST>(do_tile, douts + (long long)k0 * C, C, T - k0, D);
    float dk[R][WIDEST / SIDE], dv[R][WIDEST / SIDE], scales[R], ones[R];
    clear(dk), clear(dv);
#pragma unroll
    for (int i = 0; i < R; i++) scales[i] = scale, ones[i] = 1.0f;
    for (int q0 = k0, left = H / G; left > 0;) {
        arrived(); // dO
        load_tile<WIDEST>(q_tile, queries + q0 * stride, stride, T - q0, D);
        float p[R][R], dp[R][R]; // transposed: rows are keys
        multiply_rows(dp, v_tile, do_tile, D);
        arrived(); // queries
        multiply_rows(p, k_tile, q_tile, D);
        scores.squash(p);
#pragma unroll
        for (int j = 0; j < R; j++) {
            const int query = q0 + x + SIDE * j;
            const float shift = query < T ? lse[query] * LOG2E : 0.0f;
            const float query_delta = query < T ? delta[query] : 0.0f;
#pragma unroll
            for (int i = 0; i < R; i++) {
                const bool seen = sees(query, k0 + y + SIDE * i, window) && query < T;
                const float slope = scores.slope(p[i][j]);
                p[i][j] = seen ? exp2_approx(fmaf(p[i][j], c, -shift)) : 0.0f;
                dp[i][j] = seen ? p[i][j] * (dp[i][j] - query_delta) * slope : 0.0f;
            }
        }
        multiply_add<WIDEST>(dv, p, scratch, do_tile, D);
        q0 += ROWS;
        if (q0 >= end) { // the next head
            q0 = k0, left--;
            queries += D, douts += D, lse += T, delta += T;
        }
        __syncthreads(); // nobody reads dO any more
        if (left > 0) load_tile<WIDEST>(do_tile, douts + (long long)q0 * C, C, T - q0, D);
        multiply_add<WIDEST>(dk, dp, scratch, q_tile, D);
    }
    store_rows(dqkv + own, stride, T - k0, dk, scales, D);
    store_rows(dqkv + own + G * D, stride, T - k0, dv, ones, D);
}

// ---- decoding ---------------------------------------------------------------------------------------------------

constexpr int DECODE_WARPS = 4, DECODE_THREADS = DECODE_WARPS * WARP;
constexpr int AHEAD = 4;         // keys that a warp has under way
constexpr int DECODE_KEYS = 128; // the fewest keys worth a block of their own

// The keys that token `place` of a sequence sees, and how they are divided among at most `splits` blocks: where
// sequences are is known on the device alone, so that a recorded launch serves them all.
struct Share {
    int first, end, chunk;

    __device__ __forceinline__ Share(int place, int window, int splits)
        : first(max(0, place + 1 - window)), end(place + 1),
          chunk(splits > 1 ? max(DECODE_KEYS, (end - first + splits - 1) / splits) : end - first) {}

    __device__ __forceinline__ int blocks() const { return (end - first + chunk - 1) / chunk; }
};

// keys, values (B,maxT,G D) hold positions[b] tokens and get those of qkv (B,T,(H + 2 G) D); out (B,T,H D) is the
// attention of the new ones. Block (i, split) has query i = (b H + h) T + t and a share of its keys; its warps take
// AHEAD of them in turn, a lane every 32nd channel. New keys are read from qkv, so it does not matter when the cache
// gets them. With several splits each that has keys leaves its sums (D of them, maximum, denominator) in `partial` for
// `decode_combine`. Neighbouring blocks read the keys of one head, which L2 holds for them.
template <int N>
__device__ __forceinline__ void decode(floatX *out, floatX *keys, floatX *values, float *partial, const floatX *qkv,
                                       const int *positions, int T, int max_T, int H, int G, int D, int window,
                                       float scale, float softcap) {
    SHARED(float, shared);
    float *sums = shared, *tops = sums + DECODE_WARPS * WARP * N, *totals = tops + DECODE_WARPS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, C = G * D; // of a row of the cache
    const int t = blockIdx.x % T, h = blockIdx.x / T % H, b = blockIdx.x / T / H, g = h / (H / G);
    const int position = positions[b];
    const Share share(position + t, window, gridDim.y);
    const int first = share.first + blockIdx.y * share.chunk, end = min(share.end, first + share.chunk);
    if (first >= end) return;
    const Scores scores(scale, softcap);
    const float c = scores.outer * LOG2E;
    const long long token = (long long)b * T + t, stride = (long long)(H + 2 * G) * D;
    const floatX *query = qkv + token * stride + h * D, *fresh = qkv + b * T * stride + (H + g) * D;
    floatX *old_keys = keys + (long long)b * max_T * C + g * D, *old_values = values + (long long)b * max_T * C + g * D;

    if (blockIdx.y == 0 && h % (H / G) == 0)
        for (int d = threadIdx.x; d < D; d += blockDim.x) {
            const long long from = t * stride + d, to = (position + t) * (long long)C + d;
            old_keys[to] = fresh[from];
            old_values[to] = fresh[from + C];
        }
    float q[N], sum[N], largest = -INFINITY, total = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int d = lane + WARP * n;
        q[n] = d < D ? to_float(query[d]) : 0.0f;
        sum[n] = 0.0f;
    }
    for (int key = first + warp * AHEAD; key < end; key += DECODE_WARPS * AHEAD) {
        float s[AHEAD], v[AHEAD][N], top = largest;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const int row = min(key + u, end - 1);
            const bool old = row < position;
            const floatX *k = old ? old_keys + (long long)row * C : fresh + (row - position) * stride;
            const floatX *from = old ? old_values + (long long)row * C : fresh + (row - position) * stride + C;
            float dot = 0.0f;
#pragma unroll
            for (int n = 0; n < N; n++) {
                const int d = lane + WARP * n;
                dot = fmaf(q[n], d < D ? to_float(k[d]) : 0.0f, dot);
                v[u][n] = d < D ? to_float(from[d]) : 0.0f;
            }
            s[u] = dot;
        }
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            s[u] = scores.squash(warp_sum(s[u]));
            if (key + u >= end) s[u] = -INFINITY;
            top = fmaxf(top, s[u]);
        }
        const float keep = exp2_approx((largest - top) * c);
        largest = top;
        total *= keep;
#pragma unroll
        for (int n = 0; n < N; n++) sum[n] *= keep;
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            const float p = exp2_approx(fmaf(s[u], c, -(top * c)));
            total += p;
#pragma unroll
            for (int n = 0; n < N; n++) sum[n] = fmaf(p, v[u][n], sum[n]);
        }
    }

#pragma unroll
    for (int n = 0; n < N; n++) sums[(warp * N + n) * WARP + lane] = sum[n];
    if (lane == 0) tops[warp] = largest, totals[warp] = total;
    __syncthreads();
    float top = tops[0], l = 0.0f, weights[DECODE_WARPS];
    for (int w = 1; w < DECODE_WARPS; w++) top = fmaxf(top, tops[w]);
#pragma unroll
    for (int w = 0; w < DECODE_WARPS; w++) {
        weights[w] = tops[w] > -INFINITY ? exp2_approx((tops[w] - top) * c) : 0.0f; // 0: it had no key
        l += weights[w] * totals[w];
    }
    float *left = partial + ((long long)blockIdx.x * gridDim.y + blockIdx.y) * (D + 2);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; w++) x = fmaf(weights[w], sums[w * N * WARP + d], x);
        if (gridDim.y == 1)
            out[(token * H + h) * D + d] = from_float<floatX>(x / l);
        else
            left[d] = x;
    }
    if (gridDim.y > 1 && threadIdx.x == 0) left[D] = top, left[D + 1] = l;
}

} // namespace

// ---- one kernel for heads of up to 64, 128 and 256 channels -----------------------------------------------------

// BLOCKS is how many the 227 KB of shared memory of an H100's SM hold; registers are not to be what allows fewer.

#define FORWARD(WIDEST, BLOCKS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        attention_forward_##WIDEST(floatX *out, float *lse, const floatX *qkv, int T, int H, int G, int heads, int D,  \
                                   int window, float scale, float softcap) {                                           \
        forward<WIDEST>(out, lse, qkv, T, H, G, heads, D, window, scale, softcap);                                     \
    }

#define BACKWARD(WIDEST, BLOCKS)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_backward_queries_##WIDEST(                 \
        floatX *dqkv, float *delta, const floatX *dout, const floatX *qkv, const floatX *out, const float *lse, int T, \
        int H, int G, int heads, int D, int window, float scale, float softcap) {                                      \
        backward_queries<WIDEST>(dqkv, delta, dout, qkv, out, lse, T, H, G, heads, D, window, scale, softcap);         \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) attention_backward_keys_##WIDEST(                    \
        floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const float *delta, int T, int H,       \
        int G, int heads, int D, int window, float scale, float softcap) {                                             \
        backward_keys<WIDEST>(dqkv, dout, qkv, lse, delta, T, H, G, heads, D, window, scale, softcap);                 \
    }

#define DECODE(WIDEST)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS) attention_decode_##WIDEST(                            \
        floatX *out, floatX *keys, floatX *values, float *partial, const floatX *qkv, const int *positions, int T,     \
        int max_T, int H, int G, int D, int window, float scale, float softcap) {                                      \
        decode<WIDEST / WARP>(out, keys, values, partial, qkv, positions, T, max_T, H, G, D, window, scale, softcap);  \
    }

FORWARD(64, 7)
FORWARD(128, 4)
FORWARD(256, 4)
BACKWARD(64, 5)
BACKWARD(128, 3)
BACKWARD(256, 3)
DECODE(64)
DECODE(128)
DECODE(256)

// out = the weighted mean of what those of `splits` blocks of `decode` that had keys have left, in their order; a block
// for each query.
extern "C" __global__ void attention_decode_combine(floatX *out, const float *partial, const int *positions, int T,
                                                    int H, int D, int window, int splits, float scale, float softcap) {
    const int t = blockIdx.x % T, h = blockIdx.x / T % H, b = blockIdx.x / T / H;
    const int count = Share(positions[b] + t, window, splits).blocks();
    const float c = Scores(scale, softcap).outer * LOG2E;
    const float *left = partial + (long long)blockIdx.x * splits * (D + 2);
    float top = -INFINITY;
    for (int split = 0; split < count; split++) top = fmaxf(top, left[split * (D + 2) + D]);
    for (int d = threadIdx.x; d < D; d += blockDim.x) {
        float x = 0.0f, l = 0.0f;
        for (int split = 0; split < count; split++) {
            const float *from = left + split * (D + 2);
            const float weight = exp2_approx((from[D] - top) * c);
            x = fmaf(weight, from[d], x);
            l = fmaf(weight, from[D + 1], l);
        }
        out[(((long long)b * T + t) * H + h) * D + d] = from_float<floatX>(x / l);
    }
}
