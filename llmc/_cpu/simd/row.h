/* One row: normalisation, rotary embedding, softmax, cross-entropy. */
#include "vec.h"

#include <float.h>
#include <math.h>

enum { SUM_CHUNK = 32 * VL }; /* lanes are folded into a double this often, so long rows keep their precision */

static float row_max(const float *x, ptrdiff_t n) {
    vec m = v_set(-FLT_MAX);
    ptrdiff_t i = 0;
    for (; i + VL <= n; i += VL) m = v_max(m, v_load(x + i));
    float out = v_hmax(m);
    for (; i < n; i++) out = out > x[i] ? out : x[i];
    return out;
}

/* sum of (x - shift)^power over a row, power 1 or 2 */
ALWAYS_INLINE double row_sum(const float *x, ptrdiff_t n, float shift, const int power) {
    double total = 0.0;
    for (ptrdiff_t start = 0; start < n; start += SUM_CHUNK) {
        ptrdiff_t end = start + SUM_CHUNK < n ? start + SUM_CHUNK : n, i = start;
        vec acc = v_set(0.0f);
        for (; i + VL <= end; i += VL) {
            vec d = v_sub(v_load(x + i), v_set(shift));
            acc = power == 2 ? v_fma(d, d, acc) : v_add(acc, d);
        }
        double part = v_sum(acc);
        for (; i < end; i++) {
            double d = (double)x[i] - shift;
            part += power == 2 ? d * d : d;
        }
        total += part;
    }
    return total;
}

/* out = (x - mean) rstd w + b */
static void layernorm_row(float *out, float *mean, float *rstd, const float *x, const float *w, const float *b,
                          ptrdiff_t C, float eps) {
    /* The mean is refined by the mean of what is left: a large common offset then costs no digits. */
    float m = C ? (float)(row_sum(x, C, 0.0f, 1) / (double)C) : 0.0f;
    float rest = C ? (float)(row_sum(x, C, m, 1) / (double)C) : 0.0f;
    double var = C ? row_sum(x, C, m, 2) / (double)C - (double)rest * rest : 0.0;
    float r = (float)(1.0 / sqrt(var + (double)eps));
    for (ptrdiff_t i = 0; i < C; i += VL) {
        vec d = v_sub(v_sub(load_upto(x + i, C - i), v_set(m)), v_set(rest));
        vec y = v_fma(v_mul(d, v_set(r)), load_upto(w + i, C - i), load_upto(b + i, C - i));
        store_upto(out + i, y, C - i);
    }
    *mean = m + rest;
    *rstd = r;
}

/* With n = (x - mean) rstd and g = dout w:
 *     dx += rstd (g - mean(g) - n mean(g n));   dw += dout n;   db += dout
 * dw and db may both be NULL. */
ALWAYS_INLINE void layernorm_backward_body(float *dx, float *dw, float *db, const float *dout, const float *x,
                                           const float *w, float mean, float rstd, ptrdiff_t C, const int trained) {
    vec m = v_set(mean), r = v_set(rstd), sum_g = v_set(0.0f), sum_gn = v_set(0.0f);
    for (ptrdiff_t i = 0; i < C; i += VL) {
        ptrdiff_t k = C - i;
        vec d = load_upto(dout + i, k), n = v_mul(v_sub(load_upto(x + i, k), m), r);
        vec g = v_mul(d, load_upto(w + i, k));
        sum_g = v_add(sum_g, g);
        sum_gn = v_fma(g, n, sum_gn); /* lanes past the end have d = 0 */
        if (trained) {
            store_upto(dw + i, v_fma(d, n, load_upto(dw + i, k)), k);
            store_upto(db + i, v_add(d, load_upto(db + i, k)), k);
        }
    }
    vec mean_g = v_set(v_sum(sum_g) / (float)C), mean_gn = v_set(v_sum(sum_gn) / (float)C);
    for (ptrdiff_t i = 0; i < C; i += VL) {
        ptrdiff_t k = C - i;
        vec n = v_mul(v_sub(load_upto(x + i, k), m), r);
        vec g = v_mul(load_upto(dout + i, k), load_upto(w + i, k));
        vec t = v_sub(v_sub(g, mean_g), v_mul(n, mean_gn));
        store_upto(dx + i, v_fma(t, r, load_upto(dx + i, k)), k);
    }
}

static void layernorm_backward_row(float *dx, float *dw, float *db, const float *dout, const float *x, const float *w,
                                   float mean, float rstd, ptrdiff_t C) {
    if (dw)
        layernorm_backward_body(dx, dw, db, dout, x, w, mean, rstd, C, 1);
    else
        layernorm_backward_body(dx, NULL, NULL, dout, x, w, mean, rstd, C, 0);
}

