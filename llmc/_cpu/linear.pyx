"""Linear layers: y = x w^T + b, dx = dy w, dw = dy^T x.

Threads divide the output, never the sum: each owns a block of C, packs what it reads, and meets the others only
at the end.  The grid of blocks is chosen so that the largest block, packing included, is as small as can be.
"""

from cython.parallel cimport prange, threadid

from llmc._cpu cimport check, isa
from llmc._cpu.activation cimport gelu_backward_all, gelu_forward_all
from llmc._cpu.workspace cimport thread_scratch

cdef enum:
    PACK_COST = 8        # packing a float costs about as much as this many multiply-adds
    FEW_ROWS = 4         # up to here, dot products over w's rows beat packing w
    STRIP = 64           # columns of a bias gradient that one thread sums
    DOT_ROWS = 64        # outputs of a dot-product task


cdef Py_ssize_t _share(Py_ssize_t n, Py_ssize_t tile, Py_ssize_t parts) noexcept nogil:
    """The largest part of n, in whole tiles."""
    cdef Py_ssize_t tiles = (n + tile - 1) // tile
    return (tiles + parts - 1) // parts * tile


cdef void _block(Py_ssize_t t, Py_ssize_t grid_n, Py_ssize_t m, Py_ssize_t n, float *c, Py_ssize_t ldc, const float *a,
                 Py_ssize_t a_rs, Py_ssize_t a_cs, const float *b, Py_ssize_t b_rs, Py_ssize_t b_cs, Py_ssize_t M,
                 Py_ssize_t N, Py_ssize_t K, bint add, const float *bias) noexcept nogil:
    cdef Py_ssize_t i = t // grid_n * m, j = t % grid_n * n
    if i < M and j < N:
        isa.gemm(
            c + i * ldc + j, ldc, a + i * a_rs, a_rs, a_cs, b + j * b_cs, b_rs, b_cs, min(m, M - i), min(n, N - j), K,
            add, NULL if bias == NULL else bias + j, thread_scratch(threadid()))


