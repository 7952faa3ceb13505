// Products of row-major matrices, and the sums of columns that a bias's gradient is.
//
//     out (M,N) = finish(alpha op(a) (M,K) op(b) (K,N) + beta out)
//
// A block of 256 threads owns 128 x 128 elements of out and walks along K in steps of 16 (float32) or 32 (bfloat16).  A
// step's tiles of a and b lie in shared memory, a ring of STAGES of them, so that the next ones come while this one is
// multiplied: with FMA from registers, or with mma.sync.  Sums are float32, along K in order; what is beyond an edge
// counts as 0.  Any leading dimension and alignment will do; where rows begin at multiples of 16 bytes they come 16
// bytes at a time.

#include "gelu.cuh"

constexpr int BM = 128, BN = 128, THREADS = 256; // the tile of out, and who computes it
constexpr int CHUNK = PACK;                      // elements that are copied at once: 16 bytes
constexpr int BAND = 8;                          // tiles of out, along M, that are made one after another

// What happens to a sum before it is stored; the numbers are linear.py's.
enum Finish {
    PLAIN = 0,
    GELU = 1,  // aux = x as stored, out = gelu(aux)
    DGELU = 2, // out = x gelu'(aux)
};

struct Output {
    void *out; // float32 if `single`, else of the storage type
    const floatX *bias;
    floatX *aux; // (M,N), dense
    int M, N;
    long long ld;
    int finish, beta, single;
    float alpha;
};

// Pairs, which is what a thread has side by side after mma.sync.
__device__ __forceinline__ void load(float (&v)[2], const bf16 *p) {
    unsigned word = *reinterpret_cast<const unsigned *>(p);
    v[0] = __uint_as_float(word << 16), v[1] = __uint_as_float(word & 0xFFFF0000u);
}
__device__ __forceinline__ void load(float (&v)[2], const float *p) {
    float2 word = *reinterpret_cast<const float2 *>(p);
    v[0] = word.x, v[1] = word.y;
}
__device__ __forceinline__ void store(bf16 *p, const float (&v)[2]) {
    *reinterpret_cast<unsigned *>(p) = pack_bf16(v[0], v[1]);
}
__device__ __forceinline__ void store(float *p, const float (&v)[2]) {
    *reinterpret_cast<float2 *>(p) = make_float2(v[0], v[1]);
}

// Whether W elements from any multiple of W on, in any row, can be read at once.
template <int W, typename T> __device__ __forceinline__ bool wide(const T *x, long long ld) {
    return reinterpret_cast<unsigned long long>(x) % (W * sizeof(T)) == 0 && ld % W == 0;
}

// W elements of row m from column n on, a multiple of W; those from N on do not exist, and read as 0.
template <int W, typename T>
__device__ __forceinline__ void read(float (&v)[W], const T *x, long long ld, int m, int n, int N) {
    const T *p = x + m * ld + n;
    if (n + W <= N && wide<W>(x, ld)) {
        load(v, p);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = n + i < N ? to_float(p[i]) : 0.0f;
    }
}

template <int W, typename T>
__device__ __forceinline__ void write(T *x, long long ld, int m, int n, int N, const float (&v)[W]) {
    T *p = x + m * ld + n;
    if (n + W <= N && wide<W>(x, ld)) {
        store(p, v);
    } else {
#pragma unroll
        for (int i = 0; i < W; i++)
            if (n + i < N) p[i] = from_float<T>(v[i]);
    }
}

// out[m, n .. n+W-1] from the sums x.  Reads bias, aux or the old out, writes aux and out: each element once.
template <int W> __device__ __forceinline__ void finish(const Output &o, int m, int n, float (&x)[W]) {
    if (m >= o.M || n >= o.N) return;
#pragma unroll
    for (int i = 0; i < W; i++) x[i] *= o.alpha;
    if (o.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < W; i++) x[i] += n + i < o.N ? to_float(o.bias[n + i]) : 0.0f;
    }
    if (o.beta) {
        float old[W];
        if (o.single)
            read(old, static_cast<const float *>(o.out), o.ld, m, n, o.N);
        else
            read(old, static_cast<const floatX *>(o.out), o.ld, m, n, o.N);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] += old[i];
    }
    if (o.finish == GELU) {
        write(o.aux, o.N, m, n, o.N, x);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = gelu(as_stored<floatX>(x[i]));
    } else if (o.finish == DGELU) {
        float pre[W];
        read(pre, o.aux, o.N, m, n, o.N);
#pragma unroll
        for (int i = 0; i < W; i++) x[i] *= gelu_slope(pre[i]);
    }
    if (o.single)
        write(static_cast<float *>(o.out), o.ld, m, n, o.N, x);
    else
        write(static_cast<floatX *>(o.out), o.ld, m, n, o.N, x);
}

