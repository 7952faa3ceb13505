// The head beside its products: softmax and cross-entropy of a chunk's logits, which become their own gradient in
// place.
#include "common.cuh"

constexpr int THREADS = 512; // of a row
constexpr int LOADS = 4;     // packs of 16 bytes that a thread reads at a time

// Where a maximum begins: lower than any logit, and neither its distance from one nor its logarithm's base can
// overflow.
constexpr float START = LOWEST / 2;

// e^(x - m).  In bf16 a logit is known to 2^-9 of its size, and what one rounding of the exponent costs does not show.
__device__ __forceinline__ float raised(float x, float m) {
#if STORAGE_BF16
    return exp2_approx(fmaf(x, LOG2E, -m * LOG2E));
#else
    return expf(x - m);
#endif
}

// What becomes of the products: themselves, or softcap * tanh(x / softcap) (Gemma 2), with the derivative
// 1 - tanh^2(x / softcap).
struct Uncapped {
    __device__ __forceinline__ float operator()(float x) const { return x; }
    __device__ __forceinline__ float slope(float) const { return 1.0f; }
};

struct Capped {
    float softcap;

    __device__ __forceinline__ float operator()(float x) const { return softcap * tanhf(x / softcap); }
    __device__ __forceinline__ float slope(float x) const {
        float t = tanhf(x / softcap);
        return 1.0f - t * t;
    }
};

// Begins to copy what the thread reads at a time, its packs from `begin` on, to the same places in `held`.
template <int N> __device__ __forceinline__ void fetch(floatX *held, const floatX *row, int begin, int V) {
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int c = begin + k * THREADS * N;
        if (c < V) cp_async_16(held + c, row + c);
    }
    cp_async_commit();
}

