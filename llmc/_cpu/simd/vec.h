/* The vector vocabulary: one name per operation, one header per instruction set.
 *
 * A `vec` holds VL floats, a `vecd` VL/2 doubles (one for the scalar set).  Every vec_<isa>.h defines
 *
 *     VL, MR             lanes; rows of a GEMM tile (the tile is MR x 3 VL)
 *     v_load v_store     any 4-byte aligned address
 *     v_load_n v_store_n the first n < VL lanes; the rest read as 0 and are never touched in memory
 *     v_set v_add v_sub v_mul v_div v_sqrt
 *     v_fma(a,b,c)       a*b + c, rounded once where the machine has it
 *     v_max v_min        the SECOND argument where either is NaN (x86's rule), so v_max(bound, x) keeps NaN
 *     v_round            to the nearest integer
 *     v_exp2i            2^n for an integral-valued n in [-126, 127]; 0 for n = -127
 *     v_sum v_hmax       across lanes
 *     v_transpose        VL x VL, in place
 *     v_dot(acc, a, b)   where the set has it, and then HAVE_DOT: acc plus the products of two bf16 pairs per lane
 *     vd_zero vd_sum vd_sqacc(acc, x)   acc += x*x in double, all lanes of x
 *
 * What can be said with these alone (v_exp below) is written once, here.
 */
#ifndef LLMC_VEC_H
#define LLMC_VEC_H

#include <stddef.h>
#include <stdint.h>

#if defined(LLMC_ISA_SCALAR)
#include "vec_scalar.h"
#elif defined(LLMC_ISA_AVX2)
#include "vec_avx2.h"
#elif defined(LLMC_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(LLMC_ISA_NEON)
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

/* e^x within 2 ulp for x in [-87.33, 88.37]: 0 below (so that no denormal is born to slow later products),
 * e^88.37 above, NaN where x is NaN.
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

#endif
