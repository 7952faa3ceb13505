"""Token and position embedding.

Backward without atomics: many positions may hold the same token, so threads divide the channels, not the tokens,
and each walks all tokens in order over its own columns.
"""

from cython.parallel cimport prange
from libc.string cimport memset

from llmc._cpu cimport check, isa

cdef enum:
    STRIP = 64  # channels of one backward task


cdef void _forward_token(Py_ssize_t i, float *out, const int *tokens, const float *wte, const float *wpe,
                         Py_ssize_t T, Py_ssize_t C, Py_ssize_t position) noexcept nogil:
    isa.kernels.add_span(out + i * C, wte + tokens[i] * C, wpe + (position + i % T) * C, C)


cdef void _backward_strip(Py_ssize_t c, float *dwte, float *dwpe, const float *dout, const int *tokens, Py_ssize_t B,
                          Py_ssize_t T, Py_ssize_t C, Py_ssize_t max_T, bint add) noexcept nogil:
    cdef Py_ssize_t i, n = min(<Py_ssize_t> STRIP, C - c)
    cdef float *row
    cdef const float *d
    if not add:
        for i in range(max_T):
            memset(dwpe + i * C + c, 0, n * sizeof(float))
    for i in range(B * T):
        d = dout + i * C + c
        row = dwte + tokens[i] * C + c
        isa.kernels.add_span(row, row, d, n)
        row = dwpe + i % T * C + c
        isa.kernels.add_span(row, row, d, n)


def embedding_forward(out, tokens, wte, wpe, V, position):
    cdef float[:, :, ::1] out_ = check.cube("out", out)
    cdef int[:, ::1] tokens_ = check.ids("tokens", tokens)
    cdef float[:, ::1] wte_ = check.matrix("wte", wte), wpe_ = check.matrix("wpe", wpe)
    cdef Py_ssize_t B = tokens_.shape[0], T = tokens_.shape[1], C = wte_.shape[1], i, start = position
    check.expect("out", out.shape, (B, T, C))
    check.expect("wpe", wpe.shape, (wpe_.shape[0], C))
    if not 0 <= V <= wte_.shape[0]:
        raise ValueError(f"V: {V} is outside [0, {wte_.shape[0]}], the rows of wte")
    if not 0 <= start <= wpe_.shape[0] - T:
        raise ValueError(f"position: {T} tokens from {start} exceed the {wpe_.shape[0]} rows of wpe")
    check.in_range("tokens", tokens_, V)
    for i in prange(B * T, num_threads=isa.threads, schedule="static", nogil=True):
        _forward_token(i, &out_[0, 0, 0], &tokens_[0, 0], &wte_[0, 0], &wpe_[0, 0], T, C, start)


def embedding_backward(dwte, dwpe, dout, tokens, accumulate):
    cdef float[:, ::1] dwte_ = check.matrix("dwte", dwte), dwpe_ = check.matrix("dwpe", dwpe)
    cdef float[:, :, ::1] dout_ = check.cube("dout", dout)
    cdef int[:, ::1] tokens_ = check.ids("tokens", tokens)
    cdef Py_ssize_t B = tokens_.shape[0], T = tokens_.shape[1], C = dwte_.shape[1], c
    cdef bint add = accumulate
    check.expect("dout", dout.shape, (B, T, C))
    check.expect("dwpe", dwpe.shape, (dwpe_.shape[0], C))
    if T > dwpe_.shape[0]:
        raise ValueError(f"dwpe: {dwpe_.shape[0]} rows for {T} tokens")
    check.in_range("tokens", tokens_, dwte_.shape[0])
    for c in prange(0, C, STRIP, num_threads=isa.threads, schedule="static", nogil=True):
        _backward_strip(c, &dwte_[0, 0], &dwpe_[0, 0], &dout_[0, 0, 0], &tokens_[0, 0], B, T, C, dwpe_.shape[0], add)
