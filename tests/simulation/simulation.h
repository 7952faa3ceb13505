// CUDA's vocabulary for g++: included before a .cu source, it makes that source compile, unmodified, for the host.
// Threads are fibres (fibres.cpp); whatever makes them wait for one another goes through fibres.h.
//
// Not modelled: memory ordering, bank conflicts, coalescing, caches, textures.  Inline assembly is in ptx.cuh, which
// has a twin here.
#pragma once

#include "fibres.h"

#include <cmath>
#include <cstring>
#include <math.h>
#include <type_traits>
#include <utility>

#define SIMULATION 1
#define __CUDACC_RTC__ 1

// ---- declarations --------------------------------------------------------------------------------------

// The compiler driver (nvrtc.cpp) finds kernels and their bounds by these attributes.
#define __global__ __attribute__((simulation_kernel))
#define __launch_bounds__(...) __attribute__((simulation_bounds(__VA_ARGS__)))
#define __device__
#define __host__
#define __constant__ __attribute__((visibility("default")))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("simulation_shared")))
#define SHARED(type, name) type *const name = reinterpret_cast<type *>(simulation_launch.dynamic)

#define threadIdx simulation_thread
#define blockIdx simulation_launch.block
#define blockDim simulation_launch.block_dim
#define gridDim simulation_launch.grid_dim
static constexpr int warpSize = 32;

// ---- vector types ----------------------------------------------------------------------------------------

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

#define VECTORS(name, type, two, four)                                                                                 \
    struct name##1 { type x; };                                                                                        \
    struct alignas(two) name##2 { type x, y; };                                                                        \
    struct name##3_ { type x, y, z; };                                                                                 \
    struct alignas(four) name##4 { type x, y, z, w; };                                                                 \
    static inline name##1 make_##name##1(type x) { return {x}; }                                                       \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                            \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(char, signed char, 2, 4)
VECTORS(uchar, unsigned char, 2, 4)
VECTORS(short, short, 4, 8)
VECTORS(ushort, unsigned short, 4, 8)
VECTORS(int, int, 8, 16)
VECTORS(uint, unsigned, 8, 16)
VECTORS(longlong, long long, 16, 16)
VECTORS(ulonglong, unsigned long long, 16, 16)
VECTORS(float, float, 8, 16)
VECTORS(double, double, 16, 16)
#undef VECTORS
using float3 = float3_;
using int3 = int3_;
static inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
static inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

// ---- bits ------------------------------------------------------------------------------------------------

namespace simulation {
template <class To, class From> inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
} // namespace simulation

