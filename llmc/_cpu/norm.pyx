"""LayerNorm (Ba, Kiros & Hinton 2016).

Backward sums dw and db over all tokens.  Rows are cut into chunks whose size depends on their number alone; each
chunk sums into its own pair of rows in the workspace, and the pairs are then added in order, column by column.
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
    cdef float *dw = partial + chunk * 2 * C
    cdef Py_ssize_t i
    memset(dw, 0, 2 * C * sizeof(float))
    for i in range(chunk * rows, min(M, (chunk + 1) * rows)):
        isa.kernels.layernorm_backward_row(dx + i * C, dw, dw + C, dout + i * C, x + i * C, w, mean[i], rstd[i], C)


cdef void _combine(Py_ssize_t c, float *dw, float *db, const float *partial, Py_ssize_t chunks, Py_ssize_t C,
                   bint add) noexcept nogil:
    cdef Py_ssize_t n = min(<Py_ssize_t> STRIP, C - c)
    if not add:
        memset(dw + c, 0, n * sizeof(float))
        memset(db + c, 0, n * sizeof(float))
    isa.kernels.column_sum(dw + c, partial + c, 2 * C, chunks, n)
    isa.kernels.column_sum(db + c, partial + C + c, 2 * C, chunks, n)


cdef void _residual_row(float *total, float *out, float *mean, float *rstd, const float *x, const float *branch,
                        const float *w, const float *b, Py_ssize_t C, float eps) noexcept nogil:
    """The sum is normed while the first cache holds it."""
    isa.kernels.add_span(total, x, branch, C)
    isa.kernels.layernorm_row(out, mean, rstd, total, w, b, C, eps)


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
    for i in prange(M, num_threads=isa.threads, schedule="static", nogil=True):
        isa.kernels.layernorm_row(&out_[0, 0, 0] + i * C, m + i, r + i, &x_[0, 0, 0] + i * C, &w_[0], &b_[0], C, epsilon)


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
    for i in prange(M, num_threads=isa.threads, schedule="static", nogil=True):
        _residual_row(&total_[0, 0, 0] + i * C, &out_[0, 0, 0] + i * C, m + i, r + i, &x_[0, 0, 0] + i * C,
                      &branch_[0, 0, 0] + i * C, &w_[0], &b_[0], C, epsilon)


def layernorm_backward(dx, dw, db, dout, x, mean, rstd, w, accumulate):
    cdef float[:, :, ::1] dx_ = check.cube("dx", dx), dout_ = check.cube("dout", dout), x_ = check.cube("x", x)
    cdef float[:, ::1] mean_ = check.matrix("mean", mean), rstd_ = check.matrix("rstd", rstd)
    cdef float[::1] w_ = check.vector("w", w), dw_ = check.vector("dw", dw), db_ = check.vector("db", db)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], C = x_.shape[2], chunks, rows, i
    cdef bint add = accumulate
    check.expect("dx", dx.shape, x.shape)
    check.expect("dout", dout.shape, x.shape)
    check.expect("mean", mean.shape, x.shape[:2])
    check.expect("rstd", rstd.shape, x.shape[:2])
    check.expect("w", w.shape, (C,))
    check.expect("dw", dw.shape, (C,))
    check.expect("db", db.shape, (C,))
    rows = max(16, (M + NORM_CHUNKS - 1) // NORM_CHUNKS)
    chunks = (M + rows - 1) // rows
    cdef float *partial = shared(chunks * 2 * C * sizeof(float))
    with nogil:
        for i in prange(chunks, num_threads=isa.threads, schedule="static"):
            _backward_chunk(i, rows, partial, &dx_[0, 0, 0], &dout_[0, 0, 0], &x_[0, 0, 0], &mean_[0, 0], &rstd_[0, 0],
                            &w_[0], M, C)
        for i in prange(0, C, STRIP, num_threads=isa.threads, schedule="static"):
            _combine(i, &dw_[0], &db_[0], partial, chunks, C, add)
