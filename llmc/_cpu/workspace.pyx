"""All the memory that the ops use beside their arguments.

Each thread has scratch of its own (packed panels, attention blocks), sized when the kernel table and the number of
threads are chosen; one shared buffer, sized by `reserve`, holds what threads build together: a chunk of logits,
partial sums.
"""

import math
import mmap

import ml_dtypes  # noqa: F401 - makes NumPy know the name "bfloat16"
import numpy as np

from llmc._cpu cimport isa
from llmc._cpu.head cimport HEAD_CHUNK
from llmc._cpu.norm cimport NORM_CHUNKS
from llmc._cpu.optimizer cimport SUM_CHUNK

HUGE_PAGE = 2 << 20

cdef object _scratch_owner = None
cdef char *_scratch = NULL
cdef Py_ssize_t _stride = 0
cdef object _shared_owner = None
cdef char *_shared = NULL
cdef Py_ssize_t _shared_nbytes = 0


def empty(shape, dtype):
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, max(1, nbytes))
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot allocate {nbytes:,} bytes: {error}") from None
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages: the memory is as good, only slower to touch first
    return np.ndarray(shape, dtype, buffer=memory)


def resize_scratch(name, threads):
    """Give every thread scratch for the kernel table `name`; before that table and number become active."""
    global _scratch_owner, _scratch, _stride
    cdef unsigned char[::1] view
    floats = isa.gemm_scratch(name) + 2 * SCORES
    _stride = -(-floats * 4 // 4096) * 4096  # pages of their own: no two threads share a line
    if _scratch_owner is not None and _scratch_owner.nbytes == _stride * threads:
        return
    _scratch_owner = empty((_stride * threads,), np.uint8)
    view = _scratch_owner
    _scratch = <char *> &view[0]


def memory():
    """None: arrays lie in the machine's own memory."""
    return None


def _shared_size(channels, vocab_size, parameters):
    return max(
        HEAD_CHUNK * vocab_size * 4,
        NORM_CHUNKS * 2 * channels * 4,
        -(-parameters // SUM_CHUNK) * 8,
    )


def workspace_nbytes(channels, vocab_size, parameters, tokens, heads, head_size):
    return {"shared": _shared_size(channels, vocab_size, parameters), "threads": _scratch_owner.nbytes}


def reserve(channels, vocab_size, parameters, tokens, heads, head_size):
    global _shared_owner, _shared, _shared_nbytes
    cdef unsigned char[::1] view
    nbytes = _shared_size(channels, vocab_size, parameters)
    if nbytes <= _shared_nbytes:
        return
    _shared_owner = empty((nbytes,), np.uint8)
    view = _shared_owner
    _shared = <char *> &view[0]
    _shared_nbytes = nbytes


cdef float *thread_scratch(int thread) noexcept nogil:
    return <float *> (_scratch + thread * _stride)


cdef float *shared(Py_ssize_t nbytes) except NULL:
    if nbytes > _shared_nbytes:
        raise RuntimeError(f"workspace of {_shared_nbytes:,} bytes is too small for {nbytes:,}: call reserve() first")
    if _shared == NULL:
        reserve(1, 1, 1, 1, 1, 1)
    return <float *> _shared
