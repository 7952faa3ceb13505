// GELU in its tanh form (Hendrycks & Gimpel 2016), gates by it and by SiLU (Shazeer 2020), the residual sum, and copies
// of another type.
//
// All but the gates are one pass over vectors of n elements, LOADS packs of 16 bytes in each thread, all read before
// any is written. The names ending in _any are for addresses that are not multiples of 16 bytes: one element at a time.
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

// ---- gates: out = f(gate) up, rows of gate and up beside each other ------------------------------------------------

// What becomes of one gate: its value and, for the backward pass, its derivative.
struct Gate {
    float value, slope;
};

// silu(x) = x s with s = 1 / (1 + e^-x); silu'(x) = s + x s (1 - s).  From e^-|x|, which never overflows: the larger of
// s and 1 - s is 1 / (1 + e^-|x|), the smaller e^-|x| times that, and neither is a difference.
struct Silu {
    __device__ __forceinline__ Gate operator()(float x) const {
        float e = expf(-fabsf(x)), larger = __frcp_rn(1.0f + e), smaller = e * larger;
        float s = x < 0.0f ? smaller : larger, rest = x < 0.0f ? larger : smaller;
        return Gate{x * s, s + x * s * rest};
    }
};

struct GeluGate {
    __device__ __forceinline__ Gate operator()(float x) const { return Gate{gelu(x), gelu_slope(x)}; }
};

// The place of this thread's packs: `blocks` blocks have a row of F, LOADS packs in each thread.
struct Packs {
    long long row;
    int begin, stride;

    __device__ __forceinline__ Packs(int blocks, int N) {
        row = blockIdx.x / blocks;
        stride = blockDim.x * N;
        begin = static_cast<int>(blockIdx.x % blocks) * LOADS * stride + threadIdx.x * N;
    }
};

// Bytes moved: 3 F each row.
template <int N, typename F>
__device__ __forceinline__ void gate_forward(floatX *out, const floatX *x, int width, int blocks, F f) {
    Packs at(blocks, N);
    x += at.row * 2 * width, out += at.row * width;
    float gate[LOADS][N], up[LOADS][N];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int i = at.begin + k * at.stride;
        load_if<N>(gate[k], x + i, i < width);
        load_if<N>(up[k], x + width + i, i < width);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int i = at.begin + k * at.stride;
        if (i >= width) continue;
#pragma unroll
        for (int j = 0; j < N; j++) up[k][j] *= f(gate[k][j]).value;
        store<N>(out + i, up[k]);
    }
}

// dgate = dout up f'(gate), dup = dout f(gate); dx may be x.
//
// Bytes moved: 5 F each row.
template <int N, typename F>
__device__ __forceinline__ void gate_backward(floatX *dx, const floatX *dout, const floatX *x, int width, int blocks,
                                              F f) {
    Packs at(blocks, N);
    x += at.row * 2 * width, dx += at.row * 2 * width, dout += at.row * width;
    float gate[LOADS][N], up[LOADS][N], d[LOADS][N];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int i = at.begin + k * at.stride;
        load_if<N>(gate[k], x + i, i < width);
        load_if<N>(up[k], x + width + i, i < width);
        load_if<N>(d[k], dout + i, i < width);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        int i = at.begin + k * at.stride;
        if (i >= width) continue;
#pragma unroll
        for (int j = 0; j < N; j++) {
            Gate found = f(gate[k][j]);
            gate[k][j] = d[k][j] * up[k][j] * found.slope;
            up[k][j] = d[k][j] * found.value;
        }
        store<N>(dx + i, gate[k]);
        store<N>(dx + width + i, up[k]);
    }
}

#define GATE(name, f, N)                                                                                               \
    extern "C" __global__ void name(floatX *out, const floatX *x, int width, int blocks) {                             \
        gate_forward<N>(out, x, width, blocks, f());                                                                   \
    }

#define GATE_BACKWARD(name, f, N)                                                                                      \
    extern "C" __global__ void name(floatX *dx, const floatX *dout, const floatX *x, int width, int blocks) {          \
        gate_backward<N>(dx, dout, x, width, blocks, f());                                                             \
    }

GATE(swiglu_forward, Silu, PACK)
GATE(swiglu_forward_any, Silu, 1)
GATE(geglu_forward, GeluGate, PACK)
GATE(geglu_forward_any, GeluGate, 1)
GATE_BACKWARD(swiglu_backward, Silu, PACK)
GATE_BACKWARD(swiglu_backward_any, Silu, 1)
GATE_BACKWARD(geglu_backward, GeluGate, PACK)
GATE_BACKWARD(geglu_backward_any, GeluGate, 1)
