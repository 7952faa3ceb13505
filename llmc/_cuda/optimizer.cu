// AdamW (Loshchilov & Hutter 2019), the norm that clipping needs, and what clipping multiplies by.
//
// Scalars stay on the device: they are float64 and read where they are needed.
#include "common.cuh"

#include "philox.cuh"

// ---- the norm ------------------------------------------------------------------------------------------------------

constexpr int SUM_THREADS = 256;
constexpr int SUM_CHUNK = 16384; // elements whose squares a block sums, whatever the device
constexpr int LOADS = 4;         // packs of 16 bytes that a thread reads at a time

// partial[block] = the sum of x^2 over the block's chunk, in double: products of float32 are exact there.
template <typename T, int N>
__device__ __forceinline__ void square_sum(double *partial, const T *x, long long n, double *scratch) {
    long long begin = static_cast<long long>(blockIdx.x) * SUM_CHUNK;
    double sum = 0.0;
    if (n - begin >= SUM_CHUNK) {
        for (int i = threadIdx.x * N; i < SUM_CHUNK; i += LOADS * SUM_THREADS * N) {
            float v[LOADS][N];
#pragma unroll
            for (int k = 0; k < LOADS; k++) load<N>(v[k], x + begin + i + k * SUM_THREADS * N);
#pragma unroll
            for (int k = 0; k < LOADS; k++)
#pragma unroll
                for (int j = 0; j < N; j++) sum += static_cast<double>(v[k][j]) * v[k][j];
        }
    } else {
        for (long long i = begin + threadIdx.x; i < n; i += SUM_THREADS)
            sum += static_cast<double>(to_float(x[i])) * to_float(x[i]);
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#define SQUARE_SUMS(name, T, N)                                                                                        \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS) name(double *partial, const T *x, long long n) {         \
        __shared__ double scratch[SUM_THREADS / WARP];                                                                 \
        square_sum<T, N>(partial, x, n, scratch);                                                                      \
    }

SQUARE_SUMS(square_sums_single, float, 4)
SQUARE_SUMS(square_sums_single_any, float, 1)
SQUARE_SUMS(square_sums_stored, floatX, PACK)
SQUARE_SUMS(square_sums_stored_any, floatX, 1)

// norm = the root of the sum of all partial ones, by one block.
extern "C" __global__ void __launch_bounds__(1024) norm_of_sums(double *norm, const double *partial, int chunks) {
    __shared__ double scratch[WARP];
    double sum = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x; i < chunks; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *norm = sqrt(sum);
}

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }

extern "C" __global__ void clip_scale(double *scale, const double *norm, const double *loss, double limit) {
    if (!is_finite(*norm) || !is_finite(*loss))
        *scale = *norm - *norm + (*loss - *loss); // nan
    else
        *scale = 0.0 < limit && limit < *norm ? limit / *norm : 1.0;
}

// ---- the update ----------------------------------------------------------------------------------------------------

constexpr int SPANS = 64; // of one launch
constexpr int GROUP = 8;  // elements of a thread: 16 bytes of bf16, and what one call of philox rounds
constexpr int THREADS = 256;

// The elements from start[s] to stop[s] decay by decay[s]; in order and disjoint.
struct Spans {
    long long start[SPANS], stop[SPANS];
    float decay[SPANS];
};

// What a step's scalars come to.  Factors that are differences from 1 are taken in double.
struct Step {
    float lr, scale, beta1, rest1, correction1, beta2, rest2, correction2, eps;

    __device__ __forceinline__ void update(float &w, float &m, float &v, float dw, float decay) const {
        float g = scale * dw;
        m = beta1 * m + rest1 * g;
        v = beta2 * v + rest2 * g * g;
        w -= lr * (m * correction1 / (sqrtf(v * correction2) + eps) + decay * w);
    }
};

// x rounded to bf16, up with a probability of its distance from the lower neighbour: 16 random bits are added below the
// last place, and what is then below it is dropped.  NaN stays NaN.
__device__ __forceinline__ float rounded(float x, unsigned random) {
    unsigned bits = __float_as_uint(x);
    return x != x ? x : __uint_as_float((bits + random) & 0xFFFF0000u);
}

// The 16 bits of element i of a group.
__device__ __forceinline__ unsigned half_word(uint4 w, int i) {
    unsigned word = i < 4 ? (i < 2 ? w.x : w.y) : (i < 6 ? w.z : w.w);
    return i % 2 ? word >> 16 : word & 0xFFFFu;
}

