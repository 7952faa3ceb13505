"""Arguments -> typed memoryviews, or a ValueError (TypeError for what is no array) that names the argument."""

import numpy as np


cdef object _array(str name, object a, object dtype, int ndim):
    _is_array(name, a)
    if a.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {np.dtype(dtype)}, got {a.dtype}")
    return _laid_out(name, a, ndim)


cdef int _is_array(str name, object a) except -1:
    if not isinstance(a, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(a).__name__}")
    return 0


cdef object _laid_out(str name, object a, int ndim):
    if ndim and a.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {a.shape}")
    if not a.flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous")
    if not a.flags.writeable:
        raise ValueError(f"{name}: must be writable")
    return a


cdef float[::1] vector(str name, object a):
    return _array(name, a, np.float32, 1)


cdef float[:, ::1] matrix(str name, object a):
    return _array(name, a, np.float32, 2)


cdef float[:, :, ::1] cube(str name, object a):
    return _array(name, a, np.float32, 3)


cdef float[::1] flat(str name, object a):
    """Any shape, seen as one vector."""
    return _array(name, a, np.float32, 0).reshape(-1)


cdef Weights weights(str name, object a, int ndim) except *:
    """An array of float32 or bfloat16; of `ndim` dimensions, or of any number where that is 0."""
    cdef Weights found
    cdef float[::1] wide
    cdef uint16_t[::1] narrow
    _is_array(name, a)
    found.bf16 = a.dtype.name == "bfloat16"
    if not found.bf16 and a.dtype != np.float32:
        raise ValueError(f"{name}: expected dtype float32 or bfloat16, got {a.dtype}")
    _laid_out(name, a, ndim)
    found.size = a.size
    if found.bf16:
        narrow = a.reshape(-1).view(np.uint16)
        found.data = <char *> &narrow[0]
    else:
        wide = a.reshape(-1)
        found.data = <char *> &wide[0]
    return found


cdef int[:, ::1] ids(str name, object a):
    return _array(name, a, np.int32, 2)


cdef int[::1] places(str name, object a, tuple shape):
    """One for each sequence of an array of `shape` (B, ...)."""
    cdef int[::1] found = _array(name, a, np.int32, 1)
    expect(name, a.shape, shape[:1])
    return found


cdef int within(str name, int[::1] places, Py_ssize_t T, Py_ssize_t most, str what) except -1:
    """T tokens from each place on lie in [0, most)."""
    cdef Py_ssize_t b
    for b in range(places.shape[0]):
        if not 0 <= places[b] <= most - T:
            raise ValueError(f"{name}: {T} tokens from {places[b]} at [{b}] exceed the {most} {what}")
    return 0


cdef double *scalars(str name, object a, Py_ssize_t n) except NULL:
    """What lies on the device as n float64 numbers."""
    cdef double[::1] view = _array(name, a, np.float64, 1)
    expect(name, a.shape, (n,))
    return &view[0]


cdef int expect(str name, tuple got, tuple want) except -1:
    if got != want:
        raise ValueError(f"{name}: expected shape {want}, got {got}")
    return 0


cdef int in_range(str name, int[:, ::1] a, Py_ssize_t V) except -1:
    """Every id of `a` lies in [0, V)."""
    cdef Py_ssize_t i, j
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            if not 0 <= a[i, j] < V:
                raise ValueError(f"{name}: id {a[i, j]} at [{i}, {j}] is outside [0, {V})")
    return 0
