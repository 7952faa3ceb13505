"""Causal grouped-query attention without a T x T matrix (Dao et al. 2022, Ainslie et al. 2023).

A forward task is one query head of one sequence, a backward task one key-value head: dk and dv add over the query
heads that share it, in order.  Forward takes QUERIES rows at a time and walks over KEYS columns: scores by the packed
GEMM, an online softmax that rescales what was summed before, then probabilities times values straight into `out`.
Backward rebuilds each block of probabilities from the saved lse.  A block is computed from its first row that sees it
to the last whose window still reaches it, so little of what is masked is ever touched.

        keys ->    k0      k0+KEYS
    queries  q0   +----+
      |           | \\  |   row r of a block sees its keys from r + 1 - window - k0, or 0, to min(KEYS, r + 1 - k0);
      v           |\\ \\ |   the rest become 0
          q0+Q    +----+

Decoding, a row or a few, takes the query heads that share a key-value head together, and reads it once.
"""

from cython.parallel cimport prange, threadid
from libc.math cimport INFINITY, isfinite, log
from libc.string cimport memcpy, memset

from llmc._cpu cimport check, isa
from llmc._cpu.workspace cimport KEYS, QUERIES, SCORES, thread_scratch

cdef enum:
    FEW_TOKENS = 4   # up to here decoding makes dot products with the keys where they lie
    TOGETHER = 32    # query heads that decode together at most

cdef struct Rule:
    float scale
    float softcap        # 0: none
    Py_ssize_t window    # at most the number of keys, which is no window


cdef inline float _soften(float *s, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t width, Rule rule, float *m,
                          float *l) noexcept nogil:
    """One row of a block: it sees the keys from `begin` to `end`.  Gives the factor for what was summed before."""
    if begin > 0:
        memset(s, 0, begin * sizeof(float))
    if rule.softcap > 0.0:
        isa.kernels.softcap_span(s + begin, end - begin, rule.scale, rule.softcap)
        return isa.kernels.softmax_block(s + begin, end - begin, width - begin, 1.0, m, l)
    return isa.kernels.softmax_block(s + begin, end - begin, width - begin, rule.scale, m, l)


