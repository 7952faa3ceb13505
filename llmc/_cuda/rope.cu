// Rotary embedding (Su et al. 2021), in place: with c and s the cosine and the sine of a token's angle i,
//
//     x[i], x[i + D/2] = x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s
//
// for i < D/2, in each of the first `heads` heads.
//
// A block has a token: its threads share the pairs of packs among themselves.  The names ending in _any take every head
// size and every alignment, one pair of elements at a time.
//
// Bytes moved: 2 D each head, and D float32 of the table, which stays in L2.
#include "common.cuh"

// A row of the table is D/2 cosines and as many sines; `sign` -1 turns back.  Without positions, sequences begin at 0.
template <int N>
__device__ __forceinline__ void turn(floatX *x, const int *positions, const float *__restrict__ table, int T, int width,
                                     int heads, int D, float sign) {
    int b = blockIdx.x / T, t = blockIdx.x % T, half = D / 2, each = half / N;
    table += static_cast<size_t>((positions ? positions[b] : 0) + t) * D;
    x += static_cast<size_t>(blockIdx.x) * width;
#pragma unroll 2
    for (int item = threadIdx.x; item < heads * each; item += blockDim.x) {
        int head = item / each, i = (item - head * each) * N;
        floatX *one = x + head * D + i, *two = one + half;
        float u[N], v[N], c[N], s[N];
        load<N>(u, one);
        load<N>(v, two);
        load<N>(c, table + i);
        load<N>(s, table + half + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float sine = sign * s[j], turned = u[j] * c[j] - v[j] * sine;
            v[j] = v[j] * c[j] + u[j] * sine;
            u[j] = turned;
        }
        store<N>(one, u);
        store<N>(two, v);
    }
}

extern "C" __global__ void rope(floatX *x, const int *positions, const float *table, int T, int width, int heads, int D,
                                float sign) {
    turn<PACK>(x, positions, table, T, width, heads, D, sign);
}

extern "C" __global__ void rope_any(floatX *x, const int *positions, const float *table, int T, int width, int heads,
                                    int D, float sign) {
    turn<1>(x, positions, table, T, width, heads, D, sign);
}
