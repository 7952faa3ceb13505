"""Linear layers: y = x w^T + b, dx = dy w, dw = dy^T x; and the adapters beside them.

Threads divide the output, never the sum: each owns a block of C, packs what it reads, and meets the others only
at the end.  The grid of blocks is chosen so that the largest block, packing included, is as small as can be.

A w of bfloat16 is widened a block at a time into a thread's scratch, or for a row or a few in registers.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport uint16_t

from llmc._cpu cimport check, isa
from llmc._cpu.activation cimport gelu_backward_all, gelu_forward_all
from llmc._cpu.check cimport Weights
from llmc._cpu.workspace cimport SCORES, thread_scratch

cdef enum:
    PACK_COST = 8        # packing a float costs about as much as this many multiply-adds
    FEW_ROWS = 4         # up to here, dot products over w's rows beat packing w
    STRIP = 64           # columns of a bias gradient that one thread sums
    DOT_COLUMNS = 16     # a thread's share of a row's outputs, in whole cache lines
    WIDE_DEPTH = 512     # a block of w that is widened: this many terms of the sum,
    WIDE_COLUMNS = 96    # by this many outputs; they fit in the scratch of attention's scores, 2 SCORES
    SPAN = 8192          # floats, as the element-wise layers have it


cdef Py_ssize_t _share(Py_ssize_t n, Py_ssize_t tile, Py_ssize_t parts) noexcept nogil:
    """The largest part of n, in whole tiles."""
    cdef Py_ssize_t tiles = (n + tile - 1) // tile
    return (tiles + parts - 1) // parts * tile


cdef Py_ssize_t _grid(Py_ssize_t M, Py_ssize_t N, bint packs_rows, Py_ssize_t *m, Py_ssize_t *n) noexcept nogil:
    """Columns of the grid of blocks of m x n, one for each thread."""
    cdef Py_ssize_t MR = isa.tile_rows, NR = isa.kernels.tile_columns
    cdef Py_ssize_t p, cost, best = -1, grid_n = 1, tasks = isa.threads
    for p in range(1, tasks + 1):
        if tasks % p == 0:
            m[0] = _share(M, MR, tasks // p)
            n[0] = _share(N, NR, p)
            cost = m[0] * n[0] + PACK_COST * (m[0] + n[0] if packs_rows else n[0])
            if best < 0 or cost < best:
                best = cost
                grid_n = p
    m[0] = _share(M, MR, tasks // grid_n)
    n[0] = _share(N, NR, grid_n)
    return grid_n


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
    cdef Py_ssize_t m, n, grid_n = _grid(M, N, a_cs != 1 or isa.packs_rows, &m, &n), t, tasks = isa.threads
    for t in prange(tasks, num_threads=isa.threads, schedule="static", chunksize=1):
        _block(t, grid_n, m, n, c, ldc, a, a_rs, a_cs, b, b_rs, b_cs, M, N, K, add, bias)


cdef void _wide_block(Py_ssize_t t, Py_ssize_t grid_n, Py_ssize_t m, Py_ssize_t n, float *c, const float *a,
                      const uint16_t *w, bint transposed, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K,
                      const float *bias) noexcept nogil:
    """One block of C = A w^T (+ bias), w (N,K), where transposed, else of C = A w, w (K,N)."""
    cdef Py_ssize_t i = t // grid_n * m, j = t % grid_n * n, end = min(N, j + n), k, r, columns, depth
    cdef float *scratch = thread_scratch(threadid())
    cdef float *wide = scratch + isa.kernels.gemm_scratch
    if i >= M:
        return
    while j < end:
        columns = min(<Py_ssize_t> WIDE_COLUMNS, end - j)
        k = 0
        while k < K or k == 0:  # once even where K is 0: C is then the bias, or zero
            depth = min(<Py_ssize_t> WIDE_DEPTH, K - k)
            if transposed:
                for r in range(columns):
                    isa.kernels.widen_span(wide + r * depth, w + (j + r) * K + k, depth)
            else:
                for r in range(depth):
                    isa.kernels.widen_span(wide + r * columns, w + (k + r) * N + j, columns)
            isa.gemm(c + i * N + j, N, a + i * K + k, K, 1, wide, 1 if transposed else columns,
                     depth if transposed else 1, min(m, M - i), columns, depth, k > 0,
                     NULL if bias == NULL else bias + j, scratch)
            k += WIDE_DEPTH
        j += WIDE_COLUMNS


cdef void _widened(float *c, const float *a, const uint16_t *w, bint transposed, Py_ssize_t M, Py_ssize_t N,
                   Py_ssize_t K, const float *bias) noexcept nogil:
    cdef Py_ssize_t m, n, grid_n = _grid(M, N, isa.packs_rows, &m, &n), t, tasks = isa.threads
    for t in prange(tasks, num_threads=isa.threads, schedule="static", chunksize=1):
        _wide_block(t, grid_n, m, n, c, a, w, transposed, M, N, K, bias)


cdef void _dot_block(Py_ssize_t j, Py_ssize_t n, float *out, const float *x, Weights w, const float *bias,
                     Py_ssize_t M, Py_ssize_t N, Py_ssize_t K) noexcept nogil:
    cdef isa.DotRows *dot_rows = isa.kernels.dot_rows_bf16 if w.bf16 else isa.kernels.dot_rows
    if j < N:
        dot_rows(out + j, N, x, K, M, w.data + j * K * (2 if w.bf16 else 4), K, K, min(n, N - j),
                 NULL if bias == NULL else bias + j, thread_scratch(threadid()))


cdef void rows_times_transposed(float *out, const float *x, Weights w, const float *bias, Py_ssize_t M, Py_ssize_t N,
                                Py_ssize_t K) noexcept nogil:
    """out (M,N) = x (M,K) w (N,K)^T + bias: decoding has a row or a few, and reads w once, where it lies."""
    cdef Py_ssize_t t, n, tasks = isa.threads
    if M <= FEW_ROWS and FEW_ROWS * K <= isa.kernels.gemm_scratch:
        n = _share(N, DOT_COLUMNS, tasks)
        for t in prange(tasks, num_threads=isa.threads, schedule="static", chunksize=1):
            _dot_block(t * n, n, out, x, w, bias, M, N, K)
    elif w.bf16:
        _widened(out, x, <uint16_t *> w.data, True, M, N, K, bias)
    else:
        gemm(out, N, x, K, 1, <float *> w.data, 1, K, M, N, K, False, bias)


cdef void rows_times(float *out, const float *x, Weights w, Py_ssize_t M, Py_ssize_t N, Py_ssize_t K) noexcept nogil:
    """out (M,K) = x (M,N) w (N,K)."""
    if w.bf16:
        _widened(out, x, <uint16_t *> w.data, False, M, K, N, NULL)
    else:
        gemm(out, K, x, N, 1, <float *> w.data, K, 1, M, K, N, False, NULL)


cdef void _strip(Py_ssize_t j, float *db, const float *dout, Py_ssize_t M, Py_ssize_t N, bint add) noexcept nogil:
    cdef Py_ssize_t i, n = min(<Py_ssize_t> STRIP, N - j)
    if not add:
        for i in range(n):
            db[j + i] = 0.0
    isa.kernels.column_sum(db + j, dout + j, N, M, n)


cdef void _backward(float *dx, float *dw, float *db, const float *dout, const float *x, Weights w, Py_ssize_t M,
                    Py_ssize_t N, Py_ssize_t K, bint add) noexcept nogil:
    cdef Py_ssize_t j
    if db != NULL:
        for j in prange(0, N, STRIP, num_threads=isa.threads, schedule="static"):
            _strip(j, db, dout, M, N, add)
    if dw != NULL:
        gemm(dw, K, dout, 1, N, x, K, 1, N, K, M, add, NULL)
    rows_times(dx, dout, w, M, N, K)


def linear_forward(out, x, w, b):
    cdef float[:, :, ::1] out_ = check.cube("out", out), x_ = check.cube("x", x)
    cdef Weights w_ = check.weights("w", w, 2)
    cdef float[::1] b_
    cdef float *bias = NULL
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = w.shape[0]
    check.expect("w", w.shape, (N, K))
    check.expect("out", out.shape, (*x.shape[:2], N))
    if b is not None:
        b_ = check.vector("b", b)
        check.expect("b", b.shape, (N,))
        bias = &b_[0]
    with nogil:
        rows_times_transposed(&out_[0, 0, 0], &x_[0, 0, 0], w_, bias, M, N, K)


cdef int _check_backward(str dx_name, dx, dw, db, dout, x, w) except -1:
    cdef Weights w_ = check.weights("w", w, 2)
    cdef Py_ssize_t K = check.cube("x", x).shape[2], N = w.shape[0]
    check.cube(dx_name, dx)
    check.cube("dout", dout)
    check.expect("w", w.shape, (N, K))
    check.expect(dx_name, dx.shape, x.shape)
    check.expect("dout", dout.shape, (*x.shape[:2], N))
    if dw is not None:
        if w_.bf16:
            raise ValueError("dw: must be None, a bfloat16 matrix is not trained")
        check.matrix("dw", dw)
        check.expect("dw", dw.shape, (N, K))
    if db is not None:
        if dw is None:
            raise ValueError("db: must be None where dw is")
        check.vector("db", db)
        check.expect("db", db.shape, (N,))
    return 0


def linear_backward(dx, dw, db, dout, x, w, accumulate):
    _check_backward("dx", dx, dw, db, dout, x, w)
    cdef float[:, :, ::1] dx_ = dx, dout_ = dout, x_ = x
    cdef Weights w_ = check.weights("w", w, 2)
    cdef float[:, ::1] dw_
    cdef float[::1] db_
    cdef float *dweights = NULL
    cdef float *dbias = NULL
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = w.shape[0]
    cdef bint add = accumulate
    if dw is not None:
        dw_ = dw
        dweights = &dw_[0, 0]
    if db is not None:
        db_ = db
        dbias = &db_[0]
    with nogil:
        _backward(&dx_[0, 0, 0], dweights, dbias, &dout_[0, 0, 0], &x_[0, 0, 0], w_, M, N, K, add)


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


cdef void _scale(float *x, float factor, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static"):
        isa.kernels.scale_span(x + i, factor, min(<Py_ssize_t> SPAN, n - i))


cdef int _check_column(str name, whole, column, Py_ssize_t n) except -1:
    if not 0 <= column <= whole.shape[2] - n:
        raise ValueError(f"column: {n} columns from {column} are not within the {whole.shape[2]} of {name}")
    return 0


def lora_forward(out, hidden, x, a, b, scale, column):
    cdef float[:, :, ::1] out_ = check.cube("out", out), hidden_ = check.cube("hidden", hidden)
    cdef float[:, :, ::1] x_ = check.cube("x", x)
    cdef float[:, ::1] a_ = check.matrix("a", a), b_ = check.matrix("b", b)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = out_.shape[2], n = b_.shape[0]
    cdef Py_ssize_t r = a_.shape[0], at
    cdef float factor = scale
    check.expect("a", a.shape, (r, K))
    check.expect("b", b.shape, (n, r))
    check.expect("hidden", hidden.shape, (*x.shape[:2], r))
    check.expect("out", out.shape, (*x.shape[:2], N))
    _check_column("out", out, column, n)
    at = column
    with nogil:
        gemm(&hidden_[0, 0, 0], r, &x_[0, 0, 0], K, 1, &a_[0, 0], 1, K, M, r, K, False, NULL)
        _scale(&hidden_[0, 0, 0], factor, M * r)
        gemm(&out_[0, 0, 0] + at, N, &hidden_[0, 0, 0], r, 1, &b_[0, 0], 1, r, M, n, r, True, NULL)


def lora_backward(da, db, dhidden, dout, hidden, x, b, scale, column, accumulate):
    cdef float[:, :, ::1] dhidden_ = check.cube("dhidden", dhidden), dout_ = check.cube("dout", dout)
    cdef float[:, :, ::1] hidden_ = check.cube("hidden", hidden), x_ = check.cube("x", x)
    cdef float[:, ::1] da_ = check.matrix("da", da), db_ = check.matrix("db", db), b_ = check.matrix("b", b)
    cdef Py_ssize_t M = x_.shape[0] * x_.shape[1], K = x_.shape[2], N = dout_.shape[2], n = b_.shape[0]
    cdef Py_ssize_t r = b_.shape[1], at
    cdef float factor = scale
    cdef bint add = accumulate
    check.expect("da", da.shape, (r, K))
    check.expect("db", db.shape, (n, r))
    check.expect("hidden", hidden.shape, (*x.shape[:2], r))
    check.expect("dhidden", dhidden.shape, hidden.shape)
    check.expect("dout", dout.shape, (*x.shape[:2], N))
    _check_column("dout", dout, column, n)
    at = column
    with nogil:
        gemm(&db_[0, 0], r, &dout_[0, 0, 0] + at, 1, N, &hidden_[0, 0, 0], r, 1, n, r, M, add, NULL)
        gemm(&dhidden_[0, 0, 0], r, &dout_[0, 0, 0] + at, N, 1, &b_[0, 0], r, 1, M, r, n, False, NULL)
        _scale(&dhidden_[0, 0, 0], factor, M * r)
        gemm(&da_[0, 0], K, &dhidden_[0, 0, 0], 1, r, &x_[0, 0, 0], K, 1, r, K, M, add, NULL)


def lora_backward_input(dx, dhidden, a):
    cdef float[:, :, ::1] dx_ = check.cube("dx", dx), dhidden_ = check.cube("dhidden", dhidden)
    cdef float[:, ::1] a_ = check.matrix("a", a)
    cdef Py_ssize_t M = dx_.shape[0] * dx_.shape[1], K = dx_.shape[2], r = a_.shape[0]
    check.expect("a", a.shape, (r, K))
    check.expect("dhidden", dhidden.shape, (*dx.shape[:2], r))
    with nogil:
        gemm(&dx_[0, 0, 0], K, &dhidden_[0, 0, 0], r, 1, &a_[0, 0], K, 1, M, K, r, True, NULL)


def product(use, out, a, b):
    """One of a linear layer's three products alone, to be measured (no op of the contract); all matrices float32:

    forward  out (M,N) = a (M,K) b (N,K)^T
    dx       out (M,K) = a (M,N) b (N,K)
    dw       out (N,K) = a (M,N)^T b (M,K)
    """
    cdef float[:, ::1] out_ = check.matrix("out", out), a_ = check.matrix("a", a), b_ = check.matrix("b", b)
    cdef Weights weights = check.weights("b", b, 2)
    cdef Py_ssize_t ra = a_.shape[0], ca = a_.shape[1], rb = b_.shape[0], cb = b_.shape[1]
    if use == "forward":
        check.expect("b", b.shape, (rb, ca))
        check.expect("out", out.shape, (ra, rb))
        with nogil:
            rows_times_transposed(&out_[0, 0], &a_[0, 0], weights, NULL, ra, rb, ca)
    elif use == "dx":
        check.expect("b", b.shape, (ca, cb))
        check.expect("out", out.shape, (ra, cb))
        with nogil:
            rows_times(&out_[0, 0], &a_[0, 0], weights, ra, ca, cb)
    elif use == "dw":
        check.expect("b", b.shape, (ra, cb))
        check.expect("out", out.shape, (ca, cb))
        with nogil:
            gemm(&out_[0, 0], cb, &a_[0, 0], 1, ca, &b_[0, 0], cb, 1, ca, cb, ra, False, NULL)
    else:
        raise ValueError(f"use: {use!r} is none of forward, dx, dw")
