"""LayerNorm (Ba, Kiros & Hinton 2016) and RMSNorm (Zhang & Sennrich 2019).

Backward sums dw (and db) over all tokens.  Rows are cut into chunks whose size depends on their number alone; each
chunk sums into a row (or a pair of rows) of its own in the workspace, and these are then added in order, column by
column.
"""

from cython.parallel cimport prange
from libc.string cimport memset

from llmc._cpu cimport check, isa
from llmc._cpu.workspace cimport shared

cdef enum:
    STRIP = 64    # columns that one task combines


cdef void _backward_chunk(Py_ssize_t chunk, Py_ssize_t rows, float *partial, float *dx, const float *dout,
                          const float *x, const float *mean, const float *rstd, const float *w, Py_ssize_t M,
                          Py_ssize_t C) noexcept nogil:
    """`partial` is NULL where dw and db are not wanted."""
    cdef float *dw = NULL
    cdef float *db = NULL
    cdef Py_ssize_t i
    if partial != NULL:
        dw = partial + chunk * 2 * C
        db = dw + C
        memset(dw, 0, 2 * C * sizeof(float))
    for i in range(chunk * rows, min(M, (chunk + 1) * rows)):
        isa.kernels.layernorm_backward_row(dx + i * C, dw, db, dout + i * C, x + i * C, w, mean[i], rstd[i], C)


cdef void _rms_backward_chunk(Py_ssize_t chunk, Py_ssize_t rows, float *partial, float *dx, const float *dout,
                              const float *x, const float *rstd, const float *w, Py_ssize_t M, Py_ssize_t C,
                              float offset) noexcept nogil:
    cdef float *dw = NULL
    cdef Py_ssize_t i
    if partial != NULL:
        dw = partial + chunk * C
        memset(dw, 0, C * sizeof(float))
    for i in range(chunk * rows, min(M, (chunk + 1) * rows)):
        isa.kernels.rmsnorm_backward_row(dx + i * C, dw, dout + i * C, x + i * C, w, rstd[i], C, offset)


cdef void _combine(Py_ssize_t c, float *dw, const float *partial, Py_ssize_t stride, Py_ssize_t chunks, Py_ssize_t C,
                   bint add) noexcept nogil:
    cdef Py_ssize_t n = min(<Py_ssize_t> STRIP, C - c)
    if not add:
        memset(dw + c, 0, n * sizeof(float))
    isa.kernels.column_sum(dw + c, partial + c, stride, chunks, n)


cdef void _residual_row(float *total, float *out, float *mean, float *rstd, const float *x, const float *branch,
                        const float *w, const float *b, Py_ssize_t C, float eps) noexcept nogil:
    """The sum is normed while the first cache holds it."""
    isa.kernels.add_span(total, x, branch, C)
    isa.kernels.layernorm_row(out, mean, rstd, total, w, b, C, eps)


cdef void _residual_rms_row(float *total, float *out, float *rstd, const float *x, const float *branch, const float *w,
                            Py_ssize_t C, float eps, float offset) noexcept nogil:
    isa.kernels.add_span(total, x, branch, C)
    isa.kernels.rmsnorm_row(out, rstd, total, w, C, eps, offset)


cdef (Py_ssize_t, Py_ssize_t) _chunked(Py_ssize_t M) noexcept:
    """Chunks of how many rows, and how many chunks."""
    cdef Py_ssize_t rows = max(16, (M + NORM_CHUNKS - 1) // NORM_CHUNKS)
    return rows, (M + rows - 1) // rows


def layernorm_forward(out, mean, rstd, x, w, b, eps):
    cdef float[:, :, ::1] out_ = check.cube("out", out), x_ = check.cube("x", x)
    cdef float[:, ::1] mean_ = check.matrix("mean", mean), rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w), b_ = check.vector("b", b)
    cdef Py_ssize_t T = x_.shape[1], M = x_.shape[0] * T, C = x_.shape[2], i
    cdef float *m = &mean_[0, 0]
    cdef float *r = &rstd_[0, 0]
    cdef float epsilon = eps
    check.expect("out", out.shape, x.shape)
    check.expect("mean", mean.shape, x.shape[:2])
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    check.expect("b", b.shape, (C,))
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        isa.kernels.layernorm_row(&out_[0, 0, 0] + i * C, m + i, r + i, &x_[0, 0, 0] + i * C, &w_[0], &b_[0], C,
                                  epsilon)


