/* The vector vocabulary: one name per operation, one header per instruction set.
 *
 * A `vec` holds VL floats, a `vecd` VL/2 doubles (one for the scalar set).  Every vec_<isa>.h defines
 *
 *     VL, MR, NV         lanes; rows of a GEMM tile, and its vectors per row (the tile is MR x NV VL)
 *     v_load v_store     any 4-byte aligned address
 *     v_load_n v_store_n the first n < VL lanes; the rest read as 0 and are never touched in memory
 *     v_set v_add v_sub v_mul v_div v_sqrt
 *     v_fma(a,b,c)       a*b + c, rounded once where the machine has it
 *     v_max v_min        the SECOND argument where either is NaN (x86's rule), so v_max(bound, x) keeps NaN
 *     v_round            to the nearest integer
 *     v_exp2i            2^n for an integral-valued n in [-126, 127]; 0 for n = -127
 *     v_sum v_hmax       across lanes
 *     v_transpose        VL x VL, in place
 *     v_round_bf16       lanes rounded to bf16, ties to even; NaN stays NaN
 *     v_load_bf16 v_store_bf16       VL bf16 numbers at any 2-byte address, exactly; rounded as by v_round_bf16
 *     v_load_bf16_n v_store_bf16_n   the first n < VL of them
 *     v_load_bf16_pairs(p, &even, &odd)   2 VL of them, those of even and of odd index
 *     v_frexp(x, &e)     m in [sqrt(1/2), sqrt(2)) and an integral-valued e with x = m 2^e; x > 0, finite and normal
 *     vd_zero vd_sum vd_sqacc(acc, x)   acc += x*x in double, all lanes of x
 *
 * and a `vecu` of VL 32-bit unsigned integers:
 *
 *     vu_set vu_add vu_xor vu_shr8   lane by lane, modulo 2^32; a shift to the right by 8
 *     vu_lanes           0, 1, ..., VL-1
 *     vu_mul(a, b, &hi)  the lower halves of the 64-bit products, and the upper ones
 *     v_from_u           to the nearest float
 *
 * and, where the machine multiplies pairs of bf16 numbers, HAVE_DOT; 32-bit lanes then hold a pair, the first in the
 * low half:
 *
 *     v_dot(acc, a, b)   acc + a.low b.low + a.high b.high, per lane
 *     v_pairs(e, o)      pairs (e[i], o[i]), rounded as above
 *     v_pairs_along(f, s)  pairs of neighbours: f[0] f[1], f[2] f[3] ... s[VL-2] s[VL-1]
 *
 * What can be said with these alone (v_exp, v_tanh, v_log, v_sincospi below) is written once, here.
 */
#ifndef LLMC_VEC_H
#define LLMC_VEC_H

#include <stddef.h>
#include <stdint.h>

#if defined(LLMC_ISA_SCALAR)
#include "vec_scalar.h"
#elif defined(LLMC_ISA_AVX2)
#include "vec_avx2.h"
#elif defined(LLMC_ISA_AVX512) || defined(LLMC_ISA_AVX512BF16) || defined(LLMC_ISA_AMX)
#include "vec_avx512.h"
#elif defined(LLMC_ISA_NEON) || defined(LLMC_ISA_NEONBF16)
#include "vec_neon.h"
#else
#error "compile kernels.c with -DLLMC_ISA_<NAME>"
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* A whole vector, or its first n lanes where a span ends: loops over spans have one body. */
ALWAYS_INLINE vec load_upto(const float *p, ptrdiff_t n) { return n >= VL ? v_load(p) : v_load_n(p, n); }
ALWAYS_INLINE void store_upto(float *p, vec a, ptrdiff_t n) {
    if (n >= VL)
        v_store(p, a);
    else
        v_store_n(p, a, n);
}
ALWAYS_INLINE vec load_bf16_upto(const uint16_t *p, ptrdiff_t n) {
    return n >= VL ? v_load_bf16(p) : v_load_bf16_n(p, n);
}
ALWAYS_INLINE void store_bf16_upto(uint16_t *p, vec a, ptrdiff_t n) {
    if (n >= VL)
        v_store_bf16(p, a);
    else
        v_store_bf16_n(p, a, n);
}

/* e^x within 2 ulp for x in [-87.33, 88.37]: 0 from -87.69 down (so that few denormals are born to slow later
 * products), e^88.37 above, NaN where x is NaN.
 *
 * x = n ln2 + r with |r| <= ln2/2; ln2 is split in two so that r is exact to float precision; e^r is
 * 1 + r (1 + r q(r)), q interpolating (e^r - 1 - r) / r^2 at Chebyshev nodes, which leaves 1 ulp. */
static inline vec v_exp(vec x) {
    x = v_min(v_set(88.37f), v_max(v_set(-88.0f), x));
    vec n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    vec r = v_fma(n, v_set(-0.693145751953125f), x);
    r = v_fma(n, v_set(-1.42860682030941723e-6f), r);
    vec q = v_set(1.989103060e-4f);
    q = v_fma(q, r, v_set(1.393368586e-3f));
    q = v_fma(q, r, v_set(8.333310890e-3f));
    q = v_fma(q, r, v_set(4.166646460e-2f));
    q = v_fma(q, r, v_set(1.666666668e-1f));
    q = v_fma(q, r, v_set(5.000000013e-1f));
    vec e = v_fma(v_fma(q, r, v_set(1.0f)), r, v_set(1.0f));
    return v_mul(e, v_exp2i(n));
}

