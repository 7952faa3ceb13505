// GELU in its tanh form (Hendrycks & Gimpel 2016), the residual sum, and copies of another type.
//
// All are one pass over vectors of n elements, LOADS packs of 16 bytes in each thread, all read before any is written.
// The names ending in _any are for addresses that are not multiples of 16 bytes: one element at a time.
#include "gelu.cuh"

constexpr int LOADS = 2;

struct Gelu {
    __device__ __forceinline__ float operator()(float x, float) const { return gelu(x); }
};

struct GeluBackward {
    __device__ __forceinline__ float operator()(float x, float dout) const { return dout * gelu_slope(x); }
};

struct Add {
    __device__ __forceinline__ float operator()(float x, float branch) const { return x + branch; }
};

struct Same {
    __device__ __forceinline__ float operator()(float x, float) const { return x; }
};

// out[i] = f(a[i], b[i]), N elements at a time; without b, f(a[i], 0).  out may be either.
template <int N, bool BOTH, typename F, typename Out, typename In>
__device__ __forceinline__ void map(Out *out, const In *a, const In *b, long long n, F f) {
    int stride = blockDim.x * N;
    long long begin = static_cast<long long>(blockIdx.x) * LOADS * stride + threadIdx.x * N;
    if (begin + (LOADS - 1) * stride + N > n) { // the vector's last block
        for (int k = 0; k < LOADS; k++)
            for (long long i = begin + k * stride; i < begin + k * stride + N && i < n; i++)
                out[i] = from_float<Out>(f(to_float(a[i]), BOTH ? to_float(b[i]) : 0.0f));
        return;
    }
    float va[LOADS][N], vb[LOADS][N];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        load<N>(va[k], a + begin + k * stride);
        if (BOTH) load<N>(vb[k], b + begin + k * stride);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
#pragma unroll
        for (int j = 0; j < N; j++) va[k][j] = f(va[k][j], BOTH ? vb[k][j] : 0.0f);
        store<N>(out + begin + k * stride, va[k]);
    }
}

#define UNARY(name, f, width, Out, In)                                                                                 \
    extern "C" __global__ void name(Out *out, const In *a, long long n) {                                              \
        map<width, false>(out, a, static_cast<const In *>(nullptr), n, f());                                           \
    }

#define BINARY(name, f, width)                                                                                         \
    extern "C" __global__ void name(floatX *out, const floatX *a, const floatX *b, long long n) {                      \
        map<width, true>(out, a, b, n, f());                                                                           \
    }

UNARY(gelu_forward, Gelu, PACK, floatX, floatX)
UNARY(gelu_forward_any, Gelu, 1, floatX, floatX)
BINARY(gelu_backward, GeluBackward, PACK) // a is x, b is dout
BINARY(gelu_backward_any, GeluBackward, 1)
BINARY(residual_forward, Add, PACK)
BINARY(residual_forward_any, Add, 1)
UNARY(narrow, Same, PACK, floatX, float)
UNARY(narrow_any, Same, 1, floatX, float)
UNARY(widen, Same, PACK, float, floatX)
UNARY(widen_any, Same, 1, float, floatX)
