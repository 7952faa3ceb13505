"""Rotary position embedding (Su et al. 2021), in place."""

from cython.parallel cimport prange

from llmc._cpu cimport check, isa


cdef int _turn(str name, float[:, :, ::1] x, float[:, ::1] table, int[::1] places, Py_ssize_t heads,
               float direction) except -1:
    """`places` is None where every sequence begins at position 0."""
    cdef Py_ssize_t B = x.shape[0], T = x.shape[1], N = x.shape[2], D = table.shape[1], i
    cdef int *first = NULL if places is None else &places[0]
    if D % 2:
        raise ValueError(f"table: {D} numbers for a position are no pairs of cosine and sine")
    if heads < 0 or (D > 0 and heads > N // D):
        raise ValueError(f"heads: {heads} of {D} channels do not fit into the {N} of {name}")
    for i in prange(B * T, num_threads=isa.team(B * T), schedule="static", nogil=True):
        isa.kernels.rope_row(&x[0, 0, 0] + i * N,
                             &table[0, 0] + ((0 if first == NULL else first[i // T]) + i % T) * D, heads, D, direction)
    return 0


def rope_forward(qkv, positions, table, heads):
    cdef float[:, :, ::1] qkv_ = check.cube("qkv", qkv)
    cdef float[:, ::1] table_ = check.matrix("table", table)
    cdef int[::1] positions_ = check.places("positions", positions, qkv.shape)
    check.within("positions", positions_, qkv_.shape[1], table_.shape[0], "rows of table")
    _turn("qkv", qkv_, table_, positions_, heads, 1.0)


def rope_backward(dqkv, table, heads):
    cdef float[:, :, ::1] dqkv_ = check.cube("dqkv", dqkv)
    cdef float[:, ::1] table_ = check.matrix("table", table)
    if dqkv_.shape[1] > table_.shape[0]:
        raise ValueError(f"table: {table_.shape[0]} rows for {dqkv_.shape[1]} tokens")
    _turn("dqkv", dqkv_, table_, None, heads, -1.0)
