/* Random numbers that depend on nothing but their place: Philox4x32-10 (Salmon et al. 2011) and Box & Muller (1958). */
#include "kernels.h"
#include "vec.h"

/* The counter c (four words) becomes four random ones; the key grows by Weyl constants from round to round. */
ALWAYS_INLINE void philox(vecu c[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        vecu hi0, hi1;
        vecu lo0 = vu_mul(c[0], vu_set(0xD2511F53u), &hi0), lo1 = vu_mul(c[2], vu_set(0xCD9E8D57u), &hi1);
        c[0] = vu_xor(vu_xor(hi1, c[1]), vu_set(key0));
        c[1] = lo1;
        c[2] = vu_xor(vu_xor(hi0, c[3]), vu_set(key1));
        c[3] = lo0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

/* Two random words -> two independent normal numbers, each within 16 units of 2^-24 of its own size: half of v_log's 4
 * and 1 of the root, v_sincospi's 12, and the product.
 *
 * The radius comes from u = max(w0, 1/2) / 2^32, in (0, 1], where w0 is rounded to float; its tail ends at 6.76.  The
 * angle, pi x, has w1's upper 24 bits, which a float holds exactly. */
ALWAYS_INLINE void normal_pair(vecu w0, vecu w1, vec *first, vec *second) {
    vec u = v_mul(v_max(v_set(0.5f), v_from_u(w0)), v_set(0x1p-32f));
    vec r = v_sqrt(v_mul(v_set(-2.0f), v_log(u)));
    vec s, c;
    v_sincospi(v_fma(v_from_u(vu_shr8(w1)), v_set(0x1p-23f), v_set(-1.0f)), &s, &c);
    *first = v_mul(r, c);
    *second = v_mul(r, s);
}

/* out = std times normal numbers, n of them from element RANDOM_GROUP * group on, as Ops.normal in llmc/ops.py says: a
 * group is 64 elements from the words of 16 counters, word j of counter l being element 16 j + l.  That order suits any
 * VL up to 16, and needs no shuffle. */
static void normal_span(float *out, ptrdiff_t n, uint64_t seed, uint64_t stream, uint64_t group, float std) {
    for (; n > 0; n -= RANDOM_GROUP, out += RANDOM_GROUP, group++)
        for (int l = 0; l < 16 && l < n; l += VL) {
            uint64_t counter = 16 * group + (uint64_t)l; /* adding a lane to its lower word carries nothing */
            vecu w[4] = {vu_add(vu_set((uint32_t)counter), vu_lanes()), vu_set((uint32_t)(counter >> 32)),
                         vu_set((uint32_t)stream), vu_set((uint32_t)(stream >> 32))};
            philox(w, (uint32_t)seed, (uint32_t)(seed >> 32));
            vec z[4];
            normal_pair(w[0], w[1], &z[0], &z[1]);
            normal_pair(w[2], w[3], &z[2], &z[3]);
            for (int j = 0; j < 4 && 16 * j + l < n; j++)
                store_upto(out + 16 * j + l, v_mul(z[j], v_set(std)), n - 16 * j - l);
        }
}
