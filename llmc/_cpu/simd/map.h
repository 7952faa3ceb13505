/* One span: element by element, and sums over a fixed span. */
#include "kernels.h"
#include "vec.h"

/* gelu(x) = x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3).  Since (1 + tanh u)/2 = 1/(1 + e^(-2u)), it is
 * x times a logistic: no tanh, and no cancellation for negative x. */
ALWAYS_INLINE vec gelu_exp(vec x, vec x2) { /* e^(-2u) */
    const float twice = 2.0f * 0.797884560802865f;
    return v_exp(v_mul(x, v_fma(x2, v_set(-twice * 0.044715f), v_set(-twice))));
}

/* Below -12 the value is nothing, and x is held there: e^(-2u) is finite, and x may not be. */
ALWAYS_INLINE vec gelu_value(vec x) {
    vec e = gelu_exp(x, v_mul(x, x));
    return v_div(v_max(v_set(-12.0f), x), v_add(v_set(1.0f), e));
}

/* gelu' = s + x s (1 - s) 2u' with s = 1/(1 + e), 1 - s = s e (no cancellation), e = e^(-2u), and
 * 2u' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2); *value is gelu itself.  Beyond |x| = 12 the second term is nothing, and x
 * is held there lest 0 * inf appear. */
ALWAYS_INLINE vec gelu_slope(vec x, vec *value) {
    const float twice = 2.0f * 0.797884560802865f;
    vec low = v_max(v_set(-12.0f), x), v = v_min(v_set(12.0f), low);
    vec v2 = v_mul(v, v), e = gelu_exp(v, v2), s = v_div(v_set(1.0f), v_add(v_set(1.0f), e));
    vec slope = v_fma(v2, v_set(3.0f * twice * 0.044715f), v_set(twice));
    *value = v_mul(low, s);
    return v_fma(v_mul(v_mul(v, s), v_mul(s, e)), slope, s);
}

/* silu(x) = x s, s = 1/(1 + e^-x).  Below -87 it is nothing, and x is held there: e^-x is finite, and x may not be. */
ALWAYS_INLINE vec silu_value(vec x) {
    vec e = v_exp(v_sub(v_set(0.0f), x));
    return v_div(v_max(v_set(-87.0f), x), v_add(v_set(1.0f), e));
}

/* silu' = s + x s (1 - s), 1 - s = s e^-x, and *value is silu; x is held within 87 lest 0 * inf appear. */
ALWAYS_INLINE vec silu_slope(vec x, vec *value) {
    vec low = v_max(v_set(-87.0f), x), v = v_min(v_set(87.0f), low);
    vec e = v_exp(v_sub(v_set(0.0f), v)), s = v_div(v_set(1.0f), v_add(v_set(1.0f), e));
    *value = v_mul(low, s);
    return v_fma(v_mul(v, s), v_mul(s, e), s);
}

static void gelu_forward_span(float *out, const float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) store_upto(out + i, gelu_value(load_upto(x + i, n - i)), n - i);
}

static void gelu_backward_span(float *dx, const float *dout, const float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) {
        vec value, slope = gelu_slope(load_upto(x + i, n - i), &value);
        store_upto(dx + i, v_mul(load_upto(dout + i, n - i), slope), n - i);
    }
}

/* out = f(gate) up, and its gradient: dgate = dout up f'(gate), dup = dout f(gate).  dgate may be gate, dup may be
 * up. */
#define GATED(NAME, VALUE, SLOPE)                                                                                      \
    static void NAME##_forward_span(float *out, const float *gate, const float *up, ptrdiff_t n) {                     \
        for (ptrdiff_t i = 0; i < n; i += VL)                                                                          \
            store_upto(out + i, v_mul(VALUE(load_upto(gate + i, n - i)), load_upto(up + i, n - i)), n - i);            \
    }                                                                                                                  \
    static void NAME##_backward_span(float *dgate, float *dup, const float *dout, const float *gate, const float *up,  \
                                     ptrdiff_t n) {                                                                    \
        for (ptrdiff_t i = 0; i < n; i += VL) {                                                                        \
            ptrdiff_t k = n - i;                                                                                       \
            vec u = load_upto(up + i, k), d = load_upto(dout + i, k), value;                                           \
            vec slope = SLOPE(load_upto(gate + i, k), &value);                                                         \
            store_upto(dgate + i, v_mul(v_mul(d, u), slope), k);                                                       \
            store_upto(dup + i, v_mul(d, value), k);                                                                   \
        }                                                                                                              \
    }
GATED(swiglu, silu_value, silu_slope)
GATED(geglu, gelu_value, gelu_slope)
#undef GATED

/* out = a + b */
static void add_span(float *out, const float *a, const float *b, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_upto(out + i, v_add(load_upto(a + i, n - i), load_upto(b + i, n - i)), n - i);
}

