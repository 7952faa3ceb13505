// The kernels of flash.cuh with soft-caps; tiles as in attention.py.

#define SOFTCAP true
#include "flash.cuh"

FORWARD(flash_softcap_forward, 16, 128, 64)
FORWARD(flash_softcap_forward, 32, 128, 64)
FORWARD(flash_softcap_forward, 64, 128, 64)
FORWARD(flash_softcap_forward, 128, 64, 32)
FORWARD(flash_softcap_forward, 256, 64, 32)

BACKWARD_QUERIES(flash_softcap_backward_queries, 16, 128, 32)
BACKWARD_QUERIES(flash_softcap_backward_queries, 32, 128, 32)
BACKWARD_QUERIES(flash_softcap_backward_queries, 64, 128, 32)
BACKWARD_QUERIES(flash_softcap_backward_queries, 128, 64, 32)
BACKWARD_QUERIES(flash_softcap_backward_queries, 256, 64, 16)

BACKWARD_KEYS(flash_softcap_backward_keys, 16, 128, 32, true, false)
BACKWARD_KEYS(flash_softcap_backward_values, 16, 128, 32, false, true)
BACKWARD_KEYS(flash_softcap_backward_keys, 32, 128, 32, true, false)
BACKWARD_KEYS(flash_softcap_backward_values, 32, 128, 32, false, true)
BACKWARD_KEYS(flash_softcap_backward_keys, 64, 128, 32, true, false)
BACKWARD_KEYS(flash_softcap_backward_values, 64, 128, 32, false, true)
BACKWARD_KEYS(flash_softcap_backward_keys, 128, 64, 32, true, false)
BACKWARD_KEYS(flash_softcap_backward_values, 128, 64, 32, false, true)
BACKWARD_KEYS(flash_softcap_backward_keys, 256, 64, 16, true, false)
BACKWARD_KEYS(flash_softcap_backward_values, 256, 64, 16, false, true)
