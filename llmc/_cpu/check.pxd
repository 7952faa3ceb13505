from libc.stdint cimport uint16_t

ctypedef struct Weights:  # of a matrix that may be bfloat16
    char *data
    bint bf16
    Py_ssize_t size

cdef Weights weights(str name, object a, int ndim) except *
cdef float[::1] vector(str name, object a)
cdef float[:, ::1] matrix(str name, object a)
cdef float[:, :, ::1] cube(str name, object a)
cdef float[::1] flat(str name, object a)
cdef int[:, ::1] ids(str name, object a)
cdef int[::1] places(str name, object a, tuple shape)
cdef int within(str name, int[::1] places, Py_ssize_t T, Py_ssize_t most, str what) except -1
cdef double *scalars(str name, object a, Py_ssize_t n) except NULL
cdef int expect(str name, tuple got, tuple want) except -1
cdef int in_range(str name, int[:, ::1] a, Py_ssize_t V) except -1
