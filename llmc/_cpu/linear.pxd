from llmc._cpu.check cimport Weights

cdef void gemm(float *c, Py_ssize_t ldc, const float *a, Py_ssize_t a_rs, Py_ssize_t a_cs, const float *b,
               Py_ssize_t b_rs, Py_ssize_t b_cs, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K, bint add,
               const float *bias) noexcept nogil
cdef void rows_times_transposed(float *out, const float *x, Weights w, const float *bias, Py_ssize_t M, Py_ssize_t N,
                                Py_ssize_t K) noexcept nogil
cdef void rows_times(float *out, const float *x, Weights w, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K) noexcept nogil
