from libc.stdint cimport uint16_t, uint64_t

cdef extern from "simd/kernels.h" nogil:
    enum:
        RANDOM_GROUP

    ctypedef struct AdamW:
        float lr, beta1, one_minus_beta1, correction1, beta2, one_minus_beta2, correction2, eps, decay, scale

    ctypedef void Gemm(float *c, Py_ssize_t ldc, const float *a, Py_ssize_t a_rs, Py_ssize_t a_cs, const float *b,
                       Py_ssize_t b_rs, Py_ssize_t b_cs, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K, int add,
                       const float *bias, float *scratch) noexcept nogil
    ctypedef void DotRows(float *out, Py_ssize_t ldo, const float *x, Py_ssize_t ldx, Py_ssize_t M, const void *w,
                          Py_ssize_t ldw, Py_ssize_t K, Py_ssize_t n, const float *bias,
                          float *scratch) noexcept nogil

    ctypedef void GateForward(float *out, const float *gate, const float *up, Py_ssize_t n) noexcept nogil
    ctypedef void GateBackward(float *dgate, float *dup, const float *dout, const float *gate, const float *up,
                               Py_ssize_t n) noexcept nogil

    ctypedef struct Kernels:
        const char *name
        int tile_rows, tile_rows_bf16, tile_columns, has_dot
        Py_ssize_t gemm_scratch

        Gemm *gemm
        Gemm *gemm_bf16
        DotRows *dot_rows
        DotRows *dot_rows_bf16
        void (*mix_rows)(float *out, const float *factor, const float *x, Py_ssize_t ldx, Py_ssize_t rows,
                         Py_ssize_t n) noexcept nogil

        void (*layernorm_row)(float *out, float *mean, float *rstd, const float *x, const float *w, const float *b,
                              Py_ssize_t C, float eps) noexcept nogil
        void (*layernorm_backward_row)(float *dx, float *dw, float *db, const float *dout, const float *x,
                                       const float *w, float mean, float rstd, Py_ssize_t C) noexcept nogil
        void (*rmsnorm_row)(float *out, float *rstd, const float *x, const float *w, Py_ssize_t C, float eps,
                            float offset) noexcept nogil
        void (*rmsnorm_backward_row)(float *dx, float *dw, const float *dout, const float *x, const float *w,
                                     float rstd, Py_ssize_t C, float offset) noexcept nogil
        void (*rope_row)(float *x, const float *table, Py_ssize_t heads, Py_ssize_t D, float direction) noexcept nogil
        float (*softmax_block)(float *s, Py_ssize_t n, Py_ssize_t width, float scale, float *m,
                               float *l) noexcept nogil
        void (*softmax_backward_block)(float *s, float *dp, Py_ssize_t n, Py_ssize_t width, float scale,
                                       float softcap, float lse, float delta) noexcept nogil
        float (*crossentropy_row)(float *logits, Py_ssize_t V, Py_ssize_t target, float scale,
                                  int train) noexcept nogil
        float (*capped_crossentropy_row)(float *logits, Py_ssize_t V, Py_ssize_t target, float scale, float cap,
                                         int train) noexcept nogil

        void (*gelu_forward_span)(float *out, const float *x, Py_ssize_t n) noexcept nogil
        void (*gelu_backward_span)(float *dx, const float *dout, const float *x, Py_ssize_t n) noexcept nogil
        GateForward *swiglu_forward_span
        GateForward *geglu_forward_span
        GateBackward *swiglu_backward_span
        GateBackward *geglu_backward_span
        void (*add_span)(float *out, const float *a, const float *b, Py_ssize_t n) noexcept nogil
        void (*scale_span)(float *x, float factor, Py_ssize_t n) noexcept nogil
        void (*axpy_span)(float *y, float factor, const float *x, Py_ssize_t n) noexcept nogil
        void (*axpy_bf16_span)(float *y, float factor, const uint16_t *x, Py_ssize_t n) noexcept nogil
        void (*widen_span)(float *out, const uint16_t *x, Py_ssize_t n) noexcept nogil
        void (*round_span)(uint16_t *out, const float *x, Py_ssize_t n) noexcept nogil
        void (*softcap_span)(float *x, Py_ssize_t n, float scale, float cap) noexcept nogil
        double (*sumsq_span)(const float *x, Py_ssize_t n) noexcept nogil
        float (*dot_span)(const float *a, const float *b, Py_ssize_t n) noexcept nogil
        void (*adamw_span)(float *w, float *m, float *v, const float *dw, Py_ssize_t n,
                           const AdamW *update) noexcept nogil
        void (*column_sum)(float *sum, const float *x, Py_ssize_t ldx, Py_ssize_t rows, Py_ssize_t n) noexcept nogil
        void (*normal_span)(float *out, Py_ssize_t n, uint64_t seed, uint64_t stream, uint64_t group,
                            float std) noexcept nogil

        double (*fma_loop)(Py_ssize_t rounds, float *value) noexcept nogil
        double (*dot_loop)(Py_ssize_t rounds, float *value) noexcept nogil
        float (*stream_span)(float **p, int reads, int writes, int updates, Py_ssize_t n) noexcept nogil

cdef const Kernels *kernels
cdef Gemm *gemm
cdef int tile_rows
cdef bint packs_rows
cdef int threads
cdef int team(Py_ssize_t tasks) noexcept nogil
cdef Py_ssize_t gemm_scratch(str name) except -1
