cdef enum:
    SUM_CHUNK = 65536  # elements of one partial sum of a norm