static inline unsigned __float_as_uint(float x) { return simulation::bits<unsigned>(x); }
static inline int __float_as_int(float x) { return simulation::bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return simulation::bits<float>(x); }
static inline float __int_as_float(int x) { return simulation::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return simulation::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return simulation::bits<double>(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (x >> i & 1) << (31 - i);
    return result;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = selector >> (4 * i), byte = unsigned(both >> (8 * (pick & 7))) & 0xff;
        result |= (pick & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
    }
    return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}

// ---- arithmetic ------------------------------------------------------------------------------------------

// As in CUDA: of mixed types, and of two floating numbers the one that is no NaN.
template <class A, class B, class C = std::common_type_t<A, B>> static inline C min(A a, B b) {
    if constexpr (std::is_floating_point_v<C>)
        return std::fmin(C(a), C(b));
    else
        return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B, class C = std::common_type_t<A, B>> static inline C max(A a, B b) {
    if constexpr (std::is_floating_point_v<C>)
        return std::fmax(C(a), C(b));
    else
        return C(a) < C(b) ? C(b) : C(a);
}

static inline double rsqrt(double x) { return 1 / std::sqrt(x); }
static inline float fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return std::sqrt(x); }
static inline float __frsqrt_rn(float x) { return float(1 / std::sqrt(double(x))); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
// Not contracted into fused products, here as there.
#define ROUNDED(name, type, operator)                                                                                  \
    __attribute__((noinline)) static type name(type a, type b) { return a operator b; }
ROUNDED(__fadd_rn, float, +)
ROUNDED(__fsub_rn, float, -)
ROUNDED(__fmul_rn, float, *)
ROUNDED(__dadd_rn, double, +)
ROUNDED(__dsub_rn, double, -)
ROUNDED(__dmul_rn, double, *)
#undef ROUNDED
static inline float __int2float_rn(int x) { return float(x); }
static inline float __uint2float_rn(unsigned x) { return float(x); }
static inline float __ull2float_rn(unsigned long long x) { return float(x); }
static inline float __double2float_rn(double x) { return float(x); }
static inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static inline int __float2int_rz(float x) { return int(x); }
static inline int __float2int_rd(float x) { return int(std::floor(x)); }
static inline unsigned __float2uint_rn(float x) { return unsigned(std::nearbyint(x)); }
static inline unsigned __float2uint_rz(float x) { return unsigned(x); }

namespace simulation {

// A function's value as wrong as CUDA's may be ("Mathematical Functions" in the programming guide, and PTX for the
// approximations): up to `units` in the last place up or down, as the argument's bits have it.  What a float can hold
// exactly is exact.
inline float off(double exact, int units, float x) {
    float result = float(exact);
    if (double(result) == exact || !std::isfinite(result) || std::fabs(result) < 0x1p-125f) return result;
    unsigned mixed = bits<unsigned>(x) * 0x9e3779b9u;
    mixed = (mixed ^ mixed >> 15) * 0x85ebca6bu;
    return bits<float>(bits<unsigned>(result) + (mixed >> 16) % unsigned(2 * units + 1) - unsigned(units));
}

inline float exp2_of(float x) { return off(std::exp2(double(x)), 2, x); }
inline float exp_of(float x) { return off(std::exp(double(x)), 2, x); }
inline float log_of(float x) { return off(std::log(double(x)), 1, x); }
inline float log2_of(float x) { return off(std::log2(double(x)), 1, x); }
inline float tanh_of(float x) {
    float result = off(std::tanh(double(x)), 2, x);
    return std::fabs(result) > 1 ? std::copysign(1.0f, result) : result; // NaN stays
}
inline float rsqrt_of(float x) { return off(1 / std::sqrt(double(x)), 2, x); }
inline float sinpi_of(float x) { return off(std::sin(M_PI * std::fmod(double(x), 2.0)), 1, x); }
inline float cospi_of(float x) { return off(std::cos(M_PI * std::fmod(double(x), 2.0)), 1, x); }
// The fast ones go through powers of two, and round the product with log 2 on the way.
inline float fast_exp(float x) { return exp2_of(x * 1.44269504f); }
inline float fast_log(float x) { return log2_of(x) * 0.693147181f; }
inline float fast_divide(float a, float b) {
    if (std::fabs(b) > 0x1p126f) return std::isinf(a) ? NAN : a * 0;
    return off(double(a) / b, 2, b);
}

} // namespace simulation

// The names are those of the C library, which declares them already.
#define exp2f simulation::exp2_of
#define expf simulation::exp_of
#define logf simulation::log_of
#define log2f simulation::log2_of
#define tanhf simulation::tanh_of
#define rsqrtf simulation::rsqrt_of
#define sinpif simulation::sinpi_of
#define cospif simulation::cospi_of
#define __expf simulation::fast_exp
#define __logf simulation::fast_log
#define __log2f simulation::log2_of
#define __fdividef simulation::fast_divide

// ---- memory ----------------------------------------------------------------------------------------------

#define LOAD(name)                                                                                                     \
    template <class T> static inline T name(const T *p) { return *p; }
LOAD(__ldg)
LOAD(__ldca)
LOAD(__ldcg)
LOAD(__ldcs)
LOAD(__ldlu)
LOAD(__ldcv)
#undef LOAD
#define STORE(name)                                                                                                    \
    template <class T> static inline void name(T *p, T value) { *p = value; }
STORE(__stwb)
STORE(__stcg)
STORE(__stcs)
STORE(__stwt)
#undef STORE

// One thread runs at a time, and gives way only where it waits.
#define ATOMIC(name, expression)                                                                                       \
    template <class T> static inline T name(T *p, std::common_type_t<T> value) {                                       \
        T old = *p;                                                                                                    \
        *p = expression;                                                                                               \
        return old;                                                                                                    \
    }
ATOMIC(atomicAdd, old + value)
ATOMIC(atomicSub, old - value)
ATOMIC(atomicExch, value)
ATOMIC(atomicMin, ::min(old, value))
ATOMIC(atomicMax, ::max(old, value))
ATOMIC(atomicAnd, old &value)
ATOMIC(atomicOr, old | value)
ATOMIC(atomicXor, old ^ value)
ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef ATOMIC
template <class T> static inline T atomicCAS(T *p, std::common_type_t<T> compare, std::common_type_t<T> value) {
    T old = *p;
    if (old == compare) *p = value;
    return old;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned) {}

// ---- barriers --------------------------------------------------------------------------------------------

#define SIMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(SIMULATION_SITE) {
    simulation_barrier(0, 0, simulation::PLAIN, 0, "__syncthreads", file, line);
}
static inline int __syncthreads_or(int predicate, SIMULATION_SITE) {
    return simulation_barrier(0, 0, simulation::OR, predicate, "__syncthreads_or", file, line);
}
static inline int __syncthreads_and(int predicate, SIMULATION_SITE) {
    return simulation_barrier(0, 0, simulation::AND, predicate, "__syncthreads_and", file, line);
}
static inline int __syncthreads_count(int predicate, SIMULATION_SITE) {
    return simulation_barrier(0, 0, simulation::COUNT, predicate, "__syncthreads_count", file, line);
}

// ---- warps -----------------------------------------------------------------------------------------------

namespace simulation {

// The lanes in `mask` meet; `run(lanes, mask)` is called once, with pointers to the operands of all (null for a lane
// that takes no part), and writes results into them.  `run` captures nothing.
template <class Operand, class Run>
inline void together(unsigned mask, Operand &operand, Run, const char *name, const char *file, int line) {
    auto call = [](void **operands, unsigned lanes) {
        // Without captures there is nothing in a `Run`: any address will do.
        (*reinterpret_cast<Run *>(operands))(reinterpret_cast<Operand **>(operands), lanes);
    };
    simulation_collective(mask, &operand, call, name, file, line);
}

template <class T> struct Shuffle {
    T value, result;
    int from; // the lane read
};

template <class T> inline T shuffle(unsigned mask, T value, int from, const char *name, const char *file, int line) {
    Shuffle<T> operand{value, value, from};
    if (!(mask >> from & 1)) simulation_fail("reads a lane that is not in the shuffle's mask", file, line);
    together(
        mask, operand,
        [](Shuffle<T> **lanes, unsigned here) {
            for (; here; here &= here - 1) {
                Shuffle<T> &lane = *lanes[__builtin_ctz(here)];
                lane.result = lanes[lane.from]->value;
            }
        },
        name, file, line);
    return operand.result;
}

} // namespace simulation

static inline void __syncwarp(unsigned mask = ~0u, SIMULATION_SITE) {
    int nothing = 0;
    simulation::together(mask, nothing, [](int **, unsigned) {}, "__syncwarp", file, line);
}
static inline unsigned __activemask() { return simulation_active(); }

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMULATION_SITE) {
    int lane = int(simulation_lane());
    return simulation::shuffle(mask, value, (lane & -width) | (source & (width - 1)), "__shfl_sync", file, line);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, SIMULATION_SITE) {
    int lane = int(simulation_lane()), from = lane ^ with;
    return simulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, "__shfl_xor_sync", file, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMULATION_SITE) {
    int lane = int(simulation_lane()), from = lane - int(delta);
    return simulation::shuffle(mask, value, from < (lane & -width) ? lane : from, "__shfl_up_sync", file, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMULATION_SITE) {
    int lane = int(simulation_lane()), from = lane + int(delta);
    return simulation::shuffle(mask, value, from > (lane | (width - 1)) ? lane : from, "__shfl_down_sync", file, line);
}

static inline unsigned __ballot_sync(unsigned mask, int predicate, SIMULATION_SITE) {
    unsigned operand = predicate != 0;
    simulation::together(
        mask, operand,
        [](unsigned **lanes, unsigned here) {
            unsigned ballot = 0;
            for (unsigned rest = here; rest; rest &= rest - 1)
                ballot |= *lanes[__builtin_ctz(rest)] << __builtin_ctz(rest);
            for (unsigned rest = here; rest; rest &= rest - 1) *lanes[__builtin_ctz(rest)] = ballot;
        },
        "__ballot_sync", file, line);
    return operand;
}
static inline int __any_sync(unsigned mask, int predicate, SIMULATION_SITE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, SIMULATION_SITE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}
template <class T> static inline unsigned __match_any_sync(unsigned mask, T value, SIMULATION_SITE) {
    struct Match {
        T value;
        unsigned equal;
    } operand{value, 0};
    simulation::together(
        mask, operand,
        [](Match **lanes, unsigned here) {
            for (unsigned a = here; a; a &= a - 1)
                for (unsigned b = here; b; b &= b - 1)
                    lanes[__builtin_ctz(a)]->equal |=
                        unsigned(lanes[__builtin_ctz(a)]->value == lanes[__builtin_ctz(b)]->value) << __builtin_ctz(b);
        },
        "__match_any_sync", file, line);
    return operand.equal;
}

#define REDUCE(name, expression)                                                                                       \
    template <class T> static inline T name(unsigned mask, T value, SIMULATION_SITE) {                                 \
        static_assert(std::is_integral_v<T>, "for integers");                                                          \
        simulation::together(                                                                                          \
            mask, value,                                                                                               \
            [](T **lanes, unsigned here) {                                                                             \
                T a = *lanes[__builtin_ctz(here)];                                                                     \
                for (unsigned rest = here & (here - 1); rest; rest &= rest - 1) {                                      \
                    T b = *lanes[__builtin_ctz(rest)];                                                                 \
                    a = expression;                                                                                    \
                }                                                                                                      \
                for (unsigned rest = here; rest; rest &= rest - 1) *lanes[__builtin_ctz(rest)] = a;                    \
            },                                                                                                         \
            #name, file, line);                                                                                        \
        return value;                                                                                                  \
    }
REDUCE(__reduce_add_sync, a + b)
REDUCE(__reduce_min_sync, ::min(a, b))
REDUCE(__reduce_max_sync, ::max(a, b))
REDUCE(__reduce_and_sync, a &b)
REDUCE(__reduce_or_sync, a | b)
REDUCE(__reduce_xor_sync, a ^ b)
#undef REDUCE

// ---- ends ------------------------------------------------------------------------------------------------

static inline void __trap(SIMULATION_SITE) { simulation_fail("__trap", file, line); }
#define __builtin_assume(condition) ((void)0)
#define __assume(condition) ((void)0)
#undef assert
#define assert(condition) ((condition) ? (void)0 : simulation_fail("assert(" #condition ")", __FILE__, __LINE__))

// ---- how the driver calls a kernel: nvrtc.cpp writes one line for each ------------------------------------

namespace simulation {

template <class... P> struct Arguments {
    static constexpr unsigned COUNT = sizeof...(P);
    struct Table {
        unsigned offsets[COUNT + 1], sizes[COUNT + 1];
        constexpr Table() : offsets{}, sizes{} {
            unsigned i = 0, at = 0;
            ((at = unsigned((at + alignof(P) - 1) / alignof(P) * alignof(P)), offsets[i] = at,
              sizes[i++] = unsigned(sizeof(P)), at += unsigned(sizeof(P))),
             ...);
            offsets[i] = at;
        }
    };
    static constexpr Table table{};
};

template <auto kernel, class... P, size_t... I> inline void call(const char *buffer, std::index_sequence<I...>) {
    kernel(bits<P>(*reinterpret_cast<const P *>(buffer + Arguments<P...>::table.offsets[I]))...);
}

template <auto kernel, class... P> constexpr Kernel describe(const char *name, unsigned max_threads, void (*)(P...)) {
    using A = Arguments<P...>;
    return {name,
            [](const void *buffer) {
                call<kernel, P...>(static_cast<const char *>(buffer), std::index_sequence_for<P...>());
            },
            A::table.offsets,
            A::table.sizes,
            A::COUNT,
            A::table.offsets[A::COUNT],
            max_threads};
}

} // namespace simulation
