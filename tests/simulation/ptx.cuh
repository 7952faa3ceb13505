// The twin of llmc/_cuda/ptx.cuh in plain C++: the same functions, of which those of a warp let its lanes meet.
//
// As there: misplaced addresses fault, copies arrive when they are waited for and not before, denormal numbers are
// flushed by exp2_approx, which is off by two units, NaN becomes 0x7fff in bf16.  Not as there: a product's 16 terms
// are summed in double.
#pragma once

namespace simulation {

inline float from_bf16(unsigned bits) { return __uint_as_float(bits << 16); }

inline void aligned(const void *p, unsigned bytes, const char *what, const char *file, int line) {
    if (reinterpret_cast<uintptr_t>(p) % bytes) simulation_fail(what, file, line);
}

struct Matrices {
    const void *row;
    unsigned *r;
};

// r[i] of a lane: of matrix i, two neighbours in a row; transposed, two in a column.
template <bool TRANSPOSED> inline void load_matrices(Matrices **lanes, unsigned) {
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < 32; lane++) {
            unsigned short pair[2];
            for (int e = 0; e < 2; e++) {
                int row = lane / 4, column = lane % 4 * 2 + e;
                const Matrices &source = *lanes[8 * i + (TRANSPOSED ? column : row)];
                pair[e] = static_cast<const unsigned short *>(source.row)[TRANSPOSED ? row : column];
            }
            lanes[lane]->r[i] = pair[0] | unsigned(pair[1]) << 16;
        }
}

struct Product {
    float *d;
    const unsigned *a;
    unsigned b[2];
};

inline void multiply(Product **lanes, unsigned) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Product &p = *lanes[lane];
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++)
            for (int e = 0; e < 2; e++)
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = from_bf16(p.a[i] >> (16 * e) & 0xffff);
        for (int i = 0; i < 2; i++)
            for (int e = 0; e < 2; e++) b[2 * t + 8 * i + e][g] = from_bf16(p.b[i] >> (16 * e) & 0xffff);
    }
    for (int row = 0; row < 16; row++) {
        double sum[8] = {};
        for (int k = 0; k < 16; k++)
            for (int column = 0; column < 8; column++) sum[column] += double(a[row][k]) * b[k][column];
        for (int column = 0; column < 8; column++) {
            float &d = lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
            d = float(d + sum[column]);
        }
    }
}

} // namespace simulation

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, SIMULATION_SITE) {
    simulation::Product operand{d, a, {b0, b1}};
    simulation::together(
        ~0u, operand, [](simulation::Product **lanes, unsigned here) { simulation::multiply(lanes, here); }, "mma",
        file, line);
}

inline void ldmatrix_x4(unsigned (&r)[4], const void *row, SIMULATION_SITE) {
    simulation::aligned(row, 16, "ldmatrix from an address that is no multiple of 16", file, line);
    simulation::Matrices operand{row, r};
    simulation::together(
        ~0u, operand,
        [](simulation::Matrices **lanes, unsigned here) { simulation::load_matrices<false>(lanes, here); }, "ldmatrix",
        file, line);
}

inline void ldmatrix_x4_trans(unsigned (&r)[4], const void *row, SIMULATION_SITE) {
    simulation::aligned(row, 16, "ldmatrix from an address that is no multiple of 16", file, line);
    simulation::Matrices operand{row, r};
    simulation::together(
        ~0u, operand, [](simulation::Matrices **lanes, unsigned here) { simulation::load_matrices<true>(lanes, here); },
        "ldmatrix", file, line);
}

inline void cp_async_16(void *shared, const void *global, int bytes = 16, SIMULATION_SITE) {
    simulation::aligned(shared, 16, "cp.async to an address that is no multiple of 16", file, line);
    simulation::aligned(global, 16, "cp.async from an address that is no multiple of 16", file, line);
    simulation_copy_async(shared, global, 16, unsigned(bytes));
}

inline void cp_async_4(void *shared, const void *global, int bytes = 4, SIMULATION_SITE) {
    simulation::aligned(shared, 4, "cp.async to an address that is no multiple of 4", file, line);
    simulation::aligned(global, 4, "cp.async from an address that is no multiple of 4", file, line);
    simulation_copy_async(shared, global, 4, unsigned(bytes));
}

inline void cp_async_commit() { simulation_copy_commit(); }
template <int N> inline void cp_async_wait() { simulation_copy_wait(N); }

inline unsigned pack_bf16(float low, float high) {
    unsigned result = 0;
    for (float x : {high, low}) {
        unsigned bits = __float_as_uint(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        result = result << 16 | (x == x ? rounded : 0x7fff);
    }
    return result;
}

inline float exp2_approx(float x) {
    float r = simulation::exp2_of(x);
    return r < 0x1p-126f ? 0.0f : r;
}

inline uint4 load_streaming(const void *p, SIMULATION_SITE) {
    simulation::aligned(p, 16, "a 16-byte load from an address that is no multiple of 16", file, line);
    return *static_cast<const uint4 *>(p);
}

inline void store_streaming(void *p, uint4 x, SIMULATION_SITE) {
    simulation::aligned(p, 16, "a 16-byte store to an address that is no multiple of 16", file, line);
    *static_cast<uint4 *>(p) = x;
}
