cdef void gelu_forward_all(float *out, const float *x, Py_ssize_t n) noexcept nogil
cdef void gelu_backward_all(float *dx, const float *dout, const float *x, Py_ssize_t n) noexcept nogil