/* out = x rstd (offset + w), rstd = 1 / sqrt(mean of x^2 + eps).  The squares are summed in double: those of float32
 * numbers neither overflow nor vanish there. */
static void rmsnorm_row(float *out, float *rstd, const float *x, const float *w, ptrdiff_t C, float eps, float offset) {
    float r = (float)(1.0 / sqrt((C ? sumsq_span(x, C) / (double)C : 0.0) + (double)eps));
    for (ptrdiff_t i = 0; i < C; i += VL) {
        vec factor = v_add(v_set(offset), load_upto(w + i, C - i));
        store_upto(out + i, v_mul(v_mul(load_upto(x + i, C - i), v_set(r)), factor), C - i);
    }
    *rstd = r;
}

/* With n = x rstd and g = dout (offset + w):
 *     dx += rstd (g - n mean(g n));   dw += dout n
 * dw may be NULL. */
ALWAYS_INLINE void rmsnorm_backward_body(float *dx, float *dw, const float *dout, const float *x, const float *w,
                                         float rstd, ptrdiff_t C, float offset, const int trained) {
    vec r = v_set(rstd), o = v_set(offset), sum_gn = v_set(0.0f);
    for (ptrdiff_t i = 0; i < C; i += VL) {
        ptrdiff_t k = C - i;
        vec d = load_upto(dout + i, k), n = v_mul(load_upto(x + i, k), r);
        vec g = v_mul(d, v_add(o, load_upto(w + i, k)));
        sum_gn = v_fma(g, n, sum_gn); /* lanes past the end have d = 0 */
        if (trained) store_upto(dw + i, v_fma(d, n, load_upto(dw + i, k)), k);
    }
    vec mean_gn = v_set(v_sum(sum_gn) / (float)C);
    for (ptrdiff_t i = 0; i < C; i += VL) {
        ptrdiff_t k = C - i;
        vec n = v_mul(load_upto(x + i, k), r);
        vec g = v_mul(load_upto(dout + i, k), v_add(o, load_upto(w + i, k)));
        store_upto(dx + i, v_fma(v_sub(g, v_mul(n, mean_gn)), r, load_upto(dx + i, k)), k);
    }
}

static void rmsnorm_backward_row(float *dx, float *dw, const float *dout, const float *x, const float *w, float rstd,
                                 ptrdiff_t C, float offset) {
    if (dw)
        rmsnorm_backward_body(dx, dw, dout, x, w, rstd, C, offset, 1);
    else
        rmsnorm_backward_body(dx, NULL, dout, x, w, rstd, C, offset, 0);
}

/* One token's heads of D channels, turned in place by the angles whose D/2 cosines and D/2 sines are in `table`:
 *     x[i], x[i + D/2] = x[i] c - x[i + D/2] s, x[i + D/2] c + x[i] s
 * `direction` is 1, or -1 to turn back. */
static void rope_row(float *x, const float *table, ptrdiff_t heads, ptrdiff_t D, float direction) {
    ptrdiff_t half = D / 2;
    for (ptrdiff_t h = 0; h < heads; h++, x += D)
        for (ptrdiff_t i = 0; i < half; i += VL) {
            ptrdiff_t k = half - i;
            vec c = load_upto(table + i, k), s = v_mul(v_set(direction), load_upto(table + half + i, k));
            vec a = load_upto(x + i, k), b = load_upto(x + half + i, k);
            store_upto(x + i, v_sub(v_mul(a, c), v_mul(b, s)), k);
            store_upto(x + half + i, v_fma(b, c, v_mul(a, s)), k);
        }
}

/* The sum of e^(scale x - shift) over n floats, which these become where `store`. */
ALWAYS_INLINE double row_exp_body(float *x, ptrdiff_t n, float scale, float shift, const int store) {
    double total = 0.0;
    for (ptrdiff_t start = 0; start < n; start += SUM_CHUNK) {
        ptrdiff_t end = start + SUM_CHUNK < n ? start + SUM_CHUNK : n, i = start;
        vec acc = v_set(0.0f), s = v_set(scale), h = v_set(-shift);
        for (; i + VL <= end; i += VL) {
            vec e = v_exp(v_fma(s, v_load(x + i), h));
            if (store) v_store(x + i, e);
            acc = v_add(acc, e);
        }
        total += v_sum(acc);
        if (i < end) {
            float last[VL], *p = store ? x + i : last;
            v_store_n(p, v_exp(v_fma(s, v_load_n(x + i, end - i), h)), end - i);
            for (ptrdiff_t j = 0; j < end - i; j++) total += p[j];
        }
    }
    return total;
}

