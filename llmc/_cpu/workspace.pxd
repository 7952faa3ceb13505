cdef enum:
    SCORES = 128 * 64   # floats of one attention block: 128 queries by 64 keys

cdef float *thread_scratch(int thread) noexcept nogil
cdef float *shared(Py_ssize_t nbytes) except NULL
