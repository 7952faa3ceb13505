"""AdamW, and the norm that clipping needs."""

from cython.parallel cimport prange
from libc.math cimport sqrt

from llmc._cpu cimport check, isa
from llmc._cpu.workspace cimport shared

cdef enum:
    SPAN = 16384  # elements that a thread updates at a time


def global_norm(x):
    cdef float[::1] x_ = check.flat("x", x)
    cdef Py_ssize_t n = x_.shape[0], chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK, i
    cdef double *partial = <double *> shared(chunks * sizeof(double))
    cdef double total = 0.0
    for i in prange(chunks, num_threads=isa.threads, schedule="static", nogil=True):
        partial[i] = isa.kernels.sumsq_span(&x_[i * SUM_CHUNK], min(<Py_ssize_t> SUM_CHUNK, n - i * SUM_CHUNK))
    for i in range(chunks):
        total = total + partial[i]
    return sqrt(total)


def adamw_step(w, m, v, dw, lr, beta1, beta2, eps, weight_decay, step, scale):
    cdef float[::1] w_ = check.flat("w", w), m_ = check.flat("m", m), v_ = check.flat("v", v)
    cdef float[::1] dw_ = check.flat("dw", dw)
    cdef Py_ssize_t n = w_.shape[0], i
    check.expect("m", m.shape, w.shape)
    check.expect("v", v.shape, w.shape)
    check.expect("dw", dw.shape, w.shape)
    if step < 1:
        raise ValueError(f"step: must be at least 1, got {step}")
    cdef isa.AdamW update
    update.lr, update.eps, update.decay, update.scale = lr, eps, weight_decay, scale
    update.beta1, update.one_minus_beta1, update.correction1 = beta1, 1.0 - beta1, 1.0 / (1.0 - beta1**step)
    update.beta2, update.one_minus_beta2, update.correction2 = beta2, 1.0 - beta2, 1.0 / (1.0 - beta2**step)
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
        isa.kernels.adamw_span(&w_[i], &m_[i], &v_[i], &dw_[i], min(<Py_ssize_t> SPAN, n - i), &update)
