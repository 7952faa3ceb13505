"""Causal multi-head attention without a T x T matrix (Dao et al. 2022).

One task is one head of one sequence.  Forward takes QUERIES rows at a time and walks over KEYS columns: scores by the
packed GEMM, an online softmax that rescales what was summed before, then probabilities times values straight into
`out`.  Backward rebuilds each block of probabilities from the saved lse.  A block that straddles the diagonal is
computed from its first row that sees it, so little of the masked half is ever touched.

        keys ->    k0      k0+KEYS
    queries  q0   +----+
      |           | \\  |   row r of a block sees min(KEYS, r + 1 - k0) of its keys;
      v           |  \\ |   the rest become 0
          q0+Q    +----+
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, log, sqrt
from libc.string cimport memcpy, memset

from llmc._cpu cimport check, isa
from llmc._cpu.workspace cimport KEYS, QUERIES, SCORES, thread_scratch

cdef void _forward_head(float *out, float *lse, const float *qkv, Py_ssize_t T, Py_ssize_t C,
                        Py_ssize_t size) noexcept nogil:
    """One head: out, qkv point at its first channel of token 0; size is its number of channels."""
    cdef float *scratch = thread_scratch(threadid())
    cdef float *s = scratch + isa.kernels.gemm_scratch
    cdef const float *q = qkv
    cdef const float *k = qkv + C
    cdef const float *v = qkv + 2 * C
    cdef Py_ssize_t ld = 3 * C, i, j, q0, k0, first, end, width, r
    cdef float scale = <float> (1.0 / sqrt(<double> size)), keep
    cdef float m[QUERIES]
    cdef float l[QUERIES]
    for i in range((T + QUERIES - 1) // QUERIES):
        q0 = i * QUERIES
        end = min(T, q0 + QUERIES)
        for r in range(end - q0):
            m[r] = -INFINITY
            l[r] = 0.0
        for j in range((end + KEYS - 1) // KEYS):
            k0 = j * KEYS
            first = max(q0, k0)
            width = min(<Py_ssize_t> KEYS, T - k0)
            isa.gemm(s, KEYS, q + first * ld, ld, 1, k + k0 * ld, 1, ld, end - first, width, size, False, NULL,
                     scratch)
            for r in range(first, end):
                keep = isa.kernels.softmax_block(s + (r - first) * KEYS, min(width, r + 1 - k0), width, scale,
                                                 &m[r - q0], &l[r - q0])
                if k0 > 0:
                    isa.kernels.scale_span(out + r * C, keep, size)
            isa.gemm(out + first * C, C, s, KEYS, 1, v + k0 * ld, ld, 1, end - first, size, width, k0 > 0, NULL,
                     scratch)
        for r in range(q0, end):
            isa.kernels.scale_span(out + r * C, 1.0 / l[r - q0], size)
            lse[r] = <float> (m[r - q0] + log(<double> l[r - q0]))


cdef void _backward_head(float *dqkv, const float *dout, const float *qkv, const float *out, const float *lse,
                         Py_ssize_t T, Py_ssize_t C, Py_ssize_t size) noexcept nogil:
    """dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta) with delta = rowsum(dO O);  dQ = dS K;  dK = dS^T Q."""
    cdef float *scratch = thread_scratch(threadid())
    cdef float *s = scratch + isa.kernels.gemm_scratch
    cdef float *dp = s + SCORES
    cdef const float *q = qkv
    cdef const float *k = qkv + C
    cdef const float *v = qkv + 2 * C
    cdef float *dq = dqkv
    cdef float *dk = dqkv + C
    cdef float *dv = dqkv + 2 * C
    cdef Py_ssize_t ld = 3 * C, i, j, q0, k0, first, end, width, rows, r
    cdef float scale = <float> (1.0 / sqrt(<double> size)), delta
    cdef bint add
    for j in range((T + KEYS - 1) // KEYS):
        k0 = j * KEYS
        width = min(<Py_ssize_t> KEYS, T - k0)
        for i in range(k0 // QUERIES, (T + QUERIES - 1) // QUERIES):
            q0 = i * QUERIES
            first = max(q0, k0)
            end = min(T, q0 + QUERIES)
            rows = end - first
            add = q0 > k0  # the first block of queries to see these keys sets their gradient
            isa.gemm(s, KEYS, q + first * ld, ld, 1, k + k0 * ld, 1, ld, rows, width, size, False, NULL, scratch)
            isa.gemm(dp, KEYS, dout + first * C, C, 1, v + k0 * ld, 1, ld, rows, width, size, False, NULL,
                     scratch)
            for r in range(first, end):
                delta = isa.kernels.dot_span(dout + r * C, out + r * C, size)
                isa.kernels.softmax_backward_block(s + (r - first) * KEYS, dp + (r - first) * KEYS,
                                                   min(width, r + 1 - k0), width, scale, lse[r], delta)
            isa.gemm(dv + k0 * ld, ld, s, 1, KEYS, dout + first * C, C, 1, width, size, rows, add, NULL, scratch)
            isa.gemm(dk + k0 * ld, ld, dp, 1, KEYS, q + first * ld, ld, 1, width, size, rows, add, NULL, scratch)
            isa.gemm(dq + first * ld, ld, dp, KEYS, 1, k + k0 * ld, ld, 1, rows, size, width, k0 > 0, NULL,
                     scratch)


cdef void _decode_head(float *out, const float *keys, const float *values, const float *qkv, Py_ssize_t T,
                       Py_ssize_t C, Py_ssize_t size, Py_ssize_t position) noexcept nogil:
    cdef float *s = thread_scratch(threadid())
    cdef Py_ssize_t t, block, k0, j, seen, width
    cdef float scale = <float> (1.0 / sqrt(<double> size)), keep, m, l
    for t in range(T):
        seen = position + t + 1
        m = -INFINITY
        l = 0.0
        memset(out + t * C, 0, size * sizeof(float))
        for block in range((seen + KEYS - 1) // KEYS):
            k0 = block * KEYS
            width = min(<Py_ssize_t> KEYS, seen - k0)
            isa.kernels.dot_rows(s, qkv + t * 3 * C, keys + k0 * C, C, size, width, NULL)
            keep = isa.kernels.softmax_block(s, width, width, scale, &m, &l)
            isa.kernels.scale_span(out + t * C, keep, size)
            for j in range(width):
                isa.kernels.axpy_span(out + t * C, s[j], values + (k0 + j) * C, size)
        isa.kernels.scale_span(out + t * C, 1.0 / l, size)


cdef void _append(Py_ssize_t i, float *keys, float *values, const float *qkv, Py_ssize_t T, Py_ssize_t C,
                  Py_ssize_t max_T, Py_ssize_t position) noexcept nogil:
    cdef Py_ssize_t row = (i // T * max_T + position + i % T) * C
    memcpy(keys + row, qkv + i * 3 * C + C, C * sizeof(float))
    memcpy(values + row, qkv + i * 3 * C + 2 * C, C * sizeof(float))


cdef int _heads(str name, Py_ssize_t C, Py_ssize_t H) except -1:
    if H < 1 or C % H:
        raise ValueError(f"{name}: {C} channels do not divide into {H} heads")
    return 0


def attention_forward(out, lse, qkv):
    cdef float[:, :, ::1] out_ = check.cube("out", out), lse_ = check.cube("lse", lse), qkv_ = check.cube("qkv", qkv)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], H = lse_.shape[1], i, size
    check.expect("qkv", qkv.shape, (B, T, 3 * C))
    check.expect("lse", lse.shape, (B, H, T))
    _heads("lse", C, H)
    size = C // H
    for i in prange(B * H, num_threads=isa.threads, schedule="dynamic", nogil=True):
        _forward_head(&out_[0, 0, 0] + i // H * T * C + i % H * size, &lse_[0, 0, 0] + i * T,
                      &qkv_[0, 0, 0] + i // H * T * 3 * C + i % H * size, T, C, size)


def attention_backward(dqkv, dout, qkv, out, lse):
    cdef float[:, :, ::1] dqkv_ = check.cube("dqkv", dqkv), dout_ = check.cube("dout", dout)
    cdef float[:, :, ::1] out_ = check.cube("out", out), lse_ = check.cube("lse", lse), qkv_ = check.cube("qkv", qkv)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], H = lse_.shape[1], i, size, at, at3
    check.expect("dout", dout.shape, out.shape)
    check.expect("qkv", qkv.shape, (B, T, 3 * C))
    check.expect("dqkv", dqkv.shape, (B, T, 3 * C))
    check.expect("lse", lse.shape, (B, H, T))
    _heads("lse", C, H)
    size = C // H
    for i in prange(B * H, num_threads=isa.threads, schedule="dynamic", nogil=True):
        at = i // H * T * C + i % H * size
        at3 = i // H * T * 3 * C + i % H * size
        _backward_head(&dqkv_[0, 0, 0] + at3, &dout_[0, 0, 0] + at, &qkv_[0, 0, 0] + at3, &out_[0, 0, 0] + at,
                       &lse_[0, 0, 0] + i * T, T, C, size)


def attention_decode(out, keys, values, qkv, H, position):
    cdef float[:, :, ::1] out_ = check.cube("out", out), qkv_ = check.cube("qkv", qkv)
    cdef float[:, :, ::1] keys_ = check.cube("keys", keys), values_ = check.cube("values", values)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], max_T = keys_.shape[1], heads = H
    cdef Py_ssize_t i, size, start = position
    check.expect("qkv", qkv.shape, (B, T, 3 * C))
    check.expect("keys", keys.shape, (B, max_T, C))
    check.expect("values", values.shape, (B, max_T, C))
    _heads("H", C, heads)
    if not 0 <= start <= max_T - T:
        raise ValueError(f"position: {T} tokens from {start} exceed the cache's {max_T}")
    size = C // heads
    with nogil:
        for i in prange(B * T, num_threads=isa.threads, schedule="static"):
            _append(i, &keys_[0, 0, 0], &values_[0, 0, 0], &qkv_[0, 0, 0], T, C, max_T, start)
        for i in prange(B * heads, num_threads=isa.threads, schedule="static"):
            _decode_head(&out_[0, 0, 0] + i // heads * T * C + i % heads * size,
                         &keys_[0, 0, 0] + i // heads * max_T * C + i % heads * size,
                         &values_[0, 0, 0] + i // heads * max_T * C + i % heads * size,
                         &qkv_[0, 0, 0] + i // heads * T * 3 * C + i % heads * size, T, C, size, start)
