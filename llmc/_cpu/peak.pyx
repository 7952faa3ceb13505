"""Ceilings of the active kernel table on the active number of threads, as measured now: the clock moves.

These are no ops: a backend need not have them, and no model calls them.  Whoever measures ops puts them beside an
op's own turn and compares the two.
"""

import time

import numpy as np

from cython.parallel cimport prange
from libc.stdlib cimport free, malloc

from llmc._cpu cimport isa
from llmc._cpu.workspace import empty

cdef enum:
    ROUNDS = 100000  # of a loop on registers: half a millisecond or more
    SPAN = 8192      # floats of each array that a thread takes at a time, as the element-wise ops do
    SKEW = 208       # floats between two arrays: at one distance from a page's start they would share cache sets
    ARRAYS = 16      # at most, in a stream

cdef float _sink = 0.0


cdef float _one(bint dot, double *work) noexcept nogil:
    cdef float value = 0.0
    work[0] = isa.kernels.dot_loop(ROUNDS, &value) if dot else isa.kernels.fma_loop(ROUNDS, &value)
    return value


cdef double _loops(bint dot, double *work, float *values) noexcept nogil:
    """One loop on every thread; the FLOPs of all of them."""
    cdef int i, threads = isa.threads
    cdef double total = 0.0
    for i in prange(threads, num_threads=isa.threads, schedule="static", chunksize=1):
        values[i] = _one(dot, &work[i])
    for i in range(threads):
        total = total + work[i]
    return total


cdef double _register_peak(bint dot, double seconds) except -1:
    cdef double *work = <double *> malloc(isa.threads * sizeof(double))
    cdef float *values = <float *> malloc(isa.threads * sizeof(float))
    cdef double done = 0.0
    if work == NULL or values == NULL:
        free(work)
        free(values)
        raise MemoryError()
    with nogil:
        _loops(dot, work, values)  # the clock of wide vectors settles, threads wake
    began = time.perf_counter()
    while True:
        with nogil:
            done += _loops(dot, work, values)
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            break
    free(work)
    free(values)
    return done / elapsed


def measure_fma(seconds=0.02):
    """FLOP/s of fp32 multiply-adds on registers, on all threads, over `seconds` or a little more."""
    return _register_peak(False, seconds)


def measure_dot(seconds=0.02):
    """FLOP/s of bf16 dot products on registers; those of `measure_fma` where the table has no such instruction,
    since products of bf16 are then made in fp32."""
    return _register_peak(True, seconds)


cdef float _span(float *base, Py_ssize_t stride, int reads, int writes, int updates, Py_ssize_t start,
                 Py_ssize_t n) noexcept nogil:
    cdef float *p[ARRAYS]
    cdef int k
    for k in range(reads + writes + updates):
        p[k] = base + k * stride + start
    return isa.kernels.stream_span(p, reads, writes, updates, n)


cdef float _stream(float *base, Py_ssize_t stride, int reads, int writes, int updates, Py_ssize_t n,
                   int passes) noexcept nogil:
    cdef Py_ssize_t i
    cdef int k
    cdef float last = 0.0
    for k in range(passes):
        for i in prange(0, n, SPAN, num_threads=isa.threads, schedule="static"):
            last = _span(base, stride, reads, writes, updates, i, min(<Py_ssize_t> SPAN, n - i))
    return last


def measure_stream(reads, writes, nbytes, seconds=0.02, updates=0):
    """B/s of a stream: `reads` arrays read, `writes` written and `updates` read and written in place, float32, of
    `nbytes` together, on all threads, over `seconds` or a little more, over and over the same arrays.

    Bytes are counted as a program sees them, an updated array twice.  What a cache fetches before it is written, or
    writes back, is the machine's own affair, of the op that is compared as of the stream.  ValueError for no array, or
    for more than 16.
    """
    global _sink
    cdef int r = reads, w = writes, u = updates, passes, arrays = r + w + u
    cdef Py_ssize_t step = 64, n, stride
    cdef float[::1] view
    if r < 0 or w < 0 or u < 0 or not 1 <= arrays <= ARRAYS:
        raise ValueError(f"reads, writes, updates: {reads}, {writes}, {updates} are not 1 to {ARRAYS} arrays")
    n = max(step, nbytes // 4 // arrays // step * step)
    stride = n + SKEW
    view = empty((stride * arrays,), np.float32)
    cdef float *base = &view[0]
    passes = max(1, (1 << 18) // (n * arrays))  # a megabyte at least between two looks at the clock
    with nogil:
        _stream(base, stride, 0, arrays, 0, n, 1)  # pages exist from their first writing on
        _stream(base, stride, r, w, u, n, passes)
    done, began = 0, time.perf_counter()
    while True:
        with nogil:
            _sink = _stream(base, stride, r, w, u, n, passes)
        done += passes
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            break
    return 4.0 * n * (r + w + 2 * u) * done / elapsed
