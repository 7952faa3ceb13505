"""The head: logits, softmax, cross-entropy, and their backward, a chunk of tokens at a time.

The logits of a chunk are computed once and turned into their own gradient in place, so a training step pays for
three products with wte and holds HEAD_CHUNK x V floats.
"""

from cython.parallel cimport prange
from libc.string cimport memset

from llmc._cpu cimport check, isa
from llmc._cpu.linear cimport gemm, rows_times_transposed
from llmc._cpu.workspace cimport shared


cdef void _loss(float *losses, float *dx, float *dw, float *logits, const float *x, const float *w,
                const int *targets, Py_ssize_t M, Py_ssize_t V, Py_ssize_t C, float scale, bint train,
                bint add) noexcept nogil:
    cdef Py_ssize_t start = 0, n, i
    while start < M or (start == 0 and train):  # with no tokens at all dw is still to be zeroed
        n = min(<Py_ssize_t> HEAD_CHUNK, M - start)
        gemm(logits, V, x + start * C, C, 1, w, 1, C, n, V, C, False, NULL)
        for i in prange(n, num_threads=isa.threads, schedule="static"):
            losses[start + i] = isa.kernels.crossentropy_row(logits + i * V, V, targets[start + i], scale, train)
        if train:
            gemm(dw, C, logits, 1, V, x + start * C, C, 1, V, C, n, add or start > 0, NULL)
            gemm(dx + start * C, C, logits, V, 1, w, C, 1, n, C, V, False, NULL)
        start += HEAD_CHUNK


def head_loss(losses, dx, dw, x, w, targets, V, scale, accumulate):
    cdef float[:, ::1] losses_ = check.matrix("losses", losses), w_ = check.matrix("w", w), dw_
    cdef float[:, :, ::1] x_ = check.cube("x", x), dx_
    cdef int[:, ::1] targets_ = check.ids("targets", targets)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], vocab = V
    cdef bint train = dx is not None, add = accumulate
    cdef float *dx_data = NULL
    cdef float *dw_data = NULL
    cdef float factor = scale
    check.expect("losses", losses.shape, x.shape[:2])
    check.expect("targets", targets.shape, x.shape[:2])
    check.expect("w", w.shape, (w_.shape[0], C))
    if not 0 < vocab <= w_.shape[0]:
        raise ValueError(f"V: {V} is outside [1, {w_.shape[0]}], the rows of w")
    if (dx is None) != (dw is None):
        raise ValueError("dx, dw: either both are arrays or both are None")
    if train:
        dx_ = check.cube("dx", dx)
        dw_ = check.matrix("dw", dw)
        check.expect("dx", dx.shape, x.shape)
        check.expect("dw", dw.shape, w.shape)
        dx_data = &dx_[0, 0, 0]
        dw_data = &dw_[0, 0]
    check.in_range("targets", targets_, vocab)
    cdef float *logits = shared(min(M, <Py_ssize_t> HEAD_CHUNK) * vocab * sizeof(float))
    with nogil:
        _loss(&losses_[0, 0], dx_data, dw_data, logits, &x_[0, 0, 0], &w_[0, 0], &targets_[0, 0], M, vocab, C, factor,
              train, add)
        if train and not add:
            memset(dw_data + vocab * C, 0, (w_.shape[0] - vocab) * C * sizeof(float))


def sum_losses(total, losses, scale, accumulate):
    cdef double *total_ = check.scalars("total", total, 1)
    cdef float[:, ::1] losses_ = check.matrix("losses", losses)
    cdef double factor = scale, sum = 0.0
    cdef Py_ssize_t i, j
    for i in range(losses_.shape[0]):
        for j in range(losses_.shape[1]):
            sum += losses_[i, j]
    total_[0] = factor * sum + (total_[0] if accumulate else 0.0)


def head_logits(logits, x, w, V):
    cdef float[:, :, ::1] logits_ = check.cube("logits", logits), x_ = check.cube("x", x)
    cdef float[:, ::1] w_ = check.matrix("w", w)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], vocab = V
    check.expect("w", w.shape, (w_.shape[0], C))
    if not 0 < vocab <= w_.shape[0]:
        raise ValueError(f"V: {V} is outside [1, {w_.shape[0]}], the rows of w")
    check.expect("logits", logits.shape, (*x.shape[:2], vocab))
    with nogil:
        rows_times_transposed(&logits_[0, 0, 0], &x_[0, 0, 0], check.Weights(<char *> &w_[0, 0], False, 0), NULL, M, vocab, C)
