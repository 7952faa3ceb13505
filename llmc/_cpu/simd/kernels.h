/* What one instruction set offers: a table of functions, and the size of its GEMM tile.  `kernels.c` is compiled
 * once per set and emits one table; the .pyx files call through the active one.  Nothing in here starts a
 * thread or checks a shape.  The functions are described where they are defined: gemm.h, row.h, map.h, philox.h,
 * peak.h. */
#ifndef LLMC_KERNELS_H
#define LLMC_KERNELS_H

#include <stddef.h>
#include <stdint.h>

enum { RANDOM_GROUP = 64 }; /* elements that `normal_span` makes together */

/* The scalars of an AdamW update.  1 - beta is taken in double before it is rounded (0.999f is off by 1.3e-8, which is
 * 1.3e-5 of 1 - 0.999); the corrections are 1 / (1 - beta^t). */
typedef struct AdamW {
    float lr, beta1, one_minus_beta1, correction1, beta2, one_minus_beta2, correction2, eps, decay, scale;
} AdamW;

typedef void Gemm(float *c, ptrdiff_t ldc, const float *a, ptrdiff_t a_rs, ptrdiff_t a_cs, const float *b,
                  ptrdiff_t b_rs, ptrdiff_t b_cs, ptrdiff_t M, ptrdiff_t N, ptrdiff_t K, int add, const float *bias,
                  float *scratch);
typedef void DotRows(float *out, ptrdiff_t ldo, const float *x, ptrdiff_t ldx, ptrdiff_t M, const void *w,
                     ptrdiff_t ldw, ptrdiff_t K, ptrdiff_t n, const float *bias, float *scratch);

typedef void GateForward(float *out, const float *gate, const float *up, ptrdiff_t n);
typedef void GateBackward(float *dgate, float *dup, const float *dout, const float *gate, const float *up, ptrdiff_t n);

typedef struct Kernels {
    const char *name;
    int tile_rows, tile_rows_bf16, tile_columns;
    int has_dot;            /* whether gemm_bf16 multiplies pairs; else it rounds, and multiplies in fp32 */
    ptrdiff_t gemm_scratch; /* floats */

    Gemm *gemm, *gemm_bf16;
    DotRows *dot_rows, *dot_rows_bf16;
    void (*mix_rows)(float *out, const float *factor, const float *x, ptrdiff_t ldx, ptrdiff_t rows, ptrdiff_t n);

    void (*layernorm_row)(float *out, float *mean, float *rstd, const float *x, const float *w, const float *b,
                          ptrdiff_t C, float eps);
    void (*layernorm_backward_row)(float *dx, float *dw, float *db, const float *dout, const float *x, const float *w,
                                   float mean, float rstd, ptrdiff_t C);
    void (*rmsnorm_row)(float *out, float *rstd, const float *x, const float *w, ptrdiff_t C, float eps, float offset);
    void (*rmsnorm_backward_row)(float *dx, float *dw, const float *dout, const float *x, const float *w, float rstd,
                                 ptrdiff_t C, float offset);
    void (*rope_row)(float *x, const float *table, ptrdiff_t heads, ptrdiff_t D, float direction);
    float (*softmax_block)(float *s, ptrdiff_t n, ptrdiff_t width, float scale, float *m, float *l);
    void (*softmax_backward_block)(float *s, float *dp, ptrdiff_t n, ptrdiff_t width, float scale, float softcap,
                                   float lse, float delta);
    float (*crossentropy_row)(float *logits, ptrdiff_t V, ptrdiff_t target, float scale, int train);
    float (*capped_crossentropy_row)(float *logits, ptrdiff_t V, ptrdiff_t target, float scale, float cap, int train);

    void (*gelu_forward_span)(float *out, const float *x, ptrdiff_t n);
    void (*gelu_backward_span)(float *dx, const float *dout, const float *x, ptrdiff_t n);
    GateForward *swiglu_forward_span, *geglu_forward_span;
    GateBackward *swiglu_backward_span, *geglu_backward_span;
    void (*add_span)(float *out, const float *a, const float *b, ptrdiff_t n);
    void (*scale_span)(float *x, float factor, ptrdiff_t n);
    void (*axpy_span)(float *y, float factor, const float *x, ptrdiff_t n);
    void (*axpy_bf16_span)(float *y, float factor, const uint16_t *x, ptrdiff_t n);
    void (*widen_span)(float *out, const uint16_t *x, ptrdiff_t n);
    void (*round_span)(uint16_t *out, const float *x, ptrdiff_t n);
    void (*softcap_span)(float *x, ptrdiff_t n, float scale, float cap);
    double (*sumsq_span)(const float *x, ptrdiff_t n);
    float (*dot_span)(const float *a, const float *b, ptrdiff_t n);
    void (*adamw_span)(float *w, float *m, float *v, const float *dw, ptrdiff_t n, const AdamW *update);
    void (*column_sum)(float *sum, const float *x, ptrdiff_t ldx, ptrdiff_t rows, ptrdiff_t n);
    void (*normal_span)(float *out, ptrdiff_t n, uint64_t seed, uint64_t stream, uint64_t group, float std);

    double (*fma_loop)(ptrdiff_t rounds, float *value);
    double (*dot_loop)(ptrdiff_t rounds, float *value);
    float (*stream_span)(float *const *p, int reads, int writes, int updates, ptrdiff_t n);
} Kernels;

#endif
