"""Element-wise layers: GELU, gates, the residual sum, copying and zeroing.  Threads take spans of fixed size, or of
gates rows."""

from cython.parallel cimport prange
from libc.stdint cimport uint16_t
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


cdef void _copy_span(check.Weights out, check.Weights x, Py_ssize_t i, Py_ssize_t n) noexcept nogil:
    if out.bf16 == x.bf16:
        memcpy(out.data + i * (2 if x.bf16 else 4), x.data + i * (2 if x.bf16 else 4), n * (2 if x.bf16 else 4))
    elif x.bf16:
        isa.kernels.widen_span(<float *> out.data + i, <uint16_t *> x.data + i, n)
    else:
        isa.kernels.round_span(<uint16_t *> out.data + i, <float *> x.data + i, n)


def copy(out, x):
    cdef check.Weights out_ = check.weights("out", out, 0), x_ = check.weights("x", x, 0)
    cdef Py_ssize_t i, n = x_.size
    check.expect("out", out.shape, x.shape)
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
        _copy_span(out_, x_, i, min(<Py_ssize_t> SPAN, n - i))


cdef int _gate_forward(isa.GateForward *kernel, out, x) except -1:
    cdef float[:, :, ::1] out_ = check.cube("out", out), x_ = check.cube("x", x)
    cdef Py_ssize_t M = out_.shape[0] * out_.shape[1], F = out_.shape[2], i
    check.expect("x", x.shape, (*out.shape[:2], 2 * F))
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        kernel(&out_[0, 0, 0] + i * F, &x_[0, 0, 0] + i * 2 * F, &x_[0, 0, 0] + i * 2 * F + F, F)
    return 0


cdef int _gate_backward(isa.GateBackward *kernel, dx, dout, x) except -1:
    cdef float[:, :, ::1] dx_ = check.cube("dx", dx), dout_ = check.cube("dout", dout), x_ = check.cube("x", x)
    cdef Py_ssize_t M = dout_.shape[0] * dout_.shape[1], F = dout_.shape[2], i
    check.expect("x", x.shape, (*dout.shape[:2], 2 * F))
    check.expect("dx", dx.shape, x.shape)
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        kernel(&dx_[0, 0, 0] + i * 2 * F, &dx_[0, 0, 0] + i * 2 * F + F, &dout_[0, 0, 0] + i * F,
               &x_[0, 0, 0] + i * 2 * F, &x_[0, 0, 0] + i * 2 * F + F, F)
    return 0


def swiglu_forward(out, x):
    _gate_forward(isa.kernels.swiglu_forward_span, out, x)


def swiglu_backward(dx, dout, x):
    _gate_backward(isa.kernels.swiglu_backward_span, dx, dout, x)


def geglu_forward(out, x):
    _gate_forward(isa.kernels.geglu_forward_span, out, x)


def geglu_backward(dx, dout, x):
    _gate_backward(isa.kernels.geglu_backward_span, dx, dout, x)
