// Instructions that CUDA C++ has no name for: all inline assembly is here, one instruction a function (sm_80 and up).
//
// The simulation of the tests puts another file in this one's place, with the same functions in plain C++.  Pointers,
// not shared-memory addresses, come in, so that there they can be what they are; ptxas folds the conversion away.

#pragma once

__device__ __forceinline__ unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

// d (16,8) += a (16,16) b (16,8), bf16 with fp32 sums, by a warp.  With g = lane / 4, t = lane % 4, each register of a
// and b a pair of columns of a, of rows of b:
//   a[0]: row g, columns 2t, 2t+1;  a[1]: row g+8;  a[2], a[3]: the same, columns 2t+8, 2t+9
//   b0: column g, rows 2t, 2t+1;    b1: rows 2t+8, 2t+9
//   d[0], d[1]: row g, columns 2t, 2t+1;  d[2], d[3]: row g+8
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes, by a warp: lanes 8i to 8i+7 point at the rows of matrix i, in shared memory at
// multiples of 16 bytes.  r[i] gets of matrix i row lane / 4, bytes 4 (lane % 4) to 4 (lane % 4) + 3.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same of the transposed matrices of 8 x 8 16-bit numbers: column lane / 4, rows 2 (lane % 4) and 2 (lane % 4) + 1.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Begins to copy `bytes` (0 to 16) from global to shared memory, both at multiples of 16 bytes, past the registers and
// L1; the rest of the 16 bytes there becomes 0.  With 0 bytes nothing is read, but the address must be one.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

// The same of 4 bytes, or of none.
__device__ __forceinline__ void cp_async_4(void *shared, const void *global, int bytes = 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes)
                 : "memory");
}

// Closes a group: this thread's copies since the last.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the latest N groups of this thread are under way; others see its copies after a barrier.
template <int N> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Two bf16 in one register, rounded to nearest, ties to even; `low` in the lower half, which comes first in memory.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// 2^x to 2 units in the last place; 0 for what would be denormal.
__device__ __forceinline__ float exp2_approx(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 16 bytes that are read once: L2 may drop them first.
__device__ __forceinline__ uint4 load_streaming(const void *p) {
    uint4 r;
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    return r;
}

// 16 bytes that nothing will read soon.
__device__ __forceinline__ void store_streaming(void *p, uint4 x) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
}