cdef void gemm(float *c, Py_ssize_t ldc, const float *a, Py_ssize_t a_rs, Py_ssize_t a_cs, const float *b,
               Py_ssize_t b_rs, Py_ssize_t b_cs, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K, bint add,
               const float *bias) noexcept nogil:
    """C (+)= A B (+ bias); operands as in simd/gemm.h."""
    cdef Py_ssize_t MR = isa.tile_rows, NR = isa.kernels.tile_columns
    cdef Py_ssize_t p, m, n, cost, best = -1, grid_n = 1, t, tasks = isa.threads
    for p in range(1, tasks + 1):
        if tasks % p == 0:
            m = _share(M, MR, tasks // p)
            n = _share(N, NR, p)
            cost = m * n + PACK_COST * (n if a_cs == 1 and not isa.packs_rows else m + n)
            if best < 0 or cost < best:
                best = cost
                grid_n = p
    m = _share(M, MR, tasks // grid_n)
    n = _share(N, NR, grid_n)
    for t in prange(tasks, num_threads=isa.threads, schedule="static", chunksize=1):
        _block(t, grid_n, m, n, c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias)


cdef void _dot_block(Py_ssize_t j, float *out, const float *x, const float *w, const float *bias, Py_ssize_t M,
                     Py_ssize_t N, Py_ssize_t K) noexcept nogil:
    cdef Py_ssize_t i, n = min(<Py_ssize_t> DOT_ROWS, N - j)
    for i in range(M):
        isa.kernels.dot_rows(out + i * N + j, x + i * K, w + j * K, K, K, n, NULL if bias == NULL else bias + j)


cdef void rows_times_transposed(float *out, const float *x, const float *w, const float *bias, Py_ssize_t M,
                                Py_ssize_t N, Py_ssize_t K) noexcept nogil:
    """out (M,N) = x (M,K) w (N,K)^T + bias: decoding has a row or a few, and reads w once, where it lies."""
    cdef Py_ssize_t j
    if M > FEW_ROWS:
        gemm(out, N, x, K, 1, w, 1, K, M, N, K, False, bias)
        return
    for j in prange(0, N, DOT_ROWS, num_threads=isa.threads, schedule="static"):
        _dot_block(j, out, x, w, bias, M, N, K)


cdef void _strip(Py_ssize_t j, float *db, const float *dout, Py_ssize_t M, Py_ssize_t N, bint add) noexcept nogil:
    cdef Py_ssize_t i, n = min(<Py_ssize_t> STRIP, N - j)
    if not add:
        for i in range(n):
            db[j + i] = 0.0
    isa.kernels.column_sum(db + j, dout + j, N, M, n)


cdef void _backward(float *dx, float *dw, float *db, const float *dout, const float *x, const float *w, Py_ssize_t M,
                    Py_ssize_t N, Py_ssize_t K, bint add) noexcept nogil:
    cdef Py_ssize_t j
    if db != NULL:
        for j in prange(0, N, STRIP, num_threads=isa.threads, schedule="static"):
            _strip(j, db, dout, M, N, add)
    gemm(dw, K, dout, 1, N, x, K, 1, N, K, M, add, NULL)
    gemm(dx, K, dout, N, 1, w, K, 1, M, K, N, False, NULL)


def linear_forward(out, x, w, b):
    cdef float[:, :, ::1] out_ = check.cube("out", out), x_ = check.cube("x", x)
    cdef float[:, ::1] w_ = check.matrix("w", w)
    cdef float[::1] b_
    cdef float *bias = NULL
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = w_.shape[0]
    check.expect("w", w.shape, (N, K))
    check.expect("out", out.shape, (*x.shape[:2], N))
    if b is not None:
        b_ = check.vector("b", b)
        check.expect("b", b.shape, (N,))
        bias = &b_[0]
    with nogil:
        rows_times_transposed(&out_[0, 0, 0], &x_[0, 0, 0], &w_[0, 0], bias, M, N, K)


cdef int _check_backward(str dx_name, dx, dw, db, dout, x, w) except -1:
    cdef Py_ssize_t K = check.cube("x", x).shape[2], N = check.matrix("w", w).shape[0]
    check.cube(dx_name, dx)
    check.matrix("dw", dw)
    check.cube("dout", dout)
    check.expect("w", w.shape, (N, K))
    check.expect("dw", dw.shape, (N, K))
    check.expect(dx_name, dx.shape, x.shape)
    check.expect("dout", dout.shape, (*x.shape[:2], N))
    if db is not None:
        check.vector("db", db)
        check.expect("db", db.shape, (N,))
    return 0


def linear_backward(dx, dw, db, dout, x, w, accumulate):
    _check_backward("dx", dx, dw, db, dout, x, w)
    cdef float[:, :, ::1] dx_ = dx, dout_ = dout, x_ = x
    cdef float[:, ::1] dw_ = dw, w_ = w
    cdef float[::1] db_
    cdef float *dbias = NULL
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = w_.shape[0]
    cdef bint add = accumulate
    if db is not None:
        db_ = db
        dbias = &db_[0]
    with nogil:
        _backward(&dx_[0, 0, 0], &dw_[0, 0], dbias, &dout_[0, 0, 0], &x_[0, 0, 0], &w_[0, 0], M, N, K, add)


def linear_gelu_forward(out, pre, x, w, b):
    cdef float[::1] out_ = check.flat("out", out), pre_ = check.flat("pre", pre)
    check.cube("out", out)
    check.expect("pre", pre.shape, out.shape)
    linear_forward(pre, x, w, b)
    with nogil:
        gelu_forward_all(&out_[0], &pre_[0], pre_.shape[0])


def gelu_linear_backward(dpre, dw, db, dout, pre, x, w, accumulate):
    cdef float[::1] dpre_ = check.flat("dpre", dpre), pre_ = check.flat("pre", pre)
    _check_backward("dpre", dpre, dw, db, dout, x, w)
    check.cube("pre", pre)
    check.expect("pre", pre.shape, x.shape)
    linear_backward(dpre, dw, db, dout, x, w, accumulate)
    with nogil:
        gelu_backward_all(&dpre_[0], &dpre_[0], &pre_[0], pre_.shape[0])


def product(use, out, a, b):
    """One of a linear layer's three products alone, to be measured (no op of the contract); all matrices float32:

    forward  out (M,N) = a (M,K) b (N,K)^T
    dx       out (M,K) = a (M,N) b (N,K)
    dw       out (N,K) = a (M,N)^T b (M,K)
    """
    cdef float[:, ::1] out_ = check.matrix("out", out), a_ = check.matrix("a", a), b_ = check.matrix("b", b)
    cdef Py_ssize_t ra = a_.shape[0], ca = a_.shape[1], rb = b_.shape[0], cb = b_.shape[1]
    if use == "forward":
        check.expect("b", b.shape, (rb, ca))
        check.expect("out", out.shape, (ra, rb))
        with nogil:
            rows_times_transposed(&out_[0, 0], &a_[0, 0], &b_[0, 0], NULL, ra, rb, ca)
    elif use == "dx":
        check.expect("b", b.shape, (ca, cb))
        check.expect("out", out.shape, (ra, cb))
        with nogil:
            gemm(&out_[0, 0], cb, &a_[0, 0], ca, 1, &b_[0, 0], cb, 1, ra, cb, ca, False, NULL)
    elif use == "dw":
        check.expect("b", b.shape, (ra, cb))
        check.expect("out", out.shape, (ca, cb))
        with nogil:
            gemm(&out_[0, 0], cb, &a_[0, 0], 1, ca, &b_[0, 0], cb, 1, ca, cb, ra, False, NULL)
    else:
        raise ValueError(f"use: {use!r} is none of forward, dx, dw")
