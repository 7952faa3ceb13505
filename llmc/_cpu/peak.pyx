"""Ceilings of the active kernel table on the active number of threads, as measured now: the clock moves.

All threads run at once and each for the whole time by its own clock; the ceiling is the sum of their rates.  Waiting for
the slowest thread is what an op may lose against its ceiling, no part of the ceiling; a clock that moves, or another
program on a core, is part of both.

These are no ops: a backend need not have them, and no model calls them.  Whoever measures ops puts them beside an
op's own turn and compares the two.
"""

from cython.parallel cimport prange
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from llmc._cpu cimport isa

cdef enum:
    ROUNDS = 20000   # of a loop on registers, between two looks at the clock: a tenth of a millisecond or more
    SPAN = 8192      # floats of each array that a thread takes at a time, as the element-wise ops do
    SKEW = 208       # floats between two arrays: at one distance from a page's start they would share cache sets
    ARRAYS = 16      # at most, in a stream
    THREADS = 1024   # at most, as `resolve_threads` has it

# What the loops give: stored, they are not optimised away.
cdef float[THREADS] _values
cdef double[THREADS] _rates


cdef double _now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <double> t.tv_sec + 1e-9 * <double> t.tv_nsec


cdef double _loop(int thread, bint dot, double seconds) noexcept nogil:
    """FLOP/s of one thread."""
    cdef double began = _now(), elapsed = 0.0, work = 0.0
    while work == 0.0 or elapsed < seconds:
        if dot:
            work += isa.kernels.dot_loop(ROUNDS, &_values[thread])
        else:
            work += isa.kernels.fma_loop(ROUNDS, &_values[thread])
        elapsed = _now() - began
    return work / elapsed


def _registers(bint dot, double seconds):
    """FLOP/s of all threads at once."""
    cdef int i, threads = isa.threads
    for i in prange(threads, num_threads=isa.threads, schedule="static", chunksize=1, nogil=True):
        _rates[i] = _loop(i, dot, seconds)
    return sum([_rates[i] for i in range(threads)])


def measure_fma(seconds=0.02):
    """FLOP/s of fp32 multiply-adds on registers, on all threads, over `seconds` or a little more."""
    _registers(False, 0.0)  # threads wake, and the clock of wide vectors settles
    return _registers(False, seconds)


def measure_dot(seconds=0.02):
    """FLOP/s of bf16 dot products on registers; those of `measure_fma` where the table has no such instruction,
    since products of bf16 are then made in fp32."""
    _registers(True, 0.0)
    return _registers(True, seconds)


cdef float _span(float *base, Py_ssize_t stride, int reads, int writes, int updates, Py_ssize_t start,
                 Py_ssize_t n) noexcept nogil:
    cdef float *p[ARRAYS]
    cdef int k
    for k in range(reads + writes + updates):
        p[k] = base + k * stride + start
    return isa.kernels.stream_span(p, reads, writes, updates, n)


cdef double _share(int thread, float *base, Py_ssize_t stride, int reads, int writes, int updates, Py_ssize_t n,
                   int passes, double seconds) noexcept nogil:
    """B/s of one thread: its share of the spans, `passes` times between two looks at the clock."""
    cdef Py_ssize_t spans = (n + SPAN - 1) // SPAN
    cdef Py_ssize_t start = spans * thread // isa.threads * SPAN, end = spans * (thread + 1) // isa.threads * SPAN, i
    cdef int k
    cdef double began = _now(), elapsed = 0.0, done = 0.0
    cdef float last = 0.0
    if start == end:
        return 0.0
    while done == 0.0 or elapsed < seconds:
        for k in range(passes):
            for i in range((end - start) // SPAN):
                last = _span(base, stride, reads, writes, updates, start + i * SPAN,
                             min(<Py_ssize_t> SPAN, n - start - i * SPAN))
        done += passes
        elapsed = _now() - began
    _values[thread] = last
    return 4.0 * <double> (min(end, n) - start) * (reads + writes + 2 * updates) * done / elapsed


def _stream(float[::1] memory, Py_ssize_t stride, int reads, int writes, int updates, Py_ssize_t n, int passes,
            double seconds):
    """B/s of all threads at once."""
    cdef int i, threads = isa.threads
    for i in prange(threads, num_threads=isa.threads, schedule="static", chunksize=1, nogil=True):
        _rates[i] = _share(i, &memory[0], stride, reads, writes, updates, n, passes, seconds)
    return sum([_rates[i] for i in range(threads)])


def stream_floats(nbytes):
    """Floats of memory that are enough for any stream of up to `nbytes`."""
    return max(64 * ARRAYS, nbytes // 4) + SKEW * ARRAYS


def measure_stream(float[::1] memory not None, reads, writes, nbytes, seconds=0.02, updates=0):
    """B/s of a stream: `reads` arrays read, `writes` written and `updates` read and written in place, float32, of
    `nbytes` together, on all threads, over `seconds` or a little more, over and over the same arrays.

    The arrays lie in `memory` (float32), which is overwritten; `stream_floats` says how much of it is enough.

    Bytes are counted as a program sees them, an updated array twice.  What a cache fetches before it is written, or
    writes back, is the machine's own affair, of the op that is compared as of the stream.  ValueError for no array, for
    more than 16, or for too little memory.
    """
    arrays = reads + writes + updates
    if min(reads, writes, updates) < 0 or not 1 <= arrays <= ARRAYS:
        raise ValueError(f"reads, writes, updates: {reads}, {writes}, {updates} are not 1 to {ARRAYS} arrays")
    n = max(64, nbytes // 4 // arrays // 64 * 64)  # whole steps of any kernel table's loop
    stride = n + SKEW
    if memory.shape[0] < stride * arrays:
        raise ValueError(f"memory: {memory.shape[0]:,} floats are too few, the stream takes {stride * arrays:,}")
    passes = max(1, (1 << 18) // (n * arrays))  # a megabyte at least between two looks at the clock
    _stream(memory, stride, 0, arrays, 0, n, 1, 0.0)  # finite numbers, in pages that exist
    _stream(memory, stride, reads, writes, updates, n, passes, 0.0)
    return _stream(memory, stride, reads, writes, updates, n, passes, seconds)
