"""Element-wise layers: GELU, the residual sum, copying and zeroing.  Threads take spans of fixed size."""

from cython.parallel cimport prange
from libc.string cimport memcpy, memset

from llmc._cpu cimport check, isa

cdef enum:
    SPAN = 8192  # floats: 32 KiB of each array, so a span's arrays fit in L2


cdef void gelu_forward_all(float *out, const float *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static"):
        isa.kernels.gelu_forward_span(out + i, x + i, min(<Py_ssize_t> SPAN, n - i))


cdef void gelu_backward_all(float *dx, const float *dout, const float *x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static"):
        isa.kernels.gelu_backward_span(dx + i, dout + i, x + i, min(<Py_ssize_t> SPAN, n - i))


def gelu_forward(out, x):
    cdef float[::1] out_ = check.flat("out", out), x_ = check.flat("x", x)
    check.expect("out", out.shape, x.shape)
    with nogil:
        gelu_forward_all(&out_[0], &x_[0], x_.shape[0])


def gelu_backward(dx, dout, x):
    cdef float[::1] dx_ = check.flat("dx", dx), dout_ = check.flat("dout", dout), x_ = check.flat("x", x)
    check.expect("dx", dx.shape, x.shape)
    check.expect("dout", dout.shape, x.shape)
    with nogil:
        gelu_backward_all(&dx_[0], &dout_[0], &x_[0], x_.shape[0])


def residual_forward(out, x, branch):
    cdef float[::1] out_ = check.flat("out", out), x_ = check.flat("x", x), branch_ = check.flat("branch", branch)
    cdef Py_ssize_t i, n = x_.shape[0]
    check.expect("branch", branch.shape, x.shape)
    check.expect("out", out.shape, x.shape)
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
        isa.kernels.add_span(&out_[i], &x_[i], &branch_[i], min(<Py_ssize_t> SPAN, n - i))


def zero(x):
    cdef float[::1] x_ = check.flat("x", x)
    cdef Py_ssize_t i, n = x_.shape[0]
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
        memset(&x_[i], 0, min(<Py_ssize_t> SPAN, n - i) * sizeof(float))


def copy(out, x):
    cdef float[::1] out_ = check.flat("out", out), x_ = check.flat("x", x)
    cdef Py_ssize_t i, n = x_.shape[0]
    check.expect("out", out.shape, x.shape)
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
        memcpy(&out_[i], &x_[i], min(<Py_ssize_t> SPAN, n - i) * sizeof(float))
