// What the norms share: where a thread stands in its row, and the sums over all rows for the gradients of weights.

#pragma once

#include "common.cuh"

constexpr int HELD = 3; // packs of a row in a thread's registers: GPT-2's 768 channels of bf16 are one warp's

// Where this thread stands among those of its row.
struct Place {
    int row, warp, first, warps;

    __device__ __forceinline__ Place() {
        row = blockIdx.x * blockDim.y + threadIdx.y;
        warps = blockDim.x / WARP;
        first = threadIdx.y * warps;
        warp = first + threadIdx.x / WARP;
    }

    template <typename T> __device__ __forceinline__ T sum(T value, float2 *scratch) const {
        return group_reduce<Sum>(value, reinterpret_cast<T *>(scratch), warp, first, warps);
    }
};

// The sums of all chunks: partial (chunks, width) added over its rows, by a block of (32, 32) threads for 32 columns.
// Thread (c, y) adds every 32nd row from y on, and the 32 of a column are added in order.  Valid where threadIdx.y is
// 0.
__device__ __forceinline__ float sum_of_chunks(const float *partial, int c, int chunks, int width,
                                               float (&sums)[WARP][WARP + 1]) {
    float sum = 0.0f;
    if (c < width)
#pragma unroll 8
        for (int i = threadIdx.y; i < chunks; i += WARP) sum += partial[static_cast<size_t>(i) * width + c];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0)
        for (int y = 1; y < WARP; y++) sum += sums[y][threadIdx.x];
    return sum;
}