// A matrix in memory: `rows` of `cols` elements, `ld` from one to the next.
struct Matrix {
    const floatX *x;
    long long ld;
    int rows, cols;
    bool aligned; // every row begins at a multiple of 16 bytes
};

__device__ __forceinline__ Matrix matrix(const floatX *x, long long ld, int rows, int cols) {
    return Matrix{x, ld, rows, cols, wide<CHUNK>(x, ld)};
}

#if STORAGE_BF16

// ---- bfloat16: tiles as they lie in memory, mma.sync --------------------------------------------
//
// A tile whose rows run along K is 128 x 32, one whose rows run along M or N is 32 x 128; ldmatrix transposes the
// latter on the way to the registers.  Rows are padded by 16 bytes, so that the 8 rows that ldmatrix reads lie in
// different banks. The 8 warps lie 2 x 4 over the tile of out; each owns 64 x 32 of it, as 4 x 4 products of 16 x 8.

constexpr int BK = 32, STAGES = 3, PAD = 8;
constexpr int ALONG_K = BK + PAD, ACROSS_K = BM + PAD; // strides of the two kinds of rows
constexpr int TILE = BM * ALONG_K;                     // elements; the larger of the two
static_assert(TILE >= BK * ACROSS_K && BM == BN, "either kind fits");
constexpr int WARP_M = 64, WARP_N = 32;

// Begins to copy ROWS x COLS elements from (row, col) on into a tile of that stride.
template <int ROWS, int COLS, int STRIDE>
__device__ __forceinline__ void copy_tile(floatX *tile, const Matrix &m, int row, int col) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * COLS / CHUNK; i += THREADS) {
        int r = i / (COLS / CHUNK), c = i % (COLS / CHUNK) * CHUNK;
        int left = row + r < m.rows ? min(CHUNK, max(0, m.cols - col - c)) : 0;
        floatX *to = tile + r * STRIDE + c;
        const floatX *from = left > 0 ? m.x + (row + r) * m.ld + col + c : m.x;
        if (m.aligned) {
            cp_async_16(to, from, left * static_cast<int>(sizeof(floatX)));
        } else {
#pragma unroll
            for (int j = 0; j < CHUNK; j++) to[j] = j < left ? from[j] : floatX{0};
        }
    }
}

// Tile number t along K of op(a), for rows m0 on, or of op(b), for columns m0 on; `across`: K runs over its rows.
template <bool ACROSS> __device__ __forceinline__ void copy_operand(floatX *tile, const Matrix &m, int m0, int t) {
    if (ACROSS)
        copy_tile<BK, BM, ACROSS_K>(tile, m, t * BK, m0);
    else
        copy_tile<BM, BK, ALONG_K>(tile, m, m0, t * BK);
}

// Four 8 x 8 blocks of a tile for mma_bf16: rows (of M or N) from m on and k from k on, the blocks `first` and `second`
// apart by 8 along M or N for bit 0 of their number, along K for bit 1 (or the other way round if `swapped`).
template <bool ACROSS, bool SWAPPED>
__device__ __forceinline__ void fragment(unsigned (&r)[4], const floatX *tile, int m, int k) {
    int lane = threadIdx.x % WARP, block = lane / 8;
    m += (SWAPPED ? block / 2 : block % 2) * 8;
    k += (SWAPPED ? block % 2 : block / 2) * 8;
    if (ACROSS)
        ldmatrix_x4_trans(r, tile + (k + lane % 8) * ACROSS_K + m);
    else
        ldmatrix_x4(r, tile + (m + lane % 8) * ALONG_K + k);
}

// Closes a step's copies, if only with an empty group, so that groups and steps count alike; waits for the oldest.
__device__ __forceinline__ void end_copy() { cp_async_commit(); }
__device__ __forceinline__ void await_copy() { cp_async_wait<STAGES - 2>(); }

typedef float Sums[WARP_M / 16][WARP_N / 8][4];