/* x *= factor */
static void scale_span(float *x, float factor, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) store_upto(x + i, v_mul(load_upto(x + i, n - i), v_set(factor)), n - i);
}

/* y += factor x */
static void axpy_span(float *y, float factor, const float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_upto(y + i, v_fma(v_set(factor), load_upto(x + i, n - i), load_upto(y + i, n - i)), n - i);
}

/* y += factor x, x in bf16 */
static void axpy_bf16_span(float *y, float factor, const uint16_t *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_upto(y + i, v_fma(v_set(factor), load_bf16_upto(x + i, n - i), load_upto(y + i, n - i)), n - i);
}

/* bf16 to float, exactly */
static void widen_span(float *out, const uint16_t *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) store_upto(out + i, load_bf16_upto(x + i, n - i), n - i);
}

/* float to bf16, to nearest, ties to even; NaN stays NaN */
static void round_span(uint16_t *out, const float *x, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += VL) store_bf16_upto(out + i, load_upto(x + i, n - i), n - i);
}

/* x = cap tanh(scale x / cap) */
static void softcap_span(float *x, ptrdiff_t n, float scale, float cap) {
    vec before = v_set((float)((double)scale / (double)cap)), after = v_set(cap);
    for (ptrdiff_t i = 0; i < n; i += VL)
        store_upto(x + i, v_mul(after, v_tanh(v_mul(before, load_upto(x + i, n - i)))), n - i);
}

/* The sum of squares of a span, in double. */
static double sumsq_span(const float *x, ptrdiff_t n) {
    vecd even = vd_zero(), odd = vd_zero();
    ptrdiff_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL) {
        even = vd_sqacc(even, v_load(x + i));
        odd = vd_sqacc(odd, v_load(x + i + VL));
    }
    double sum = vd_sum(even) + vd_sum(odd);
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sum;
}

static float dot_span(const float *a, const float *b, ptrdiff_t n) {
    vec acc = v_set(0.0f);
    for (ptrdiff_t i = 0; i < n; i += VL) acc = v_fma(load_upto(a + i, n - i), load_upto(b + i, n - i), acc);
    return v_sum(acc);
}

/* One AdamW update; see AdamW in kernels.h for the scalars. */
static void adamw_span(float *w, float *m, float *v, const float *dw, ptrdiff_t n, const AdamW *u) {
    vec b1 = v_set(u->beta1), a1 = v_set(u->one_minus_beta1), c1 = v_set(u->correction1);
    vec b2 = v_set(u->beta2), a2 = v_set(u->one_minus_beta2), c2 = v_set(u->correction2);
    for (ptrdiff_t i = 0; i < n; i += VL) {
        ptrdiff_t k = n - i;
        vec g = v_mul(load_upto(dw + i, k), v_set(u->scale)), p = load_upto(w + i, k);
        vec mi = v_fma(b1, load_upto(m + i, k), v_mul(a1, g));
        vec vi = v_fma(b2, load_upto(v + i, k), v_mul(a2, v_mul(g, g)));
        vec step = v_div(v_mul(mi, c1), v_add(v_sqrt(v_mul(vi, c2)), v_set(u->eps)));
        step = v_fma(v_set(u->decay), p, step);
        store_upto(m + i, mi, k);
        store_upto(v + i, vi, k);
        store_upto(w + i, v_sub(p, v_mul(v_set(u->lr), step)), k);
    }
}

/* sum[j] += the sum of column j over `rows` rows of x, ldx apart; n columns.  Sixty-four rows at a time: a long column
 * of small numbers then loses little to a large running sum. */
static void column_sum(float *sum, const float *x, ptrdiff_t ldx, ptrdiff_t rows, ptrdiff_t n) {
    for (ptrdiff_t start = 0; start < rows; start += 64) {
        ptrdiff_t end = start + 64 < rows ? start + 64 : rows;
        ptrdiff_t j = 0;
        for (; j + 4 * VL <= n; j += 4 * VL) {
            vec acc[4] = {v_set(0.0f), v_set(0.0f), v_set(0.0f), v_set(0.0f)};
            for (ptrdiff_t i = start; i < end; i++)
                for (int q = 0; q < 4; q++) acc[q] = v_add(acc[q], v_load(x + i * ldx + j + q * VL));
            for (int q = 0; q < 4; q++) v_store(sum + j + q * VL, v_add(v_load(sum + j + q * VL), acc[q]));
        }
        for (; j < n; j += VL) {
            vec acc = v_set(0.0f);
            for (ptrdiff_t i = start; i < end; i++) acc = v_add(acc, load_upto(x + i * ldx + j, n - j));
            store_upto(sum + j, v_add(load_upto(sum + j, n - j), acc), n - j);
        }
    }
}
