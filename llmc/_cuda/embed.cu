// Token and position embedding: out[b,t] = scale wte[tokens[b,t]] + wpe[positions[b] + t], the second term if there is
// a wpe.
//
// Backward adds to a row of dwte, times scale, every row of dout that has its token.  No atomics on numbers: the tokens
// are sorted, each with its place, by a stable radix sort in the stream; then the rows of a token lie one after
// another, in the order of their places, and every one is summed by who owns it.
//
// Kernels whose names end in _any take every width and every alignment, one element at a time.
#include "common.cuh"

constexpr int DIGITS = 256; // of 8 bits
constexpr int TILE = 512;   // tokens that a block of the sort handles
constexpr int PARTS = 4;    // of all tiles, for the sums over them
constexpr int ROWS = 32;    // sorted rows that a block sums
constexpr int AHEAD = 4;    // rows that are loaded at a time
constexpr int OFFSETS_THREADS = DIGITS * PARTS;

// A block of (32, y) threads: a warp for each token.
template <int N, bool PLACED>
__device__ __forceinline__ void forward(floatX *__restrict__ out, const int *__restrict__ tokens, const int *positions,
                                        const floatX *__restrict__ wte, const floatX *__restrict__ wpe, int n, int T,
                                        int C, float scale) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= n) return;
    wte += static_cast<size_t>(tokens[row]) * C;
    if (PLACED) wpe += static_cast<size_t>(positions[row / T] + row % T) * C;
    out += static_cast<size_t>(row) * C;
#pragma unroll 4
    for (int i = threadIdx.x * N; i < C; i += WARP * N) {
        float word[N], place[N];
        load<N>(word, wte + i);
        if (PLACED) load<N>(place, wpe + i);
#pragma unroll
        for (int j = 0; j < N; j++) word[j] = PLACED ? scale * word[j] + place[j] : scale * word[j];
        store<N>(out + i, word);
    }
}

#define FORWARD(name, width, placed)                                                                                   \
    extern "C" __global__ void name(floatX *out, const int *tokens, const int *positions, const floatX *wte,           \
                                    const floatX *wpe, int n, int T, int C, float scale) {                             \
        forward<width, placed>(out, tokens, positions, wte, wpe, n, T, C, scale);                                      \
    }

FORWARD(embedding_forward, PACK, true)
FORWARD(embedding_forward_any, 1, true)
FORWARD(embedding_words, PACK, false)
FORWARD(embedding_words_any, 1, false)

// ---- the sort: pairs (token, place), 8 bits of the token a pass, from the lowest -----------------------------------

// Pair i of a pass: of the last one's, or of the tokens themselves.
__device__ __forceinline__ int2 pair_at(const int *tokens, const int2 *pairs, int i) {
    return pairs ? pairs[i] : make_int2(tokens[i], i);
}

// A tile's pairs and digits into shared memory, by DIGITS threads; gives their number.  What is missing has no digit.
__device__ __forceinline__ int read_tile(int2 *tile, short *digits, const int *tokens, const int2 *pairs, int n,
                                         int shift) {
    int begin = blockIdx.x * TILE, count = min(TILE, n - begin);
    for (int i = threadIdx.x; i < count; i += DIGITS) {
        tile[i] = pair_at(tokens, pairs, begin + i);
        digits[i] = static_cast<short>(tile[i].x >> shift & (DIGITS - 1));
    }
    __syncthreads();
    return count;
}

// counts[tile][digit].  Every thread counts one digit: all read the same digit at a time, which costs one access.
extern "C" __global__ void __launch_bounds__(DIGITS)
    digit_counts(int *counts, const int *tokens, const int2 *pairs, int n, int shift) {
    __shared__ int2 tile[TILE];
    __shared__ short digits[TILE];
    int count = read_tile(tile, digits, tokens, pairs, n, shift), found = 0;
#pragma unroll 8
    for (int i = 0; i < count; i++) found += digits[i] == threadIdx.x;
    counts[blockIdx.x * DIGITS + threadIdx.x] = found;
}

