"""The head: logits, softmax, cross-entropy, and their backward, a chunk of tokens at a time.

The logits of a chunk are computed once and turned into their own gradient in place, so a training step pays for
three products with wte and holds HEAD_CHUNK x V floats.
"""

from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.string cimport memset

from llmc._cpu cimport check, isa
from llmc._cpu.linear cimport gemm, rows_times, rows_times_transposed
from llmc._cpu.workspace cimport shared

cdef enum:
    SPAN = 8192  # logits that a thread caps at a time


cdef float _row(float *logits, Py_ssize_t V, Py_ssize_t target, float scale, float softcap, bint train) noexcept nogil:
    if softcap > 0.0:
        return isa.kernels.capped_crossentropy_row(logits, V, target, scale, softcap, train)
    return isa.kernels.crossentropy_row(logits, V, target, scale, train)


cdef Py_ssize_t _vocabulary(V, w, Py_ssize_t C) except -1:
    """V, having checked w (Vp,C)."""
    check.expect("w", w.shape, (w.shape[0], C))
    if not 0 < V <= w.shape[0]:
        raise ValueError(f"V: {V} is outside [1, {w.shape[0]}], the rows of w")
    return V


cdef float _cap(softcap) except -1:
    if not 0 <= softcap < INFINITY:
        raise ValueError(f"softcap: must be positive and finite, or 0 for none, got {softcap}")
    return softcap


cdef void _loss(float *losses, float *dx, float *dw, float *logits, const float *x, check.Weights w,
                const int *targets, Py_ssize_t M, Py_ssize_t V, Py_ssize_t C, float scale, float softcap,
                bint train, bint add) noexcept nogil:
    cdef Py_ssize_t start = 0, n, i
    while start < M or (start == 0 and dw != NULL):  # with no tokens at all dw is still to be zeroed
        n = min(<Py_ssize_t> HEAD_CHUNK, M - start)
        rows_times_transposed(logits, x + start * C, w, NULL, n, V, C)
        for i in prange(n, num_threads=isa.threads, schedule="static"):
            losses[start + i] = _row(logits + i * V, V, targets[start + i], scale, softcap, train)
        if dw != NULL:
            gemm(dw, C, logits, 1, V, x + start * C, C, 1, V, C, n, add or start > 0, NULL)
        if train:
            rows_times(dx + start * C, logits, w, n, V, C)
        start += HEAD_CHUNK


def head_loss(losses, dx, dw, x, w, targets, V, scale, softcap, accumulate):
    cdef float[:, ::1] losses_ = check.matrix("losses", losses), dw_
    cdef float[:, :, ::1] x_ = check.cube("x", x), dx_
    cdef int[:, ::1] targets_ = check.ids("targets", targets)
    cdef check.Weights w_ = check.weights("w", w, 2)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], vocab
    cdef bint train = dx is not None, add = accumulate
    cdef float *dx_data = NULL
    cdef float *dw_data = NULL
    cdef float factor = scale, cap = _cap(softcap)
    check.expect("losses", losses.shape, x.shape[:2])
    check.expect("targets", targets.shape, x.shape[:2])
    vocab = _vocabulary(V, w, C)
    if train:
        dx_ = check.cube("dx", dx)
        check.expect("dx", dx.shape, x.shape)
        dx_data = &dx_[0, 0, 0]
    if dw is not None:
        if not train:
            raise ValueError("dw: must be None where dx is")
        if w_.bf16:
            raise ValueError("dw: must be None where w is bfloat16, which is not trained")
        dw_ = check.matrix("dw", dw)
        check.expect("dw", dw.shape, w.shape)
        dw_data = &dw_[0, 0]
    check.in_range("targets", targets_, vocab)
    cdef float *logits = shared(min(M, <Py_ssize_t> HEAD_CHUNK) * vocab * sizeof(float))
    with nogil:
        _loss(&losses_[0, 0], dx_data, dw_data, logits, &x_[0, 0, 0], w_, &targets_[0, 0], M, vocab, C, factor, cap,
              train, add)
    if dw is not None and not add:
        memset(dw_data + vocab * C, 0, (dw_.shape[0] - vocab) * C * sizeof(float))


def sum_losses(total, losses, scale, accumulate):
    cdef double *total_ = check.scalars("total", total, 1)
    cdef float[:, ::1] losses_ = check.matrix("losses", losses)
    cdef double factor = scale, sum = 0.0
    cdef Py_ssize_t i, j
    for i in range(losses_.shape[0]):
        for j in range(losses_.shape[1]):
            sum += losses_[i, j]
    total_[0] = factor * sum + (total_[0] if accumulate else 0.0)


def head_logits(logits, x, w, V, softcap):
    cdef float[:, :, ::1] logits_ = check.cube("logits", logits), x_ = check.cube("x", x)
    cdef check.Weights w_ = check.weights("w", w, 2)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], vocab = _vocabulary(V, w, C), i, n = M * vocab
    cdef float cap = _cap(softcap)
    check.expect("logits", logits.shape, (*x.shape[:2], vocab))
    with nogil:
        rows_times_transposed(&logits_[0, 0, 0], &x_[0, 0, 0], w_, NULL, M, vocab, C)
        if cap > 0.0:
            for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static"):
                isa.kernels.softcap_span(&logits_[0, 0, 0] + i, min(<Py_ssize_t> SPAN, n - i), 1.0, cap)