/* tanh x within 6 units of 2^-24 of its own size, 7 where v_fma rounds twice; NaN where x is NaN.
 *
 * tanh x = m / (m + 2) with m = e^2x - 1.  As in v_exp, 2x = n ln2 + r and e^r - 1 = p = r + r^2 q(r), with relative
 * error of 2 units; m = 2^n p + (2^n - 1) then has 2 for n = 0, where nothing is added, and elsewhere, where |m| is at
 * least 0.29 and 2^n p at most 0.41 or, for n = 1, 0.59 of it, 3.  An error of m counts 2 / (m + 2) < 2 times, and the
 * sum and the quotient bring one each.  From |x| = 10 on the result is 1 in float precision. */
static inline vec v_tanh(vec x) {
    x = v_min(v_set(20.0f), v_max(v_set(-20.0f), v_add(x, x)));
    vec n = v_round(v_mul(x, v_set(1.44269504088896341f)));
    vec r = v_fma(n, v_set(-0.693145751953125f), x);
    r = v_fma(n, v_set(-1.42860682030941723e-6f), r);
    vec q = v_set(1.989103060e-4f);
    q = v_fma(q, r, v_set(1.393368586e-3f));
    q = v_fma(q, r, v_set(8.333310890e-3f));
    q = v_fma(q, r, v_set(4.166646460e-2f));
    q = v_fma(q, r, v_set(1.666666668e-1f));
    q = v_fma(q, r, v_set(5.000000013e-1f));
    vec p = v_fma(v_mul(q, r), r, r), power = v_exp2i(n);
    vec m = v_fma(power, p, v_sub(power, v_set(1.0f)));
    return v_div(m, v_add(m, v_set(2.0f)));
}

/* log x within 4 units of 2^-24 of its own size, for x > 0, finite and normal; exactly 0 at 1.
 *
 * x = m 2^e, f = m - 1 is exact; log m = f - (f^2/2 - f^3 q(f)), q a minimax fit that leaves 0.1 units.  For e = 0 the
 * parenthesis is at most 0.2 of the result and brings less than 1 unit, the last subtraction 1.  Otherwise the result
 * is at least (log 2)/2, half the largest term; e times the upper part of log 2 is exact, and the other roundings
 * (parenthesis, lower part, two sums) come to less than 3.5. */
static inline vec v_log(vec x) {
    vec e, f = v_sub(v_frexp(x, &e), v_set(1.0f)), f2 = v_mul(f, f);
    vec q = v_set(-7.634513413e-2f);
    q = v_fma(q, f, v_set(1.276157779e-1f));
    q = v_fma(q, f, v_set(-1.316017620e-1f));
    q = v_fma(q, f, v_set(1.420175758e-1f));
    q = v_fma(q, f, v_set(-1.662335799e-1f));
    q = v_fma(q, f, v_set(2.000122692e-1f));
    q = v_fma(q, f, v_set(-2.500082101e-1f));
    q = v_fma(q, f, v_set(3.333333171e-1f));
    vec rest = v_sub(v_mul(v_set(0.5f), f2), v_mul(v_mul(f, f2), q));
    rest = v_fma(e, v_set(1.42860682030941723e-6f), v_sub(f, rest));
    return v_fma(e, v_set(0.693145751953125f), rest);
}

/* *s = sin(pi x), *c = cos(pi x), each within 9 units of 2^-24 of its own size, 12 where v_fma rounds twice, for x in
 * [-1, 1) that is a multiple of 2^-23.
 *
 * The zeros are taken out: sin(pi x) = x (1 - x) (1 + x) p(x^2), cos(pi x) = (1 - 2x) (1 + 2x) q(x^2).  What stands in
 * brackets is exact for such x, and p and q fall from pi to pi/2 and from 1 to 1/3 without a zero, so there is neither
 * a reduction nor a choice of quadrant.  The three products give 3 units, the fit 0.1.  In q, which is the worse, at
 * x = 1: the rounding of x^2 1.4, that of each fma relative to 1/3, from the last to the first, 1 + 2 + 0.8 + 0.2; and
 * where it is not fused, 2 + 0.8 + 0.2 more. */
static inline void v_sincospi(vec x, vec *s, vec *c) {
    vec one = v_set(1.0f), y = v_mul(x, x), twice = v_add(x, x);
    vec p = v_set(-3.843732360e-4f);
    p = v_fma(p, y, v_set(6.856217836e-3f));
    p = v_fma(p, y, v_set(-7.518372317e-2f));
    p = v_fma(p, y, v_set(5.240348543e-1f));
    p = v_fma(p, y, v_set(-2.026119296f));
    p = v_fma(p, y, v_set(3.141592641f));
    *s = v_mul(v_mul(x, v_mul(v_sub(one, x), v_add(one, x))), p);
    vec q = v_set(2.227919591e-5f);
    q = v_fma(q, y, v_set(-4.708508822e-4f));
    q = v_fma(q, y, v_set(6.329142966e-3f));
    q = v_fma(q, y, v_set(-5.724813842e-2f));
    q = v_fma(q, y, v_set(3.195030848e-1f));
    q = v_fma(q, y, v_set(-9.348021840e-1f));
    q = v_fma(q, y, one);
    *c = v_mul(v_mul(v_sub(one, twice), v_add(one, twice)), q);
}

#endif