__device__ __forceinline__ float keep(float, float x, uint4, int) { return x; }
__device__ __forceinline__ float keep(bf16, float x, uint4 random, int i) { return rounded(x, half_word(random, i)); }

__device__ __forceinline__ uint4 random_group(float, long long, double, unsigned long long) { return NOTHING; }
__device__ __forceinline__ uint4 random_group(bf16, long long i, double t, unsigned long long seed) {
    unsigned long long g = static_cast<unsigned long long>(i) / GROUP;
    return philox(make_uint4(low_word(g), high_word(g), static_cast<unsigned>(t), 1),
                  make_uint2(low_word(seed), high_word(seed)));
}

// One pass over the vectors, with as many blocks as run at a time: the corrections' powers are taken once in each.
//
// Bytes moved: 28 an element with bf16 and masters (12 for w, m and v either way, 2 for dw and for the copy), or in
// fp32; 22 with a w of bf16.
template <typename W>
__device__ __forceinline__ void adamw(W *w, float *m, float *v, const floatX *dw, floatX *copy, const double *hyper,
                                      const double *scale, double beta1, double beta2, double eps, long long n,
                                      unsigned long long seed, int count, int aligned, const Spans &spans,
                                      Step *shared) {
    double factor = *scale, t = hyper[1];
    if (!is_finite(factor)) return; // nothing is changed
    if (threadIdx.x == 0)
        *shared = {static_cast<float>(hyper[0]),
                   static_cast<float>(factor),
                   static_cast<float>(beta1),
                   static_cast<float>(1.0 - beta1),
                   static_cast<float>(1.0 / (1.0 - pow(beta1, t))),
                   static_cast<float>(beta2),
                   static_cast<float>(1.0 - beta2),
                   static_cast<float>(1.0 / (1.0 - pow(beta2, t))),
                   static_cast<float>(eps)};
    __syncthreads();
    const Step step = *shared;
    long long stride = static_cast<long long>(gridDim.x) * THREADS * GROUP;
    int s = 0;
    for (long long i = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * GROUP; i < n; i += stride) {
        while (s < count && spans.stop[s] <= i) s++;
        if (s == count) return;
        if (aligned && spans.start[s] <= i && i + GROUP <= spans.stop[s]) {
            float w_[GROUP], m_[GROUP], v_[GROUP], dw_[GROUP], decay = spans.decay[s];
            load<GROUP, Use::ONCE>(w_, w + i);
            load<GROUP, Use::ONCE>(m_, m + i);
            load<GROUP, Use::ONCE>(v_, v + i);
            load<GROUP, Use::ONCE>(dw_, dw + i);
            uint4 random = random_group(W(), i, t, seed);
#pragma unroll
            for (int j = 0; j < GROUP; j++) {
                step.update(w_[j], m_[j], v_[j], dw_[j], decay);
                w_[j] = keep(W(), w_[j], random, j);
            }
            store<GROUP, Use::ONCE>(w + i, w_);
            store<GROUP, Use::ONCE>(m + i, m_);
            store<GROUP, Use::ONCE>(v + i, v_);
            if (copy) store<GROUP, Use::ONCE>(copy + i, w_);
            continue;
        }
        uint4 random = random_group(W(), i, t, seed); // a span begins or ends here, or addresses are odd
        int at = s;
        for (int j = 0; j < GROUP; j++) {
            while (at < count && spans.stop[at] <= i + j) at++;
            if (at == count) break;
            if (i + j < spans.start[at]) continue;
            float one = to_float(w[i + j]);
            step.update(one, m[i + j], v[i + j], to_float(dw[i + j]), spans.decay[at]);
            w[i + j] = from_float<W>(keep(W(), one, random, j));
            if (copy) copy[i + j] = from_float<floatX>(to_float(w[i + j]));
        }
    }
}

#define ADAMW(name, W)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        name(W *w, float *m, float *v, const floatX *dw, floatX *copy, const double *hyper, const double *scale,       \
             double beta1, double beta2, double eps, long long n, unsigned long long seed, int count, int aligned,     \
             const __grid_constant__ Spans spans) {                                                                    \
        __shared__ Step step;                                                                                          \
        adamw<W>(w, m, v, dw, copy, hyper, scale, beta1, beta2, eps, n, seed, count, aligned, spans, &step);           \
    }

ADAMW(adamw_step, float)
ADAMW(adamw_step_stored, floatX)