cdef void _forward_head(float *out, Py_ssize_t ldo, float *lse, const float *q, Py_ssize_t ldq, const float *k,
                        const float *v, Py_ssize_t ldk, Py_ssize_t T, Py_ssize_t position, Py_ssize_t D,
                        Rule rule) noexcept nogil:
    """T queries, the first of which has `position` keys before it.  lse may be NULL."""
    cdef float *scratch = thread_scratch(threadid())
    cdef float *s = scratch + isa.kernels.gemm_scratch
    cdef Py_ssize_t i, j, q0, k0, first, last, end, width, r, at
    cdef bint windowed = rule.window < position + T, add
    cdef float keep
    cdef float m[QUERIES]
    cdef float l[QUERIES]
    for i in range((T + QUERIES - 1) // QUERIES):
        q0 = i * QUERIES
        end = min(T, q0 + QUERIES)
        for r in range(end - q0):
            m[r] = -INFINITY
            l[r] = 0.0
            if windowed:  # no block of keys is the first for all rows
                memset(out + (q0 + r) * ldo, 0, D * sizeof(float))
        for j in range(max(0, position + q0 + 1 - rule.window) // KEYS, (position + end + KEYS - 1) // KEYS):
            k0 = j * KEYS
            first = max(q0, k0 - position)
            last = min(end, k0 + KEYS - 1 + rule.window - position)
            width = min(<Py_ssize_t> KEYS, position + T - k0)
            add = windowed or k0 > 0
            isa.gemm(s, KEYS, q + first * ldq, ldq, 1, k + k0 * ldk, 1, ldk, last - first, width, D, False, NULL,
                     scratch)
            for r in range(first, last):
                at = position + r + 1 - k0
                keep = _soften(s + (r - first) * KEYS, max(0, at - rule.window), min(width, at), width, rule,
                               &m[r - q0], &l[r - q0])
                if add:
                    isa.kernels.scale_span(out + r * ldo, keep, D)
            isa.gemm(out + first * ldo, ldo, s, KEYS, 1, v + k0 * ldk, ldk, 1, last - first, D, width, add, NULL,
                     scratch)
        for r in range(q0, end):
            isa.kernels.scale_span(out + r * ldo, 1.0 / l[r - q0], D)
            if lse != NULL:
                lse[r] = <float> (m[r - q0] + log(<double> l[r - q0]))


cdef void _backward_head(float *dq, float *dk, float *dv, Py_ssize_t ld, const float *dout, Py_ssize_t ldo,
                         const float *q, const float *k, const float *v, const float *out, const float *lse,
                         Py_ssize_t T, Py_ssize_t D, Rule rule, bint add_keys) noexcept nogil:
    """dV = P^T dO;  dP = dO V^T;  dS = P (dP - delta) with delta = rowsum(dO O);  dQ = dS K;  dK = dS^T Q.

    One query head; dk and dv are added to where it is not the first to share them."""
    cdef float *scratch = thread_scratch(threadid())
    cdef float *s = scratch + isa.kernels.gemm_scratch
    cdef float *dp = s + SCORES
    cdef float *row
    cdef float *drow
    cdef Py_ssize_t i, j, q0, k0, first, last, width, rows, r, begin, end
    cdef bint windowed = rule.window < T, add
    cdef float delta
    if windowed:  # no block of keys is the first for all rows
        for r in range(T):
            memset(dq + r * ld, 0, D * sizeof(float))
    for j in range((T + KEYS - 1) // KEYS):
        k0 = j * KEYS
        width = min(<Py_ssize_t> KEYS, T - k0)
        end = min(T, k0 + KEYS - 1 + rule.window)
        for i in range(k0 // QUERIES, (end + QUERIES - 1) // QUERIES):
            q0 = i * QUERIES
            first = max(q0, k0)
            last = min(end, q0 + QUERIES)
            rows = last - first
            add = add_keys or q0 > k0  # the first block of queries to see these keys sets their gradient
            isa.gemm(s, KEYS, q + first * ld, ld, 1, k + k0 * ld, 1, ld, rows, width, D, False, NULL, scratch)
            isa.gemm(dp, KEYS, dout + first * ldo, ldo, 1, v + k0 * ld, 1, ld, rows, width, D, False, NULL, scratch)
            for r in range(first, last):
                delta = isa.kernels.dot_span(dout + r * ldo, out + r * ldo, D)
                row = s + (r - first) * KEYS
                drow = dp + (r - first) * KEYS
                begin = max(0, r + 1 - rule.window - k0)
                if begin > 0:
                    memset(row, 0, begin * sizeof(float))
                    memset(drow, 0, begin * sizeof(float))
                if rule.softcap > 0.0:
                    isa.kernels.softcap_span(row + begin, min(width, r + 1 - k0) - begin, rule.scale, rule.softcap)
                isa.kernels.softmax_backward_block(row + begin, drow + begin, min(width, r + 1 - k0) - begin,
                                                   width - begin, rule.scale, rule.softcap, lse[r], delta)
            isa.gemm(dv + k0 * ld, ld, s, 1, KEYS, dout + first * ldo, ldo, 1, width, D, rows, add, NULL, scratch)
            isa.gemm(dk + k0 * ld, ld, dp, 1, KEYS, q + first * ld, ld, 1, width, D, rows, add, NULL, scratch)
            isa.gemm(dq + first * ld, ld, dp, KEYS, 1, k + k0 * ld, ld, 1, rows, D, width, windowed or k0 > 0, NULL,
                     scratch)


cdef void _decode_heads(float *out, Py_ssize_t ldo, const float *q, Py_ssize_t ldq, const float *k, const float *v,
                        Py_ssize_t ldk, Py_ssize_t heads, Py_ssize_t T, Py_ssize_t position, Py_ssize_t D,
                        Rule rule) noexcept nogil:
    """T tokens of `heads` query heads that share their keys and values."""
    cdef float *s = thread_scratch(threadid())
    cdef Py_ssize_t t, h, k0, seen, width
    cdef float keep
    cdef float m[TOGETHER]
    cdef float l[TOGETHER]
    for t in range(T):
        for h in range(heads):
            m[h] = -INFINITY
            l[h] = 0.0
        memset(out + t * ldo, 0, heads * D * sizeof(float))
        seen = position + t + 1
        k0 = max(0, seen - rule.window)
        while k0 < seen:
            width = min(<Py_ssize_t> KEYS, seen - k0)
            isa.kernels.dot_rows(s, KEYS, q + t * ldq, D, heads, k + k0 * ldk, ldk, D, width, NULL, NULL)
            for h in range(heads):
                keep = _soften(s + h * KEYS, 0, width, width, rule, &m[h], &l[h])
                isa.kernels.scale_span(out + t * ldo + h * D, keep, D)
                isa.kernels.mix_rows(out + t * ldo + h * D, s + h * KEYS, v + k0 * ldk, ldk, width, D)
            k0 += KEYS
        for h in range(heads):
            isa.kernels.scale_span(out + t * ldo + h * D, 1.0 / l[h], D)


cdef void _append(float *keys, float *values, const float *qkv, Py_ssize_t T, Py_ssize_t ld, Py_ssize_t queries,
                  Py_ssize_t width) noexcept nogil:
    cdef Py_ssize_t t
    for t in range(T):
        memcpy(keys + t * width, qkv + t * ld + queries, width * sizeof(float))
        memcpy(values + t * width, qkv + t * ld + queries + width, width * sizeof(float))


cdef Py_ssize_t _head_size(str name, Py_ssize_t C, Py_ssize_t H) except -1:
    if H < 1 or C % H:
        raise ValueError(f"{name}: {C} channels do not divide into {H} heads")
    return C // H


cdef Py_ssize_t _groups(str name, Py_ssize_t channels, Py_ssize_t D, Py_ssize_t H) except -1:
    """G, from the number of channels of the key heads."""
    cdef Py_ssize_t G = channels // D if D else H
    if channels < 0 or G * D != channels or G < 1 or H % G:
        raise ValueError(f"{name}: {channels} channels of keys are no key-value heads of {D} for {H} query heads")
    return G


cdef Py_ssize_t _qkv_groups(Py_ssize_t width, Py_ssize_t D, Py_ssize_t H) except -1:
    if (width - H * D) % 2:
        raise ValueError(f"qkv: {width} channels are no {H} query heads of {D} with keys and values")
    return _groups("qkv", (width - H * D) // 2, D, H)


cdef Rule _rule(scale, window, softcap, Py_ssize_t keys) except *:
    cdef Rule rule
    rule.scale = scale
    rule.softcap = softcap
    if not (rule.scale > 0 and isfinite(rule.scale)):
        raise ValueError(f"scale: must be positive and finite, got {scale}")
    if not (rule.softcap >= 0 and isfinite(rule.softcap)):
        raise ValueError(f"softcap: must be positive and finite, or 0 for none, got {softcap}")
    if window < 0:
        raise ValueError(f"window: must be positive, or 0 for none, got {window}")
    rule.window = keys if window == 0 else min(window, keys)
    return rule


def attention_forward(out, lse, qkv, scale, window, softcap):
    cdef float[:, :, ::1] out_ = check.cube("out", out), lse_ = check.cube("lse", lse), qkv_ = check.cube("qkv", qkv)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], H = lse_.shape[1], ld = qkv_.shape[2]
    cdef Py_ssize_t D = _head_size("lse", C, H), G, group, i, at
    cdef Rule rule = _rule(scale, window, softcap, T)
    check.expect("qkv", qkv.shape, (B, T, ld))
    check.expect("lse", lse.shape, (B, H, T))
    G = _qkv_groups(ld, D, H)
    group = H // G
    for i in prange(B * H, num_threads=isa.threads, schedule="dynamic", nogil=True):
        at = i // H * T * ld
        _forward_head(&out_[0, 0, 0] + i // H * T * C + i % H * D, C, &lse_[0, 0, 0] + i * T,
                      &qkv_[0, 0, 0] + at + i % H * D, ld, &qkv_[0, 0, 0] + at + C + i % H // group * D,
                      &qkv_[0, 0, 0] + at + C + (G + i % H // group) * D, ld, T, 0, D, rule)


cdef void _backward_group(Py_ssize_t i, float *dqkv, const float *dout, const float *qkv, const float *out,
                          const float *lse, Py_ssize_t T, Py_ssize_t H, Py_ssize_t G, Py_ssize_t D,
                          Rule rule) noexcept nogil:
    """Key-value head i % G of sequence i // G."""
    cdef Py_ssize_t ld = (H + 2 * G) * D, b = i // G, group = H // G, h
    cdef Py_ssize_t key = b * T * ld + (H + i % G) * D, value = key + G * D, query, at
    for h in range(i % G * group, (i % G + 1) * group):
        query = b * T * ld + h * D
        at = b * T * H * D + h * D
        _backward_head(dqkv + query, dqkv + key, dqkv + value, ld, dout + at, H * D, qkv + query, qkv + key,
                       qkv + value, out + at, lse + (b * H + h) * T, T, D, rule, h % group > 0)


def attention_backward(dqkv, dout, qkv, out, lse, scale, window, softcap):
    cdef float[:, :, ::1] dqkv_ = check.cube("dqkv", dqkv), dout_ = check.cube("dout", dout)
    cdef float[:, :, ::1] out_ = check.cube("out", out), lse_ = check.cube("lse", lse), qkv_ = check.cube("qkv", qkv)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], H = lse_.shape[1], ld = qkv_.shape[2]
    cdef Py_ssize_t D = _head_size("lse", C, H), G, i
    cdef Rule rule = _rule(scale, window, softcap, T)
    check.expect("dout", dout.shape, out.shape)
    check.expect("qkv", qkv.shape, (B, T, ld))
    check.expect("dqkv", dqkv.shape, (B, T, ld))
    check.expect("lse", lse.shape, (B, H, T))
    G = _qkv_groups(ld, D, H)
    for i in prange(B * G, num_threads=isa.threads, schedule="dynamic", nogil=True):
        _backward_group(i, &dqkv_[0, 0, 0], &dout_[0, 0, 0], &qkv_[0, 0, 0], &out_[0, 0, 0], &lse_[0, 0, 0], T, H, G,
                        D, rule)


cdef void _decode_some(Py_ssize_t i, Py_ssize_t parts, float *out, const float *keys, const float *values,
                       const float *qkv, const int *positions, Py_ssize_t T, Py_ssize_t max_T, Py_ssize_t H,
                       Py_ssize_t G, Py_ssize_t D, Rule rule) noexcept nogil:
    """Part i % parts of the query heads that share key-value head i // parts % G of sequence i // parts // G."""
    cdef Py_ssize_t ld = (H + 2 * G) * D, b = i // parts // G, g = i // parts % G, group = H // G
    cdef Py_ssize_t h = g * group + group * (i % parts) // parts, end = g * group + group * (i % parts + 1) // parts
    cdef Py_ssize_t key = b * max_T * G * D + g * D
    if T <= FEW_TOKENS:
        _decode_heads(out + (b * T * H + h) * D, H * D, qkv + b * T * ld + h * D, ld, keys + key, values + key, G * D,
                      end - h, T, positions[b], D, rule)
        return
    for h in range(h, end):
        _forward_head(out + (b * T * H + h) * D, H * D, NULL, qkv + b * T * ld + h * D, ld, keys + key, values + key,
                      G * D, T, positions[b], D, rule)


def attention_decode(out, keys, values, qkv, positions, H, scale, window, softcap):
    cdef float[:, :, ::1] out_ = check.cube("out", out), qkv_ = check.cube("qkv", qkv)
    cdef float[:, :, ::1] keys_ = check.cube("keys", keys), values_ = check.cube("values", values)
    cdef Py_ssize_t B = out_.shape[0], T = out_.shape[1], C = out_.shape[2], max_T = keys_.shape[1], heads = H
    cdef Py_ssize_t D = _head_size("H", C, heads), width = keys_.shape[2], G = _groups("keys", width, D, heads)
    cdef int[::1] positions_ = check.places("positions", positions, out.shape)
    cdef Py_ssize_t i, parts, group = heads // G
    cdef Rule rule = _rule(scale, window, softcap, max_T)
    check.expect("qkv", qkv.shape, (B, T, C + 2 * width))
    check.expect("keys", keys.shape, (B, max_T, width))
    check.expect("values", values.shape, (B, max_T, width))
    check.within("positions", positions_, T, max_T, "of the cache")
    if B == 0 or T == 0:
        return
    # As many tasks as threads where the heads allow it.
    parts = min(group, max((isa.threads + B * G - 1) // (B * G), (group + TOGETHER - 1) // TOGETHER))
    with nogil:
        for i in range(B):
            _append(&keys_[i, 0, 0] + positions_[i] * width, &values_[i, 0, 0] + positions_[i] * width,
                    &qkv_[i, 0, 0], T, C + 2 * width, C, width)
        for i in prange(B * G * parts, num_threads=isa.threads, schedule="dynamic"):
            _decode_some(i, parts, &out_[0, 0, 0], &keys_[0, 0, 0], &values_[0, 0, 0], &qkv_[0, 0, 0], &positions_[0],
                         T, max_T, heads, G, D, rule)
