"""Random numbers from counters: a number is known by its seed, its stream and its place, in whatever order they are made."""

import math

from cython.parallel cimport prange
from libc.stdint cimport uint64_t

from llmc._cpu cimport check, isa

cdef enum:
    GROUPS = 256  # of RANDOM_GROUP elements, that a thread makes at a time: 64 KiB


def normal(out, seed, stream, std):
    cdef float[::1] out_ = check.flat("out", out)
    cdef Py_ssize_t n = out_.shape[0], span = GROUPS * isa.RANDOM_GROUP, i
    for name, value in (("seed", seed), ("stream", stream)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}: must be from 0 to 2^64 - 1, got {value}")
    if not 0 <= std < math.inf:
        raise ValueError(f"std: must be a number of at least 0, got {std}")
    cdef uint64_t seed_ = seed, stream_ = stream
    cdef float std_ = std
    for i in prange(0, n, span, num_threads=isa.threads, schedule="static", nogil=True):
        isa.kernels.normal_span(&out_[i], min(span, n - i), seed_, stream_, i // isa.RANDOM_GROUP, std_)
