// out = std N(0, 1), as Ops.normal in llmc/ops.py says: element 64 g + 16 j + l is word j of counter 16 g + l.
#include "common.cuh"

#include "philox.cuh"

// Two random words -> two independent normal numbers (Box & Muller 1958).
//
// The radius is within 3 units of 2^-24: log's 2, halved by the root, the product before it and the root's own.  sinpif
// and cospif are within 2 of theirs, being exact about the multiples of pi/2; two products follow.
__device__ __forceinline__ float2 normal_pair(unsigned w0, unsigned w1, float std) {
    float u = fmaxf(__uint2float_rn(w0), 0.5f) * 0x1p-32f;
    float x = static_cast<float>(w1 >> 8) * 0x1p-23f - 1.0f;
    float r = std * sqrtf(-2.0f * logf(u));
    return make_float2(r * cospif(x), r * sinpif(x));
}

// A thread for each counter: of a warp's stores 16 each lie side by side.
template <typename T>
__device__ __forceinline__ void fill(T *out, long long n, unsigned long long seed, unsigned long long stream,
                                     float std) {
    unsigned long long counter = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    long long i = static_cast<long long>(counter / 16 * 64 + counter % 16);
    if (i >= n) return;
    uint4 w = philox(make_uint4(low_word(counter), high_word(counter), low_word(stream), high_word(stream)),
                     make_uint2(low_word(seed), high_word(seed)));
    float2 first = normal_pair(w.x, w.y, std), second = normal_pair(w.z, w.w, std);
    float v[4] = {first.x, first.y, second.x, second.y};
    for (int j = 0; j < 4; j++)
        if (i + 16 * j < n) out[i + 16 * j] = from_float<T>(v[j]);
}

extern "C" __global__ void normal_single(float *out, long long n, unsigned long long seed, unsigned long long stream,
                                         float std) {
    fill(out, n, seed, stream, std);
}

extern "C" __global__ void normal_stored(floatX *out, long long n, unsigned long long seed, unsigned long long stream,
                                         float std) {
    fill(out, n, seed, stream, std);
}