def residual_layernorm_forward(total, out, mean, rstd, x, branch, w, b, eps):
    cdef float[:, :, ::1] total_ = check.cube("total", total), out_ = check.cube("out", out)
    cdef float[:, ::1] mean_ = check.matrix("mean", mean), rstd_ = check.matrix("rstd", rstd)
    cdef float[:, :, ::1] x_ = check.cube("x", x), branch_ = check.cube("branch", branch)
    cdef float[::1] w_ = check.vector("w", w), b_ = check.vector("b", b)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], i
    cdef float *m = &mean_[0, 0]
    cdef float *r = &rstd_[0, 0]
    cdef float epsilon = eps
    check.expect("branch", branch.shape, x.shape)
    check.expect("total", total.shape, x.shape)
    check.expect("out", out.shape, x.shape)
    check.expect("mean", mean.shape, x.shape[:2])
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    check.expect("b", b.shape, (C,))
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        _residual_row(&total_[0, 0, 0] + i * C, &out_[0, 0, 0] + i * C, m + i, r + i, &x_[0, 0, 0] + i * C,
                      &branch_[0, 0, 0] + i * C, &w_[0], &b_[0], C, epsilon)


def layernorm_backward(dx, dw, db, dout, x, mean, rstd, w, accumulate):
    cdef float[:, :, ::1] dx_ = check.cube("dx", dx), dout_ = check.cube("dout", dout), x_ = check.cube("x", x)
    cdef float[:, ::1] mean_ = check.matrix("mean", mean), rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w), dw_, db_
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], chunks, rows, i
    cdef bint add = accumulate
    cdef float *partial = NULL
    check.expect("dx", dx.shape, x.shape)
    check.expect("dout", dout.shape, x.shape)
    check.expect("mean", mean.shape, x.shape[:2])
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    if (dw is None) != (db is None):
        raise ValueError("dw, db: either both are arrays or both are None")
    rows, chunks = _chunked(M)
    if dw is not None:
        dw_, db_ = check.vector("dw", dw), check.vector("db", db)
        check.expect("dw", dw.shape, (C,))
        check.expect("db", db.shape, (C,))
        partial = shared(chunks * 2 * C * sizeof(float))
    with nogil:
        for i in prange(chunks, num_threads=isa.team(chunks), schedule="static"):
            _backward_chunk(i, rows, partial, &dx_[0, 0, 0], &dout_[0, 0, 0], &x_[0, 0, 0], &mean_[0, 0], &rstd_[0, 0],
                            &w_[0], M, C)
        if partial != NULL:
            for i in prange(0, C, STRIP, num_threads=isa.threads, schedule="static"):
                _combine(i, &dw_[0], partial, 2 * C, chunks, C, add)
                _combine(i, &db_[0], partial + C, 2 * C, chunks, C, add)


def rmsnorm_forward(out, rstd, x, w, eps, offset):
    cdef float[:, :, ::1] out_ = check.cube("out", out), x_ = check.cube("x", x)
    cdef float[:, ::1] rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], i
    cdef float *r = &rstd_[0, 0]
    cdef float epsilon = eps, shift = offset
    check.expect("out", out.shape, x.shape)
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        isa.kernels.rmsnorm_row(&out_[0, 0, 0] + i * C, r + i, &x_[0, 0, 0] + i * C, &w_[0], C, epsilon, shift)


def residual_rmsnorm_forward(total, out, rstd, x, branch, w, eps, offset):
    cdef float[:, :, ::1] total_ = check.cube("total", total), out_ = check.cube("out", out)
    cdef float[:, :, ::1] x_ = check.cube("x", x), branch_ = check.cube("branch", branch)
    cdef float[:, ::1] rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], i
    cdef float *r = &rstd_[0, 0]
    cdef float epsilon = eps, shift = offset
    check.expect("branch", branch.shape, x.shape)
    check.expect("total", total.shape, x.shape)
    check.expect("out", out.shape, x.shape)
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    for i in prange(M, num_threads=isa.team(M), schedule="static", nogil=True):
        _residual_rms_row(&total_[0, 0, 0] + i * C, &out_[0, 0, 0] + i * C, r + i, &x_[0, 0, 0] + i * C,
                          &branch_[0, 0, 0] + i * C, &w_[0], C, epsilon, shift)


def rmsnorm_backward(dx, dw, dout, x, rstd, w, offset, accumulate):
    cdef float[:, :, ::1] dx_ = check.cube("dx", dx), dout_ = check.cube("dout", dout), x_ = check.cube("x", x)
    cdef float[:, ::1] rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w), dw_
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], chunks, rows, i
    cdef bint add = accumulate
    cdef float shift = offset
    cdef float *partial = NULL
    check.expect("dx", dx.shape, x.shape)
    check.expect("dout", dout.shape, x.shape)
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    rows, chunks = _chunked(M)
    if dw is not None:
        dw_ = check.vector("dw", dw)
        check.expect("dw", dw.shape, (C,))
        partial = shared(chunks * C * sizeof(float))
    with nogil:
        for i in prange(chunks, num_threads=isa.team(chunks), schedule="static"):
            _rms_backward_chunk(i, rows, partial, &dx_[0, 0, 0], &dout_[0, 0, 0], &x_[0, 0, 0], &rstd_[0, 0], &w_[0],
                                M, C, shift)
        if partial != NULL:
            for i in prange(0, C, STRIP, num_threads=isa.threads, schedule="static"):
                _combine(i, &dw_[0], partial, C, chunks, C, add)
