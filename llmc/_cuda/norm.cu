// LayerNorm (Ba, Kiros & Hinton 2016):
//
//     out = (x - mean) rstd w + b,  rstd = 1 / sqrt(var + eps), along rows of C channels
//
// A row lies in the registers of `blockDim.x` threads (whole warps), at most HELD packs of 16 bytes in each, so that it
// is read once, and mean and variance are two exact passes over what is held; in the second the mean is refined by the
// mean of what is left, so that a large common offset costs no digits.  blockDim.y rows share a block.
//
// Kernels whose names end in _any take every width and every alignment: a warp for each row, which it reads again.
#include "norm.cuh"

constexpr int MOST_THREADS = 192; // of a block of the kernels that hold rows

// total = x + branch where RESIDUAL, and the norm of what has been stored; else the norm of x.
//
// Bytes moved: 2 C each row, or 4 C with the sum, and w and b from L1.
template <bool RESIDUAL>
__device__ __forceinline__ void forward(floatX *total, floatX *out, float *mean, float *rstd, const floatX *x,
                                        const floatX *branch, const floatX *__restrict__ w,
                                        const floatX *__restrict__ b, int M, int C, float eps, float2 *scratch) {
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
            sum += v[k][j];
        }
        if (RESIDUAL) store<PACK>(total + start + i * PACK, v[k]);
    }
    float m = at.sum(sum, scratch) / C;
    float2 rest = make_float2(0.0f, 0.0f); // the sums of x - m and of its square
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        if (threadIdx.x + k * blockDim.x >= packs) continue;
#pragma unroll
        for (int j = 0; j < PACK; j++) {
            v[k][j] -= m;
            rest.x += v[k][j];
            rest.y += v[k][j] * v[k][j];
        }
    }
    rest = at.sum(rest, scratch);
    float d = rest.x / C, r = 1.0f / sqrtf(rest.y / C - d * d + eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int i = threadIdx.x + k * blockDim.x;
        if (i >= packs) continue;
        float scale[PACK], shift[PACK];
        load<PACK>(scale, w + i * PACK);
        load<PACK>(shift, b + i * PACK);
#pragma unroll
        for (int j = 0; j < PACK; j++) v[k][j] = (v[k][j] - d) * r * scale[j] + shift[j];
        store<PACK>(out + start + i * PACK, v[k]);
    }
    if (threadIdx.x == 0 && at.row < M) mean[at.row] = m + d, rstd[at.row] = r;
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    layernorm_forward(floatX *out, float *mean, float *rstd, const floatX *x, const floatX *w, const floatX *b, int M,
                      int C, float eps) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    forward<false>(nullptr, out, mean, rstd, x, nullptr, w, b, M, C, eps, scratch);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    residual_layernorm_forward(floatX *total, floatX *out, float *mean, float *rstd, const floatX *x,
                               const floatX *branch, const floatX *w, const floatX *b, int M, int C, float eps) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    forward<true>(total, out, mean, rstd, x, branch, w, b, M, C, eps, scratch);
}

// Both of the above; without a sum x is normalised itself, and total and branch are null.
extern "C" __global__ void layernorm_forward_any(floatX *total, floatX *out, float *mean, float *rstd, const floatX *x,
                                                 const floatX *branch, const floatX *w, const floatX *b, int M, int C,
                                                 float eps) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= M) return;
    size_t start = static_cast<size_t>(row) * C;
    if (total) // each lane reads again what it wrote itself
        for (int i = threadIdx.x; i < C; i += WARP)
            total[start + i] = from_float<floatX>(to_float(x[start + i]) + to_float(branch[start + i]));
    const floatX *v = (total ? total : x) + start;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < C; i += WARP) sum += to_float(v[i]);
    float m = warp_sum(sum) / C;
    float2 rest = make_float2(0.0f, 0.0f);
    for (int i = threadIdx.x; i < C; i += WARP) {
        float left = to_float(v[i]) - m;
        rest.x += left, rest.y += left * left;
    }
    rest = warp_sum(rest);
    float d = rest.x / C, r = 1.0f / sqrtf(rest.y / C - d * d + eps);
    for (int i = threadIdx.x; i < C; i += WARP)
        out[start + i] = from_float<floatX>((to_float(v[i]) - m - d) * r * to_float(w[i]) + to_float(b[i]));
    if (threadIdx.x == 0) mean[row] = m + d, rstd[row] = r;
}

// With n = (x - mean) rstd and g = dout w:
//
//     dx += rstd (g - mean(g) - n mean(g n));  dw = sum of dout n;  db = sum of dout, over all rows
//
// Each block takes `rows` rows and leaves its sums, dw's C and then db's, as row blockIdx.x of `partial`: its threads
// sum their own columns in registers, row after row, and the blockDim.y of a block are added in order.  `sums` is 2 C
// floats of shared memory if blockDim.y > 1.  Without SUMS, dx alone.
//
// Bytes moved: 4 C each row.
template <bool SUMS>
__device__ __forceinline__ void backward(floatX *dx, float *partial, const floatX *dout, const floatX *x,
                                         const float *mean, const float *rstd, const floatX *__restrict__ w, int M,
                                         int C, int rows, float2 *scratch, float *sums) {
    Place at;
    int stop = min(M, (static_cast<int>(blockIdx.x) + 1) * rows);
    float dw[HELD][PACK], db[HELD][PACK];
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
        for (int j = 0; j < PACK; j++) dw[k][j] = 0.0f, db[k][j] = 0.0f;

    for (int begin = blockIdx.x * rows; begin < stop; begin += blockDim.y) {
        int row = begin + threadIdx.y;
        int packs = row < stop ? C / PACK : 0;
        size_t start = static_cast<size_t>(row) * C;
        float m = row < stop ? mean[row] : 0.0f, r = row < stop ? rstd[row] : 0.0f;
        uint4 first[HELD], second[HELD], third[HELD]; // nothing is unpacked before all is on its way
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            first[k] = i < packs ? load_16<Use::AGAIN>(dout + start + i * PACK) : NOTHING;
            second[k] = i < packs ? load_16<Use::AGAIN>(x + start + i * PACK) : NOTHING;
            third[k] = i < packs ? load_16<Use::AGAIN>(dx + start + i * PACK) : NOTHING;
        }
        float d[HELD][PACK], n[HELD][PACK], before[HELD][PACK], scale[PACK];
        float2 sum = make_float2(0.0f, 0.0f); // of g, of g n
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) continue;
            unpack<floatX>(d[k], first[k]);
            unpack<floatX>(n[k], second[k]);
            unpack<floatX>(before[k], third[k]);
            load<PACK>(scale, w + i * PACK);
