cdef enum:
    NORM_CHUNKS = 64  # at most this many partial sums of a layernorm's dw and db
