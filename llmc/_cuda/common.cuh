// What every kernel uses: the storage type, conversions, wide accesses, reductions.  No header of the system's.

#pragma once

#include "ptx.cuh"

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

__device__ __forceinline__ void unpack_bf16(float *v, unsigned word) {
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xFFFF0000u);
}

// N elements from p on, one or a multiple of 16 bytes at such an address, as float32.
template <int N, Use USE = Use::AGAIN> __device__ __forceinline__ void load(float (&v)[N], const float *p) {
    static_assert(N == 1 || N % 4 == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        v[0] = *p;
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            uint4 word = load_16<USE>(p + i);
            v[i] = __uint_as_float(word.x), v[i + 1] = __uint_as_float(word.y);
            v[i + 2] = __uint_as_float(word.z), v[i + 3] = __uint_as_float(word.w);
        }
    }
}

template <int N, Use USE = Use::AGAIN> __device__ __forceinline__ void load(float (&v)[N], const bf16 *p) {
    static_assert(N == 1 || N % 8 == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        v[0] = to_float(*p);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8) {
            uint4 word = load_16<USE>(p + i);
            unpack_bf16(v + i, word.x), unpack_bf16(v + i + 2, word.y);
            unpack_bf16(v + i + 4, word.z), unpack_bf16(v + i + 6, word.w);
        }
    }
}

// The other way, each element rounded to nearest.
template <int N, Use USE = Use::AGAIN> __device__ __forceinline__ void store(float *p, const float (&v)[N]) {
    static_assert(N == 1 || N % 4 == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        *p = v[0];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            store_16<USE>(p + i, make_uint4(__float_as_uint(v[i]), __float_as_uint(v[i + 1]), __float_as_uint(v[i + 2]),
                                            __float_as_uint(v[i + 3])));
    }
}

template <int N, Use USE = Use::AGAIN> __device__ __forceinline__ void store(bf16 *p, const float (&v)[N]) {
    static_assert(N == 1 || N % 8 == 0, "one element or whole 16 bytes");
    if constexpr (N == 1) {
        *p = from_float<bf16>(v[0]);
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 8)
            store_16<USE>(p + i, make_uint4(pack_bf16(v[i], v[i + 1]), pack_bf16(v[i + 2], v[i + 3]),
                                            pack_bf16(v[i + 4], v[i + 5]), pack_bf16(v[i + 6], v[i + 7])));
    }
}

// The same where only `left` elements are there: what is beyond reads as 0 and is not written.
template <int N, Use USE = Use::AGAIN, typename T>
__device__ __forceinline__ void load_some(float (&v)[N], const T *p, long long left) {
    if (left >= N) {
        load<N, USE>(v, p);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = i < left ? to_float(p[i]) : 0.0f;
}

template <int N, Use USE = Use::AGAIN, typename T>
__device__ __forceinline__ void store_some(T *p, const float (&v)[N], long long left) {
    if (left >= N) {
        store<N, USE>(p, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < left) p[i] = from_float<T>(v[i]);
}

// ---- reductions ----------------------------------------------------------------------------------

struct Sum {
    template <typename T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};

struct Max {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Of the values of a warp's lanes, which all take part, in a fixed order; every lane gets the result.
template <typename Op, typename T> __device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = Op()(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}

template <typename T> __device__ __forceinline__ T warp_sum(T value) { return warp_reduce<Sum>(value); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce<Max>(value); }

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