template <bool TA, bool TB> __device__ __forceinline__ void multiply(Sums &sums, const floatX *a, const floatX *b) {
    int warp = threadIdx.x / WARP, m0 = warp / (BN / WARP_N) * WARP_M, n0 = warp % (BN / WARP_N) * WARP_N;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
        unsigned left[WARP_M / 16][4], right[WARP_N / 16][4];
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++) fragment<TA, false>(left[i], a, m0 + 16 * i, k);
#pragma unroll
        for (int j = 0; j < WARP_N / 16; j++) fragment<!TB, true>(right[j], b, n0 + 16 * j, k);
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
            for (int j = 0; j < WARP_N / 8; j++)
                mma_bf16(sums[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        }
    }
}

__device__ __forceinline__ void finish_all(const Output &o, int m0, int n0, Sums &sums) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int m = m0 + warp / (BN / WARP_N) * WARP_M + lane / 4, n = n0 + warp % (BN / WARP_N) * WARP_N + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < WARP_M / 16; i++) {
#pragma unroll
        for (int j = 0; j < WARP_N / 8; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x[2] = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
                finish(o, m + 16 * i + 8 * half, n + 8 * j, x);
            }
        }
    }
}

#else

// ---- float32: tiles with K over their rows, FMA -------------------------------------------------
//
// Thread (y, x) of 16 x 16 owns rows 4y .. 4y+3 and 64 + 4y .. of out, columns alike: of a row of a tile a warp reads
// neighbouring 16 bytes.  Rows are padded by 16 bytes for those that write a tile transposed.

constexpr int BK = 16, STAGES = 2, PAD = 4;
constexpr int ROW = BM + PAD, TILE = BK * ROW;
static_assert(BM == BN, "one kind of tile");

template <bool ACROSS> __device__ __forceinline__ void copy_operand(floatX *tile, const Matrix &m, int m0, int t) {
    constexpr int COLS = ACROSS ? BM : BK; // of the piece in memory
    int row = ACROSS ? t * BK : m0, col = ACROSS ? m0 : t * BK;
#pragma unroll
    for (int i = threadIdx.x; i < BM * BK / CHUNK; i += THREADS) {
        int r = i / (COLS / CHUNK), c = i % (COLS / CHUNK) * CHUNK;
        int left = row + r < m.rows ? m.cols - col - c : 0;
        const floatX *from = left > 0 ? m.x + (row + r) * m.ld + col + c : m.x;
        float v[CHUNK];
        if (m.aligned && left >= CHUNK) {
            load(v, from);
        } else {
#pragma unroll
            for (int j = 0; j < CHUNK; j++) v[j] = j < left ? from[j] : 0.0f;
        }
        if (ACROSS) {
            store(tile + r * ROW + c, v);
        } else {
#pragma unroll
            for (int j = 0; j < CHUNK; j++) tile[(c + j) * ROW + r] = v[j];
        }
    }
}

// Stores are done in order: there is nothing to wait for but the barrier.
__device__ __forceinline__ void end_copy() {}
__device__ __forceinline__ void await_copy() {}

typedef float Sums[8][8];

template <bool TA, bool TB> __device__ __forceinline__ void multiply(Sums &sums, const floatX *a, const floatX *b) {
    int y = threadIdx.x / 16 * 4, x = threadIdx.x % 16 * 4;
#pragma unroll
    for (int k = 0; k < BK; k++) {
        float left[8], right[8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[4];
            load(v, a + k * ROW + y + 64 * half);
#pragma unroll
            for (int i = 0; i < 4; i++) left[4 * half + i] = v[i];
            load(v, b + k * ROW + x + 64 * half);
#pragma unroll
            for (int i = 0; i < 4; i++) right[4 * half + i] = v[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
        }
    }
}

__device__ __forceinline__ void finish_all(const Output &o, int m0, int n0, Sums &sums) {
    int m = m0 + threadIdx.x / 16 * 4, n = n0 + threadIdx.x % 16 * 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float x[4];
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] = sums[i][4 * half + j];
            finish(o, m + i / 4 * 64 + i % 4, n + 64 * half, x);
        }
    }
}

#endif

// ---- the walk along K ---------------------------------------------------------------------------

