// What every kernel uses: the storage type, conversions, wide accesses, reductions.  No header of the system's.

#pragma once

#include "ptx.cuh"

#ifndef INFINITY // NVRTC has no <math.h>
#define INFINITY __int_as_float(0x7F800000)
#endif

#ifndef STORAGE_BF16
#define STORAGE_BF16 0
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
constexpr float LOG2E = 1.44269504f;
constexpr float LOWEST = -3.40282347e38f; // of float32; as a maximum's start it leaves no inf - inf behind

// Dynamic shared memory: `SHARED(float, name)` declares a pointer to it, aligned for 16-byte accesses.
#ifndef SHARED
#define SHARED(type, name)                                                                                             \
    extern __shared__ __align__(16) unsigned char name##_bytes[];                                                      \
    type *name = reinterpret_cast<type *>(name##_bytes)
#endif

// ---- the storage type ----------------------------------------------------------------------------

struct bf16 {
    unsigned short bits;
};

#if STORAGE_BF16
typedef bf16 floatX;
#else
typedef float floatX;
#endif

// bfloat16 is the upper half of a float32.
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float to_float(float x) { return x; }

// x as T, rounded to nearest, ties to even; NaN stays NaN.
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return bf16{static_cast<unsigned short>(pack_bf16(x, 0.0f))};
}

// What is read back after x has been stored as T.
template <typename T> __device__ __forceinline__ float as_stored(float x) { return to_float(from_float<T>(x)); }

// ---- wide accesses -------------------------------------------------------------------------------

// Elements of the storage type in 16 bytes.
constexpr int PACK = 16 / sizeof(floatX);

// How memory is to be cached: as usual, or evicted first, for what is used once.
enum class Use { AGAIN, ONCE };

#define NOTHING make_uint4(0, 0, 0, 0) // 16 bytes of zeros

template <Use USE> __device__ __forceinline__ uint4 load_16(const void *p) {
    if constexpr (USE == Use::ONCE)
        return load_streaming(p);
    else
        return *static_cast<const uint4 *>(p);
}

template <Use USE> __device__ __forceinline__ void store_16(void *p, uint4 word) {
    if constexpr (USE == Use::ONCE)
        store_streaming(p, word);
    else
        *static_cast<uint4 *>(p) = word;
}

// 16 bytes of T, the first element lowest, as float32.
template <typename T> __device__ __forceinline__ void unpack(float *v, uint4 word);
template <> __device__ __forceinline__ void unpack<float>(float *v, uint4 word) {
    v[0] = __uint_as_float(word.x), v[1] = __uint_as_float(word.y);
    v[2] = __uint_as_float(word.z), v[3] = __uint_as_float(word.w);
}
template <> __device__ __forceinline__ void unpack<bf16>(float *v, uint4 word) {
    v[0] = __uint_as_float(word.x << 16), v[1] = __uint_as_float(word.x & 0xFFFF0000u);
    v[2] = __uint_as_float(word.y << 16), v[3] = __uint_as_float(word.y & 0xFFFF0000u);
    v[4] = __uint_as_float(word.z << 16), v[5] = __uint_as_float(word.z & 0xFFFF0000u);
    v[6] = __uint_as_float(word.w << 16), v[7] = __uint_as_float(word.w & 0xFFFF0000u);
}

// The other way, each element rounded to nearest.
template <typename T> __device__ __forceinline__ uint4 pack(const float *v);
template <> __device__ __forceinline__ uint4 pack<float>(const float *v) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
template <> __device__ __forceinline__ uint4 pack<bf16>(const float *v) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// N elements from p on, one or a multiple of 16 bytes at such an address.
template <int N, Use USE = Use::AGAIN, typename T> __device__ __forceinline__ void load(float (&v)[N], const T *p) {
    constexpr int WIDTH = 16 / sizeof(T);
    static_assert(N == 1 || N % WIDTH == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        v[0] = to_float(*p);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += WIDTH) unpack<T>(v + i, load_16<USE>(p + i));
    }
}

// The same, or zeros: one predicated access, so that several can be on their way together.
template <int N, Use USE = Use::AGAIN, typename T>
__device__ __forceinline__ void load_if(float (&v)[N], const T *p, bool there) {
    constexpr int WIDTH = 16 / sizeof(T);
    if constexpr (N == 1) {
        v[0] = there ? to_float(*p) : 0.0f;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += WIDTH) unpack<T>(v + i, there ? load_16<USE>(p + i) : NOTHING);
    }
}

template <int N, Use USE = Use::AGAIN, typename T> __device__ __forceinline__ void store(T *p, const float (&v)[N]) {
    constexpr int WIDTH = 16 / sizeof(T);
    static_assert(N == 1 || N % WIDTH == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        *p = from_float<T>(v[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += WIDTH) store_16<USE>(p + i, pack<T>(v + i));
    }
}

// ---- reductions ----------------------------------------------------------------------------------

struct Sum {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
    __device__ __forceinline__ float2 operator()(float2 a, float2 b) const { return make_float2(a.x + b.x, a.y + b.y); }
};

struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The value of the lane whose number differs by `step`, a power of 2.
template <typename T> __device__ __forceinline__ T across(T value, int step) {
    return __shfl_xor_sync(ALL_LANES, value, step);
}
__device__ __forceinline__ float2 across(float2 value, int step) {
    return make_float2(across(value.x, step), across(value.y, step));
}

// Of the values of a warp's lanes, which all take part, in a fixed order; every lane gets the result.
template <typename Op, typename T> __device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = Op()(value, across(value, step));
    return value;
}

template <typename T> __device__ __forceinline__ T warp_sum(T value) { return warp_reduce<Sum>(value); }

// Of the values of `warps` whole warps, the first being warp `first` of the block; every thread of theirs gets the
// result.  All threads of the block must call it with the same `warps`, and `scratch` for a value of each warp.
template <typename Op, typename T>
__device__ __forceinline__ T group_reduce(T value, T *scratch, int warp, int first, int warps) {
    value = warp_reduce<Op>(value);
    if (warps == 1) return value;
    __syncthreads(); // scratch may still be read from the reduction before
    scratch[warp] = value;
    __syncthreads();
    value = scratch[first];
#pragma unroll 1
    for (int i = 1; i < warps; i++) value = Op()(value, scratch[first + i]);
    return value;
}

// Of the values of a block of one dimension, a multiple of 32 threads.
template <typename Op, typename T> __device__ __forceinline__ T block_reduce(T value, T *scratch) {
    return group_reduce<Op>(value, scratch, threadIdx.x / WARP, 0, blockDim.x / WARP);
}

template <typename T> __device__ __forceinline__ T block_sum(T value, T *scratch) {
    return block_reduce<Sum>(value, scratch);
}
