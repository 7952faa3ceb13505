"""AdamW, and what clipping needs."""

from cython.parallel cimport prange
from libc.math cimport NAN, isfinite, pow, sqrt
from libc.string cimport memcpy

from llmc._cpu cimport check, isa
from llmc._cpu.workspace cimport shared

cdef enum:
    SPAN = 16384  # elements that a thread updates at a time


cdef void _span(float *w, float *m, float *v, const float *dw, float *copy, Py_ssize_t n,
                const isa.AdamW *update) noexcept nogil:
    isa.kernels.adamw_span(w, m, v, dw, n, update)
    if copy != NULL:
        memcpy(copy, w, n * sizeof(float))


def global_norm(norm, x):
    cdef double *norm_ = check.scalars("norm", norm, 1)
    cdef float[::1] x_ = check.flat("x", x)
    cdef Py_ssize_t n = x_.shape[0], chunks = (n + SUM_CHUNK - 1) // SUM_CHUNK, i
    cdef double *partial = <double *> shared(chunks * sizeof(double))
    cdef double total = 0.0
    for i in prange(chunks, num_threads=isa.threads, schedule="static", nogil=True):
        partial[i] = isa.kernels.sumsq_span(&x_[i * SUM_CHUNK], min(<Py_ssize_t> SUM_CHUNK, n - i * SUM_CHUNK))
    for i in range(chunks):
        total = total + partial[i]
    norm_[0] = sqrt(total)


def clip_scale(scale, norm, loss, limit):
    cdef double *scale_ = check.scalars("scale", scale, 1)
    cdef double *norm_ = check.scalars("norm", norm, 1)
    cdef double *loss_ = check.scalars("loss", loss, 1)
    cdef double most = limit
    if not isfinite(norm_[0]) or not isfinite(loss_[0]):
        scale_[0] = NAN
    elif 0.0 < most < norm_[0]:
        scale_[0] = most / norm_[0]
    else:
        scale_[0] = 1.0


def adamw_step(w, m, v, dw, copy, hyper, scale, spans, beta1, beta2, eps, seed):
    cdef float[::1] w_ = check.vector("w", w), m_ = check.vector("m", m), v_ = check.vector("v", v)
    cdef float[::1] dw_ = check.vector("dw", dw), copy_
    cdef float *copied = NULL
    cdef double *hyper_ = check.scalars("hyper", hyper, 2)
    cdef double *scale_ = check.scalars("scale", scale, 1)
    cdef Py_ssize_t n = w_.shape[0], start, stop, last = 0, i
    cdef double t = hyper_[1]
    check.expect("m", m.shape, w.shape)
    check.expect("v", v.shape, w.shape)
    check.expect("dw", dw.shape, w.shape)
    if copy is not None:
        copy_ = check.vector("copy", copy)
        check.expect("copy", copy.shape, w.shape)
        copied = &copy_[0]
    for begin, end, _ in spans:
        if not last <= begin <= end <= n:
            raise ValueError(f"spans: ({begin}, {end}) does not follow {last} within the {n} elements")
        last = end
    if not t >= 1.0:
        raise ValueError(f"hyper: t counts from 1, got {t:g}")
    if not isfinite(scale_[0]):
        return
    cdef isa.AdamW update
    update.lr, update.eps, update.scale = hyper_[0], eps, scale_[0]
    update.beta1, update.one_minus_beta1, update.correction1 = beta1, 1.0 - beta1, 1.0 / (1.0 - pow(beta1, t))
    update.beta2, update.one_minus_beta2, update.correction2 = beta2, 1.0 - beta2, 1.0 / (1.0 - pow(beta2, t))
    for start, stop, weight_decay in spans:
        update.decay = weight_decay
        for i in prange(start, stop, SPAN, num_threads=isa.threads, schedule="static", nogil=True):
            _span(&w_[i], &m_[i], &v_[i], &dw_[i], NULL if copied == NULL else copied + i,
                  min(<Py_ssize_t> SPAN, stop - i), &update)