// A row of V products, the `stride` elements of which begin at a multiple of 16 bytes where N > 1.  With logits
// cap(products):
//
//     losses = log(sum of e^logits) - logits[target];
//     products = scale (softmax - onehot(target)) cap'(products), if `train`
//
// Columns from V on are not looked at, and become 0 in training.  One pass finds maximum and sum together: where the
// maximum grows, the sum so far shrinks.  Between the passes the row is in `held`, shared memory for whole packs, of
// which a thread reads those alone that it has copied itself; with null, L2 is to have it, and the second pass begins
// where the first has ended.  (L2 may not: a row of GPT-2 is 100 KB in bf16, those of two blocks on each of 132
// multiprocessors 27 MB, and an H100 has two halves of 25 MB that may both keep a line.)
//
// Bytes moved: C of memory to read and C to write, and without `held` C of L2, for C columns.
template <int N, bool HELD = false, typename Cap>
__device__ __forceinline__ void classify(floatX *logits, float *losses, const int *targets, int V, int stride,
                                         float scale, Cap cap, int train, float *scratch, floatX *held = nullptr) {
    floatX *row = logits + static_cast<size_t>(blockIdx.x) * stride;
    int target = targets[blockIdx.x];
    float product = to_float(row[target]), chosen = cap(product); // before anyone writes: there are barriers in between
    float m = START, sum = 0.0f;
    int step = THREADS * N, chunk = LOADS * step;
    const floatX *from = HELD ? held : row;
    if constexpr (HELD) fetch<N>(held, row, threadIdx.x * N, V);
    for (int begin = threadIdx.x * N; begin < V; begin += chunk) {
        if constexpr (HELD) {
            fetch<N>(held, row, begin + chunk, V);
            cp_async_wait<1>();
        }
        float v[LOADS][N], highest = m;
#pragma unroll
        for (int k = 0; k < LOADS; k++) load_if<N>(v[k], from + begin + k * step, begin + k * step < V);
#pragma unroll
        for (int k = 0; k < LOADS; k++)
#pragma unroll
            for (int j = 0; j < N; j++) v[k][j] = cap(v[k][j]);
        if (begin + (LOADS - 1) * step + N > V) {
#pragma unroll
            for (int k = 0; k < LOADS; k++)
#pragma unroll
                for (int j = 0; j < N; j++)
                    if (begin + k * step + j >= V) v[k][j] = START;
        }
#pragma unroll
        for (int k = 0; k < LOADS; k++)
#pragma unroll
            for (int j = 0; j < N; j++) highest = fmaxf(highest, v[k][j]);
        sum *= raised(m, highest);
        m = highest;
#pragma unroll
        for (int k = 0; k < LOADS; k++)
#pragma unroll
            for (int j = 0; j < N; j++) sum += raised(v[k][j], m);
    }
    float highest = block_reduce<Max>(m, scratch);
    sum = block_sum(sum * raised(m, highest), scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = highest + logf(sum) - chosen;
    if (!train) return;

    float factor = scale / sum;
    for (int begin = (V - 1) / chunk * chunk + threadIdx.x * N; begin >= 0; begin -= chunk) {
        float v[LOADS][N];
#pragma unroll
        for (int k = 0; k < LOADS; k++) load_if<N>(v[k], from + begin + k * step, begin + k * step < V);
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
            int c = begin + k * step;
            if (c >= V) continue;
#pragma unroll
            for (int j = 0; j < N; j++) v[k][j] = raised(cap(v[k][j]), highest) * factor * cap.slope(v[k][j]);
            if (c + N > V) {
#pragma unroll
                for (int j = 0; j < N; j++)
                    if (c + j >= V) v[k][j] = 0.0f;
            }
            store<N>(row + c, v[k]);
        }
    }
    for (int c = (V + N - 1) / N * N + threadIdx.x; c < stride; c += THREADS) row[c] = from_float<floatX>(0.0f);
    if (threadIdx.x == target / N % THREADS) // it has written the rest of this pack
        row[target] = from_float<floatX>((raised(chosen, highest) * factor - scale) * cap.slope(product));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    classifier_held(floatX *logits, float *losses, const int *targets, int V, int stride, float scale, int train) {
    __shared__ float scratch[THREADS / WARP];
    SHARED(floatX, held);
    classify<PACK, true>(logits, losses, targets, V, stride, scale, Uncapped(), train, scratch, held);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    classifier(floatX *logits, float *losses, const int *targets, int V, int stride, float scale, int train) {
    __shared__ float scratch[THREADS / WARP];
    classify<PACK>(logits, losses, targets, V, stride, scale, Uncapped(), train, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    classifier_any(floatX *logits, float *losses, const int *targets, int V, int stride, float scale, int train) {
    __shared__ float scratch[THREADS / WARP];
    classify<1>(logits, losses, targets, V, stride, scale, Uncapped(), train, scratch);
}

// The same with a cap.  Rows of the vocabularies that have one are too long to be held.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    capped_classifier(floatX *logits, float *losses, const int *targets, int V, int stride, float scale, float softcap,
                      int train) {
    __shared__ float scratch[THREADS / WARP];
    classify<PACK>(logits, losses, targets, V, stride, scale, Capped{softcap}, train, scratch);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    capped_classifier_any(floatX *logits, float *losses, const int *targets, int V, int stride, float scale,
                          float softcap, int train) {
    __shared__ float scratch[THREADS / WARP];
    classify<1>(logits, losses, targets, V, stride, scale, Capped{softcap}, train, scratch);
}

// out = softcap * tanh(sums / softcap), rounded once; out may be sums.  They begin where they like.
extern "C" __global__ void cap_logits(floatX *out, const float *sums, long long n, float softcap) {
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) out[i] = from_float<floatX>(Capped{softcap}(sums[i]));
}

// out (+)= sums, rounded once.
extern "C" __global__ void round_sums(floatX *out, const float *sums, long long n, int accumulate) {
    long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * PACK;
    if (i + PACK <= n) {
        float v[PACK], before[PACK];
        load<PACK, Use::ONCE>(v, sums + i);
        if (accumulate) {
            load<PACK>(before, out + i);
#pragma unroll
            for (int j = 0; j < PACK; j++) v[j] += before[j];
        }
        store<PACK>(out + i, v);
    } else {
        for (; i < n; i++) out[i] = from_float<floatX>(accumulate ? to_float(out[i]) + sums[i] : sums[i]);
    }
}

// total (+)= scale times the sum of losses, in double, by one block.
extern "C" __global__ void __launch_bounds__(1024)
    sum_losses(double *total, const float *losses, long long n, double scale, int accumulate) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
#pragma unroll 8
    for (long long i = threadIdx.x; i < n; i += blockDim.x) sum += losses[i];
    sum = scale * block_sum(sum, scratch);
    if (threadIdx.x == 0) *total = accumulate ? *total + sum : sum;
}
