// RMSNorm (Zhang & Sennrich 2019):
//
//     out = x rstd (offset + w),  rstd = 1 / sqrt(mean of x^2 + eps), along rows of C channels
//
// A row lies in the registers of `blockDim.x` threads (whole warps), at most HELD packs of 16 bytes in each, so that it
// is read once.  blockDim.y rows share a block.
//
// Kernels whose names end in _any take every width and every alignment: a warp for each row, which it reads again.
#include "norm.cuh"

constexpr int MOST_THREADS = 384; // of a block of the kernels that hold rows: 9216 channels of bf16, 4608 of float32

// total = x + branch where RESIDUAL, and the norm of what has been stored; else the norm of x.
//
// Bytes moved: 2 C each row, or 4 C with the sum, and w from L1.
template <bool RESIDUAL>
__device__ __forceinline__ void forward(floatX *total, floatX *out, float *rstd, const floatX *x, const floatX *branch,
                                        const floatX *__restrict__ w, int M, int C, float eps, float offset,
                                        float2 *scratch) {
    Place at;
    int packs = at.row < M ? C / PACK : 0;
    size_t start = static_cast<size_t>(at.row) * C;
    uint4 first[HELD], second[HELD]; // nothing is unpacked before all is on its way
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = threadIdx.x + k * blockDim.x;
        first[k] = i < packs ? load_16<Use::AGAIN>(x + start + i * PACK) : NOTHING;
        if (RESIDUAL) second[k] = i < packs ? load_16<Use::AGAIN>(branch + start + i * PACK) : NOTHING;
    }
    float v[HELD][PACK], u[PACK], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = threadIdx.x + k * blockDim.x;
        unpack<floatX>(v[k], first[k]);
        if (RESIDUAL) unpack<floatX>(u, second[k]);
        if (i >= packs) continue;
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            if (RESIDUAL) v[k][j] = as_stored<floatX>(v[k][j] + u[j]);
            sum += v[k][j] * v[k][j];
        }
        if (RESIDUAL) store<PACK>(total + start + i * PACK, v[k]);
    }
    float r = 1.0f / sqrtf(at.sum(sum, scratch) / C + eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = threadIdx.x + k * blockDim.x;
        if (i >= packs) continue;
        float scale[PACK];
        load<PACK>(scale, w + i * PACK);
#pragma unroll
        for (int j = 0; j < PACK; j++) v[k][j] *= r * (offset + scale[j]);
        store<PACK>(out + start + i * PACK, v[k]);
    }
    if (threadIdx.x == 0 && at.row < M) rstd[at.row] = r;
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    rmsnorm_forward(floatX *out, float *rstd, const floatX *x, const floatX *w, int M, int C, float eps, float offset) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    forward<false>(nullptr, out, rstd, x, nullptr, w, M, C, eps, offset, scratch);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    residual_rmsnorm_forward(floatX *total, floatX *out, float *rstd, const floatX *x, const floatX *branch,
                             const floatX *w, int M, int C, float eps, float offset) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    forward<true>(total, out, rstd, x, branch, w, M, C, eps, offset, scratch);
}

// Both of the above; without a sum x is normalised itself, and total and branch are null.
extern "C" __global__ void rmsnorm_forward_any(floatX *total, floatX *out, float *rstd, const floatX *x,
                                               const floatX *branch, const floatX *w, int M, int C, float eps,
                                               float offset) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= M) return;
    size_t start = static_cast<size_t>(row) * C;
    if (total) // each lane reads again what it wrote itself
        for (int i = threadIdx.x; i < C; i += WARP)
            total[start + i] = from_float<floatX>(to_float(x[start + i]) + to_float(branch[start + i]));
    const floatX *v = (total ? total : x) + start;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < C; i += WARP) sum += to_float(v[i]) * to_float(v[i]);
    float r = 1.0f / sqrtf(warp_sum(sum) / C + eps);
    for (int i = threadIdx.x; i < C; i += WARP)
        out[start + i] = from_float<floatX>(to_float(v[i]) * (r * (offset + to_float(w[i]))));
    if (threadIdx.x == 0) rstd[row] = r;
}