static double row_exp(float *x, ptrdiff_t n, float scale, float shift) { return row_exp_body(x, n, scale, shift, 1); }

/* One block of an online softmax (Milakov & Gimelshein 2018).  The row so far has maximum *m and
 * denominator *l (start with -inf and 0); s[0..n) are its next scores, times `scale`.  They become
 * e^(scale s - m'), s[n..width) becomes 0 (the future), and the returned factor rescales what was
 * accumulated before. */
static float softmax_block(float *s, ptrdiff_t n, ptrdiff_t width, float scale, float *m, float *l) {
    float top = scale * row_max(s, n);
    float new_m = *m > top ? *m : top;
    float keep = *l > 0.0f ? expf(*m - new_m) : 0.0f;
    *l = *l * keep + (float)row_exp(s, n, scale, new_m);
    *m = new_m;
    for (ptrdiff_t i = n; i < width; i++) s[i] = 0.0f;
    return keep;
}

/* Backward of one block: with p = e^(scale s - lse), s becomes p and dp becomes p (dp - delta) scale over the first n;
 * both 0 up to `width`.  With softcap > 0 s are scores that were scaled and capped before: p = e^(s - lse), and dp also
 * takes the cap's slope, 1 - (s / softcap)^2. */
static void softmax_backward_block(float *s, float *dp, ptrdiff_t n, ptrdiff_t width, float scale, float softcap,
                                   float lse, float delta) {
    if (softcap > 0.0f) {
        vec part = v_set(1.0f / softcap), one = v_set(1.0f);
        for (ptrdiff_t i = 0; i < n; i += VL) {
            vec t = v_mul(load_upto(s + i, n - i), part), slope = v_mul(v_sub(one, t), v_add(one, t));
            vec d = v_sub(load_upto(dp + i, n - i), v_set(delta));
            store_upto(dp + i, v_mul(v_mul(d, v_set(scale)), slope), n - i);
        }
        row_exp(s, n, 1.0f, lse);
        for (ptrdiff_t i = 0; i < n; i += VL)
            store_upto(dp + i, v_mul(load_upto(s + i, n - i), load_upto(dp + i, n - i)), n - i);
    } else {
        row_exp(s, n, scale, lse);
        for (ptrdiff_t i = 0; i < n; i += VL) {
            vec p = load_upto(s + i, n - i), d = load_upto(dp + i, n - i);
            store_upto(dp + i, v_mul(v_mul(p, v_set(scale)), v_sub(d, v_set(delta))), n - i);
        }
    }
    for (ptrdiff_t i = n; i < width; i++) s[i] = dp[i] = 0.0f;
}

/* Loss of one row of V logits; with `train` the logits become scale (softmax - one_hot(target)). */
static float crossentropy_row(float *logits, ptrdiff_t V, ptrdiff_t target, float scale, int train) {
    float top = row_max(logits, V), at_target = logits[target];
    double sum = row_exp(logits, V, 1.0f, top);
    if (train) {
        vec f = v_set((float)((double)scale / sum));
        float p = logits[target];
        for (ptrdiff_t i = 0; i < V; i += VL) store_upto(logits + i, v_mul(load_upto(logits + i, V - i), f), V - i);
        /* p/sum - 1 in double: near 1 the difference is what matters */
        logits[target] = (float)((double)scale * ((double)p / sum - 1.0));
    }
    return (float)(log(sum) + (double)top - (double)at_target);
}

/* The same of logits that are first capped, l = cap tanh(logit / cap), back to the logits before: times
 * dl/dlogit = 1 - (l / cap)^2.  The slope needs l, so the exponentials are summed without being kept, and taken again.
 */
static float capped_crossentropy_row(float *logits, ptrdiff_t V, ptrdiff_t target, float scale, float cap, int train) {
    softcap_span(logits, V, 1.0f, cap);
    float top = row_max(logits, V), at_target = logits[target];
    double sum = row_exp_body(logits, V, 1.0f, top, 0);
    if (train) {
        vec f = v_set((float)((double)scale / sum)), h = v_set(-top), share = v_set(1.0f / cap), one = v_set(1.0f);
        for (ptrdiff_t i = 0; i < V; i += VL) {
            vec l = load_upto(logits + i, V - i), t = v_mul(l, share);
            vec slope = v_mul(v_sub(one, t), v_add(one, t));
            store_upto(logits + i, v_mul(v_mul(v_exp(v_add(l, h)), f), slope), V - i);
        }
        double t = (double)at_target / (double)cap, p = exp((double)at_target - (double)top) / sum;
        logits[target] = (float)((double)scale * (p - 1.0) * (1.0 - t) * (1.0 + t));
    }
    return (float)(log(sum) + (double)top - (double)at_target);
}