// counts[tile][digit] becomes the place of the first such pair of the tile: after all of lower digits, and those of
// this digit in earlier tiles.  One block of (DIGITS, PARTS) threads, a part of the tiles to each row.
extern "C" __global__ void __launch_bounds__(OFFSETS_THREADS) digit_offsets(int *counts, int tiles) {
    __shared__ int sums[PARTS][DIGITS];
    __shared__ int before[DIGITS];
    int digit = threadIdx.x, part = threadIdx.y, size = (tiles + PARTS - 1) / PARTS;
    int begin = min(part * size, tiles), end = min(begin + size, tiles);
    int sum = 0;
#pragma unroll 8
    for (int i = begin; i < end; i++) sum += counts[i * DIGITS + digit];
    sums[part][digit] = sum;
    __syncthreads();
    int total = 0, place = 0;
    for (int i = 0; i < PARTS; i++) {
        if (i < part) place += sums[i][digit];
        total += sums[i][digit];
    }
    if (part == 0) before[digit] = total;
    __syncthreads();
    for (int step = 1; step < DIGITS; step *= 2) { // an inclusive sum over digits
        int lower = digit >= step ? before[digit - step] : 0;
        __syncthreads();
        if (part == 0) before[digit] += lower;
        __syncthreads();
    }
    place += before[digit] - total;
#pragma unroll 8
    for (int i = begin; i < end; i++) {
        int here = counts[i * DIGITS + digit];
        counts[i * DIGITS + digit] = place;
        place += here;
    }
}

// Every pair to its place: each thread puts those of its digit, in order.
extern "C" __global__ void __launch_bounds__(DIGITS)
    digit_scatter(int2 *sorted, const int *offsets, const int *tokens, const int2 *pairs, int n, int shift) {
    __shared__ int2 tile[TILE];
    __shared__ short digits[TILE];
    int count = read_tile(tile, digits, tokens, pairs, n, shift);
    int place = offsets[blockIdx.x * DIGITS + threadIdx.x];
#pragma unroll 8
    for (int i = 0; i < count; i++)
        if (digits[i] == threadIdx.x) sorted[place++] = tile[i];
}

// ---- the sums ------------------------------------------------------------------------------------------------------

// dwte[token] += scale times the sum of dout's rows with this token, where they all lie among the block's ROWS sorted
// ones.  Of a token whose rows lie in several blocks, each leaves its part of the sum in partial (blocks, 2, C): the
// block that has the first in its row 1, the others in their row 0.  `tile` has room for ROWS + 2 pairs.
//
// Bytes moved: C each row, 2 C each token's.
template <int N>
__device__ __forceinline__ void sum_rows(floatX *dwte, float *partial, const floatX *__restrict__ dout,
                                         const int2 *sorted, int n, int C, float scale, int2 *tile) {
    int begin = blockIdx.x * ROWS, count = min(ROWS, n - begin);
    for (int i = threadIdx.x; i < ROWS + 2; i += blockDim.x) {
        int place = begin + i - 1;
        tile[i] = 0 <= place && place < n ? sorted[place] : make_int2(-1, 0); // row 0 may be read, and is not used
    }
    __syncthreads();
    partial += static_cast<size_t>(blockIdx.x) * 2 * C;
    for (int c = threadIdx.x * N; c < C; c += blockDim.x * N) {
        float sum[N];
        bool all = tile[0].x != tile[1].x; // whether the first of this token is here
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] = 0.0f;
        for (int first = 0; first < count; first += AHEAD) {
            float d[AHEAD][N];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) load<N>(d[k], dout + static_cast<size_t>(tile[first + k + 1].y) * C + c);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                int i = first + k + 1;
                if (i > count) break;
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] += d[k][j];
                bool last = tile[i].x != tile[i + 1].x;
                if (!last && i < count) continue;
                if (all && last) {
                    floatX *row = dwte + static_cast<size_t>(tile[i].x) * C + c;
                    float before[N];
                    load<N>(before, row);
#pragma unroll
                    for (int j = 0; j < N; j++) before[j] += scale * sum[j];
                    store<N>(row, before);
                } else {
                    store<N>(partial + (all ? C : 0) + c, sum);
                }
                all = true;
