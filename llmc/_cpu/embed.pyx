"""Token and position embedding.

Backward without atomics: many positions may hold the same token, so threads divide the channels, not the tokens,
and each walks all tokens in order over its own columns.
"""

from cython.parallel cimport prange
from libc.stdint cimport uint16_t
from libc.string cimport memcpy, memset

from llmc._cpu cimport check, isa

cdef enum:
    STRIP = 64  # channels of one backward task


cdef void _forward_token(float *out, check.Weights wte, check.Weights wpe, Py_ssize_t token, Py_ssize_t place,
                         Py_ssize_t C, float scale) noexcept nogil:
    if wpe.data == NULL:
        memset(out, 0, C * sizeof(float))
    elif wpe.bf16:
        isa.kernels.widen_span(out, <uint16_t *> wpe.data + place * C, C)
    else:
        memcpy(out, <float *> wpe.data + place * C, C * sizeof(float))
    if wte.bf16:
        isa.kernels.axpy_bf16_span(out, scale, <uint16_t *> wte.data + token * C, C)
    else:
        isa.kernels.axpy_span(out, scale, <float *> wte.data + token * C, C)


cdef void _backward_strip(Py_ssize_t c, float *dwte, float *dwpe, const float *dout, const int *tokens, Py_ssize_t B,
                          Py_ssize_t T, Py_ssize_t C, Py_ssize_t max_T, float scale, bint add) noexcept nogil:
    cdef Py_ssize_t i, n = min(<Py_ssize_t> STRIP, C - c)
    cdef float *row
    cdef const float *d
    if dwpe != NULL and not add:
        for i in range(max_T):
            memset(dwpe + i * C + c, 0, n * sizeof(float))
    for i in range(B * T):
        d = dout + i * C + c
        isa.kernels.axpy_span(dwte + tokens[i] * C + c, scale, d, n)
        if dwpe != NULL:
            row = dwpe + i % T * C + c
            isa.kernels.add_span(row, row, d, n)


def embedding_forward(out, tokens, positions, wte, wpe, V, scale):
    cdef float[:, :, ::1] out_ = check.cube("out", out)
    cdef int[:, ::1] tokens_ = check.ids("tokens", tokens)
    cdef int[::1] positions_ = check.places("positions", positions, tokens.shape)
    cdef check.Weights wte_ = check.weights("wte", wte, 2), wpe_
    cdef Py_ssize_t B = tokens_.shape[0], T = tokens_.shape[1], C = wte.shape[1], i
    cdef float factor = scale
    check.expect("out", out.shape, (B, T, C))
    if not 0 <= V <= wte.shape[0]:
        raise ValueError(f"V: {V} is outside [0, {wte.shape[0]}], the rows of wte")
    wpe_.data = NULL
    if wpe is not None:
        wpe_ = check.weights("wpe", wpe, 2)
        check.expect("wpe", wpe.shape, (wpe.shape[0], C))
        check.within("positions", positions_, T, wpe.shape[0], "rows of wpe")
    check.in_range("tokens", tokens_, V)
    for i in prange(B * T, num_threads=isa.team(B * T), schedule="static", nogil=True):
        _forward_token(&out_[0, 0, 0] + i * C, wte_, wpe_, (&tokens_[0, 0])[i], (&positions_[0])[i // T] + i % T, C,
                       factor)


def embedding_backward(dwte, dwpe, dout, tokens, scale, accumulate):
    cdef float[:, ::1] dwte_ = check.matrix("dwte", dwte), dwpe_
    cdef float[:, :, ::1] dout_ = check.cube("dout", dout)
    cdef int[:, ::1] tokens_ = check.ids("tokens", tokens)
    cdef Py_ssize_t B = tokens_.shape[0], T = tokens_.shape[1], C = dwte_.shape[1], max_T = 0, c
    cdef float *by_place = NULL
    cdef float factor = scale
    cdef bint add = accumulate
    check.expect("dout", dout.shape, (B, T, C))
    if dwpe is not None:
        dwpe_ = check.matrix("dwpe", dwpe)
        by_place, max_T = &dwpe_[0, 0], dwpe_.shape[0]
        check.expect("dwpe", dwpe.shape, (max_T, C))
        if T > max_T:
            raise ValueError(f"dwpe: {max_T} rows for {T} tokens")
    check.in_range("tokens", tokens_, dwte_.shape[0])
    for c in prange(0, C, STRIP, num_threads=isa.threads, schedule="static", nogil=True):
        _backward_strip(c, &dwte_[0, 0], by_place, &dout_[0, 0, 0], &tokens_[0, 0], B, T, C, max_T, factor, add)