template <bool TA, bool TB>
__device__ __forceinline__ void product(floatX *shared, const Output &o, const Matrix &a, const Matrix &b, int K) {
    // Blocks work in the order of their numbers; by columns of BAND tiles those at work together share tiles of b, too.
    int number = blockIdx.y * gridDim.x + blockIdx.x, band = number / (BAND * gridDim.x) * BAND;
    int height = min(BAND, static_cast<int>(gridDim.y) - band), place = number - band * gridDim.x;
    int m0 = (band + place % height) * BM, n0 = place / height * BN, steps = (K + BK - 1) / BK;
    Sums sums = {};
    auto copy = [&](int t) {
        floatX *tiles = shared + t % STAGES * 2 * TILE;
        if (t < steps) {
            copy_operand<TA>(tiles, a, m0, t);
            copy_operand<!TB>(tiles + TILE, b, n0, t);
        }
        end_copy();
    };
    for (int t = 0; t < STAGES - 1; t++) copy(t);
    for (int t = 0; t < steps; t++) {
        await_copy();
        __syncthreads(); // step t is there for all, and what step t - 1 lay in has been read by all
        copy(t + STAGES - 1);
        const floatX *tiles = shared + t % STAGES * 2 * TILE;
        multiply<TA, TB>(sums, tiles, tiles + TILE);
    }
    finish_all(o, m0, n0, sums);
}

// a is (M,K) in memory or, transposed, (K,M); b is (K,N) or (N,K).  Grid: blocks of out along N, along M.
#define GEMM(NAME, TA, TB)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        NAME(void *out, const floatX *a, const floatX *b, const floatX *bias, floatX *aux, int M, int N, int K,        \
             long long lda, long long ldb, long long ldo, int finish, int beta, int single, float alpha) {             \
        SHARED(floatX, shared);                                                                                        \
        Output o = {out, bias, aux, M, N, ldo, finish, beta, single, alpha};                                           \
        Matrix left = TA ? matrix(a, lda, K, M) : matrix(a, lda, M, K);                                                \
        Matrix right = TB ? matrix(b, ldb, N, K) : matrix(b, ldb, K, N);                                               \
        product<TA, TB>(shared, o, left, right, K);                                                                    \
    }

GEMM(gemm_nn, false, false)
GEMM(gemm_nt, false, true)
GEMM(gemm_tn, true, false)
GEMM(gemm_tt, true, true)

// ---- sums of columns ----------------------------------------------------------------------------

// partial[c, n] = sum of x[m, n] over the `rows` rows of chunk c, for n < N.  x (M,ld): the columns from x on.
//
// A warp reads rows w, w + 8, ... of its chunk, each lane PACK columns; the 8 warps' sums are added in order.
// Grid: strips of 32 PACK columns, chunks.  Reads x once, writes partial.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_partials(float *partial, const floatX *x, int M, int N, long long ld, int rows) {
    __shared__ float sums[THREADS / WARP][WARP * PACK];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int n = blockIdx.x * WARP * PACK + lane * PACK, stop = min(M, static_cast<int>(blockIdx.y + 1) * rows);
    int first = blockIdx.y * rows + warp;
    float total[PACK] = {};
    auto add = [&](const float(&v)[PACK]) {
#pragma unroll
        for (int i = 0; i < PACK; i++) total[i] += v[i];
    };
    if (n + PACK <= N && wide<PACK>(x, ld)) {
#pragma unroll 4
        for (int m = first; m < stop; m += THREADS / WARP) {
            float v[PACK];
            load(v, x + m * ld + n);
            add(v);
        }
    } else if (n < N) {
        for (int m = first; m < stop; m += THREADS / WARP) {
            float v[PACK];
            read(v, x, ld, m, n, N);
            add(v);
        }
    }
    store(&sums[warp][lane * PACK], total);
    __syncthreads();
    for (int i = threadIdx.x; i < WARP * PACK; i += THREADS) {
        float sum = 0.0f;
        for (int w = 0; w < THREADS / WARP; w++) sum += sums[w][i];
        int column = blockIdx.x * WARP * PACK + i;
        if (column < N) partial[static_cast<long long>(blockIdx.y) * N + column] = sum;
    }
}

// out[n] (+)= sum over c of partial[c, n]: warp w adds chunks w, w + 8, ..., then the 8 warps' sums are added in order.
// Grid: strips of 32 columns.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_totals(floatX *out, const float *partial, int N, int chunks, int accumulate) {
    __shared__ float sums[THREADS / WARP][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n = blockIdx.x * WARP + lane;
    float total = 0.0f;
    if (n < N) {
        for (int c = warp; c < chunks; c += THREADS / WARP) total += partial[static_cast<long long>(c) * N + n];
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && n < N) {
        total = accumulate ? to_float(out[n]) : 0.0f;
        for (int w = 0; w < THREADS / WARP; w++) total += sums[w][lane];
        out[n] = from_float<floatX>(total);
    }
}