#pragma unroll
                for (int j = 0; j < N; j++) sum[j] = 0.0f;
            }
        }
    }
}

extern "C" __global__ void embedding_rows(floatX *dwte, float *partial, const floatX *dout, const int2 *sorted, int n,
                                          int C, float scale) {
    __shared__ int2 tile[ROWS + 2];
    sum_rows<PACK>(dwte, partial, dout, sorted, n, C, scale, tile);
}

extern "C" __global__ void embedding_rows_any(floatX *dwte, float *partial, const floatX *dout, const int2 *sorted,
                                              int n, int C, float scale) {
    __shared__ int2 tile[ROWS + 2];
    sum_rows<1>(dwte, partial, dout, sorted, n, C, scale, tile);
}

// dwte[token] += scale times the parts of its sum, in order, for a token whose rows lie in several blocks of the above:
// the block of the first of them.
extern "C" __global__ void embedding_combine(floatX *dwte, const float *partial, const int2 *sorted, int n, int C,
                                             float scale) {
    int begin = blockIdx.x * ROWS, next = begin + ROWS;
    if (next >= n) return;
    int token = sorted[next].x;
    if (sorted[next - 1].x != token || (begin > 0 && sorted[begin - 1].x == token)) return;
    int end = blockIdx.x + 1; // the last block that has some: the one after which they do not go on
    for (;;) {
        long long after = (static_cast<long long>(end) + threadIdx.x % WARP + 1) * ROWS;
        unsigned on = __ballot_sync(ALL_LANES, after < n && sorted[after].x == token);
        int more = on == ALL_LANES ? WARP : __ffs(~on) - 1;
        end += more;
        if (more < WARP) break;
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        float sum = partial[(static_cast<size_t>(blockIdx.x) * 2 + 1) * C + c];
#pragma unroll 8
        for (int i = blockIdx.x + 1; i <= end; i++) sum += partial[static_cast<size_t>(i) * 2 * C + c];
        floatX *out = dwte + static_cast<size_t>(token) * C + c;
        *out = from_float<floatX>(to_float(*out) + scale * sum);
    }
}

// dwpe[t] (+)= the sum over b of dout[b,t], in order.  A block of (32, y) threads has y rows of dwpe and 32 N columns.
template <int N>
__device__ __forceinline__ void sum_positions(floatX *dwpe, const floatX *__restrict__ dout, int B, int T, int max_T,
                                              int C, int accumulate) {
    int t = blockIdx.x * blockDim.y + threadIdx.y, c = (blockIdx.y * WARP + threadIdx.x) * N;
    if (t >= max_T || c >= C || (accumulate && t >= T)) return;
    float sum[N];
#pragma unroll
    for (int j = 0; j < N; j++) sum[j] = 0.0f;
    if (t < T) {
#pragma unroll 8
        for (int b = 0; b < B; b++) {
            float d[N];
            load<N>(d, dout + (static_cast<size_t>(b) * T + t) * C + c);
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += d[j];
        }
    }
    floatX *row = dwpe + static_cast<size_t>(t) * C + c;
    if (accumulate) {
        float before[N];
        load<N>(before, row);
#pragma unroll
        for (int j = 0; j < N; j++) sum[j] += before[j];
    }
    store<N>(row, sum);
}

extern "C" __global__ void embedding_positions(floatX *dwpe, const floatX *dout, int B, int T, int max_T, int C,
                                               int accumulate) {
    sum_positions<PACK>(dwpe, dout, B, T, max_T, C, accumulate);
}

extern "C" __global__ void embedding_positions_any(floatX *dwpe, const floatX *dout, int B, int T, int max_T, int C,
                                                   int accumulate) {
    sum_positions<1>(dwpe, dout, B, T, max_T, C, accumulate);
}