// With n = x rstd and g = dout (offset + w):
//
//     dx += rstd (g - n mean(g n));  dw = sum of dout n over all rows
//
// Each block takes `rows` rows and leaves its sums as row blockIdx.x of `partial`: its threads sum their own columns in
// registers, row after row, and the blockDim.y of a block are added in order.  `sums` is C floats of shared memory if
// blockDim.y > 1.  Without SUMS, dx alone.
//
// Bytes moved: 4 C each row.
template <bool SUMS>
__device__ __forceinline__ void backward(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                         const float *rstd, const floatX *__restrict__ w, int M, int C, float offset,
                                         int rows, float2 *scratch, float *sums) {
    Place at;
    int stop = min(M, (static_cast<int>(blockIdx.x) + 1) * rows);
    float dw[HELD][PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int j = 0; j < PACK; j++) dw[k][j] = 0.0f;

    for (int begin = blockIdx.x * rows; begin < stop; begin += blockDim.y) {
        int row = begin + threadIdx.y;
        int packs = row < stop ? C / PACK : 0;
        size_t start = static_cast<size_t>(row) * C;
        float r = row < stop ? rstd[row] : 0.0f;
        uint4 first[HELD], second[HELD], third[HELD]; // nothing is unpacked before all is on its way
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            first[k] = i < packs ? load_16<Use::AGAIN>(dout + start + i * PACK) : NOTHING;
            second[k] = i < packs ? load_16<Use::AGAIN>(x + start + i * PACK) : NOTHING;
            third[k] = i < packs ? load_16<Use::AGAIN>(dx + start + i * PACK) : NOTHING;
        }
        float d[HELD][PACK], n[HELD][PACK], before[PACK], scale[PACK], sum = 0.0f;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) continue;
            unpack<floatX>(d[k], first[k]);
            unpack<floatX>(n[k], second[k]);
            load<PACK>(scale, w + i * PACK);
#pragma unroll
            for (int j = 0; j < PACK; j++) {
                n[k][j] *= r;
                if (SUMS) dw[k][j] += d[k][j] * n[k][j];
                d[k][j] *= offset + scale[j]; // g from here on
                sum += d[k][j] * n[k][j];
            }
        }
        sum = at.sum(sum, scratch) / C;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) continue;
            unpack<floatX>(before, third[k]);
#pragma unroll
            for (int j = 0; j < PACK; j++) before[j] += r * (d[k][j] - n[k][j] * sum);
            store<PACK>(dx + start + i * PACK, before);
        }
    }

    if (!SUMS) return;
    float *last = partial + static_cast<size_t>(blockIdx.x) * C;
    for (int y = 0; y < blockDim.y; y++) {
        bool finish = y + 1 == blockDim.y;
        if (threadIdx.y == y) {
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                int i = (threadIdx.x + k * blockDim.x) * PACK;
                if (i >= C) continue;
#pragma unroll
                for (int j = 0; j < PACK; j++) {
                    if (y > 0) dw[k][j] += sums[i + j];
                    if (!finish) sums[i + j] = dw[k][j];
                }
                if (finish) store<PACK>(last + i, dw[k]);
            }
        }
        if (!finish) __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    rmsnorm_backward(floatX *dx, float *partial, const floatX *dout, const floatX *x, const float *rstd,
                     const floatX *w, int M, int C, float offset, int rows) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    SHARED(float, sums);
    backward<true>(dx, partial, dout, x, rstd, w, M, C, offset, rows, scratch, sums);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    rmsnorm_backward_input(floatX *dx, const floatX *dout, const floatX *x, const float *rstd, const floatX *w, int M,
                           int C, float offset, int rows) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    backward<false>(dx, nullptr, dout, x, rstd, w, M, C, offset, rows, scratch, nullptr);
}

// The same in two kernels: dx by rows, and the sums of `rows` rows by columns.
extern "C" __global__ void rmsnorm_backward_any(floatX *dx, const floatX *dout, const floatX *x, const float *rstd,
                                                const floatX *w, int M, int C, float offset) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= M) return;
    size_t start = static_cast<size_t>(row) * C;
    dx += start, dout += start, x += start;
    float r = rstd[row], sum = 0.0f; // of g n
    for (int i = threadIdx.x; i < C; i += WARP)
        sum += to_float(dout[i]) * (offset + to_float(w[i])) * (to_float(x[i]) * r);
    sum = warp_sum(sum) / C;
    for (int i = threadIdx.x; i < C; i += WARP) {
        float g = to_float(dout[i]) * (offset + to_float(w[i])), n = to_float(x[i]) * r;
        dx[i] = from_float<floatX>(to_float(dx[i]) + r * (g - n * sum));
    }
}

extern "C" __global__ void rmsnorm_columns_any(float *partial, const floatX *dout, const floatX *x, const float *rstd,
                                               int M, int C, int rows) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, stop = min(M, (static_cast<int>(blockIdx.y) + 1) * rows);
    if (c >= C) return;
    float dw = 0.0f;
    for (int row = blockIdx.y * rows; row < stop; row++) {
        size_t i = static_cast<size_t>(row) * C + c;
        dw += to_float(dout[i]) * (to_float(x[i]) * rstd[row]);
    }
    partial[static_cast<size_t>(blockIdx.y) * C + c] = dw;
}

// dw (+)= the sums of all blocks.
extern "C" __global__ void rmsnorm_combine(floatX *dw, const float *partial, int chunks, int C, int accumulate) {
    __shared__ float sums[WARP][WARP + 1];
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = sum_of_chunks(partial, c, chunks, C, sums);
    if (threadIdx.y > 0 || c >= C) return;
    dw[c] = from_float<floatX>(accumulate ? to_float(dw[c]) + sum : sum);
}
