// Random integers that depend on nothing but their place: Philox4x32-10 (Salmon et al. 2011).
#pragma once

// The counter's four words become four random ones; the key grows by Weyl constants from round to round.
__device__ __forceinline__ uint4 philox(uint4 c, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        unsigned high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ key.x, low1, high0 ^ c.w ^ key.y, low0);
        key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
    }
    return c;
}

__device__ __forceinline__ unsigned low_word(unsigned long long x) { return static_cast<unsigned>(x); }
__device__ __forceinline__ unsigned high_word(unsigned long long x) { return static_cast<unsigned>(x >> 32); }
