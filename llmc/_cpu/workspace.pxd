cdef enum:
    QUERIES = 256  # rows and columns of one block of attention scores
    KEYS = 128
    SCORES = QUERIES * KEYS

cdef float *thread_scratch(int thread) noexcept nogil
cdef float *shared(Py_ssize_t nbytes) except NULL
