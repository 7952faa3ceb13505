// GELU and its derivative, for every kernel that has them, so that all give the same bits.

#pragma once

#include "common.cuh"

// gelu(x) = x s with the sigmoid s = 1 / (1 + e), e = exp(-2y), y = sqrt(2/pi) (x + 0.044715 x^3): what
// x/2 (1 + tanh y) is, with one exponential.  The constants are -2 log2(e) sqrt(2/pi), and that times 0.044715.
constexpr float SLOPE = -2.30220820f, CUBIC = -0.102943240f;

__device__ __forceinline__ float exp_of_minus_2y(float x) { return exp2_approx(x * (SLOPE + CUBIC * x * x)); }

__device__ __forceinline__ float gelu(float x) { return __fdividef(x, 1.0f + exp_of_minus_2y(x)); }

// gelu'(x) = s + x s (1 - s) 2y', where 1 - s = s e without cancellation.  Beyond 10 it is 0 or 1 to within 2^-120, and
// e no longer overflows.
__device__ __forceinline__ float gelu_slope(float x) {
    constexpr float LIMIT = 10.0f, LN2 = 0.693147181f;
    x = x > LIMIT ? LIMIT : x < -LIMIT ? -LIMIT : x; // NaN stays
    float e = exp_of_minus_2y(x);
    float s = __fdividef(1.0f, 1.0f + e);
    return s + x * (s * (s * e)) * (-LN2 * SLOPE + -LN2 * 3.0f * CUBIC * x * x);
}
