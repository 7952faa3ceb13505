cdef enum:
    HEAD_CHUNK = 256  # tokens whose logits exist at one time