#pragma unroll
            for (int j = 0; j < PACK; j++) {
                n[k][j] = (n[k][j] - m) * r;
                if (SUMS) dw[k][j] += d[k][j] * n[k][j], db[k][j] += d[k][j];
                d[k][j] *= scale[j]; // g from here on
                sum.x += d[k][j];
                sum.y += d[k][j] * n[k][j];
            }
        }
        sum = at.sum(sum, scratch);
        sum.x /= C, sum.y /= C;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int i = threadIdx.x + k * blockDim.x;
            if (i >= packs) continue;
#pragma unroll
            for (int j = 0; j < PACK; j++) before[k][j] += r * (d[k][j] - sum.x - n[k][j] * sum.y);
            store<PACK>(dx + start + i * PACK, before[k]);
        }
    }

    if (!SUMS) return;
    float *last = partial + static_cast<size_t>(blockIdx.x) * 2 * C;
    for (int y = 0; y < blockDim.y; y++) {
        bool finish = y + 1 == blockDim.y;
        if (threadIdx.y == y) {
#pragma unroll
            for (int k = 0; k < HELD; k++) {
                int i = (threadIdx.x + k * blockDim.x) * PACK;
                if (i >= C) continue;
#pragma unroll
                for (int j = 0; j < PACK; j++) {
                    if (y > 0) dw[k][j] += sums[i + j], db[k][j] += sums[C + i + j];
                    if (!finish) sums[i + j] = dw[k][j], sums[C + i + j] = db[k][j];
                }
                if (finish) {
                    store<PACK>(last + i, dw[k]);
                    store<PACK>(last + C + i, db[k]);
                }
            }
        }
        if (!finish) __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    layernorm_backward(floatX *dx, float *partial, const floatX *dout, const floatX *x, const float *mean,
                       const float *rstd, const floatX *w, int M, int C, int rows) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    SHARED(float, sums);
    backward<true>(dx, partial, dout, x, mean, rstd, w, M, C, rows, scratch, sums);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)
    layernorm_backward_input(floatX *dx, const floatX *dout, const floatX *x, const float *mean, const float *rstd,
                             const floatX *w, int M, int C, int rows) {
    __shared__ float2 scratch[MOST_THREADS / WARP];
    backward<false>(dx, nullptr, dout, x, mean, rstd, w, M, C, rows, scratch, nullptr);
}

// The same in two kernels: dx by rows, and the sums of `rows` rows by columns.
extern "C" __global__ void layernorm_backward_any(floatX *dx, const floatX *dout, const floatX *x, const float *mean,
                                                  const float *rstd, const floatX *w, int M, int C) {
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= M) return;
    size_t start = static_cast<size_t>(row) * C;
    dx += start, dout += start, x += start;
    float m = mean[row], r = rstd[row];
    float2 sum = make_float2(0.0f, 0.0f); // of g, of g n
    for (int i = threadIdx.x; i < C; i += WARP) {
        float g = to_float(dout[i]) * to_float(w[i]);
        sum.x += g, sum.y += g * ((to_float(x[i]) - m) * r);
    }
    sum = warp_sum(sum);
    sum.x /= C, sum.y /= C;
    for (int i = threadIdx.x; i < C; i += WARP) {
        float g = to_float(dout[i]) * to_float(w[i]), n = (to_float(x[i]) - m) * r;
        dx[i] = from_float<floatX>(to_float(dx[i]) + r * (g - sum.x - n * sum.y));
    }
}

extern "C" __global__ void layernorm_columns_any(float *partial, const floatX *dout, const floatX *x, const float *mean,
                                                 const float *rstd, int M, int C, int rows) {
    int c = blockIdx.x * blockDim.x + threadIdx.x, stop = min(M, (static_cast<int>(blockIdx.y) + 1) * rows);
    if (c >= C) return;
    float dw = 0.0f, db = 0.0f;
    for (int row = blockIdx.y * rows; row < stop; row++) {
        size_t i = static_cast<size_t>(row) * C + c;
        dw += to_float(dout[i]) * ((to_float(x[i]) - mean[row]) * rstd[row]);
        db += to_float(dout[i]);
    }
    partial += static_cast<size_t>(blockIdx.y) * 2 * C;
    partial[c] = dw, partial[C + c] = db;
}

// dw, db (+)= the sums of all blocks.
extern "C" __global__ void layernorm_combine(floatX *dw, floatX *db, const float *partial, int chunks, int C,
                                             int accumulate) {
    __shared__ float sums[WARP][WARP + 1];
    int c = blockIdx.x * WARP + threadIdx.x;
    float sum = sum_of_chunks(partial, c, chunks, 2 * C, sums);
    if (threadIdx.y > 0 || c >= 2 * C) return;
    floatX *out = c < C ? dw + c : db + (c - C);
    *out = from_float<floatX>(accumulate ? to_float(*out) + sum : sum);
}
