// The kernels of flash.cuh without soft-caps; tiles as in attention.py.

#define SOFTCAP false
#include "flash.cuh"

FORWARD(flash_forward, 16, 128, 64)
FORWARD(flash_forward, 32, 128, 64)
FORWARD(flash_forward, 64, 128, 64)
FORWARD(flash_forward, 128, 128, 32)
FORWARD(flash_forward, 256, 64, 32)

BACKWARD_QUERIES(flash_backward_queries, 16, 128, 32)
BACKWARD_QUERIES(flash_backward_queries, 32, 128, 32)
BACKWARD_QUERIES(flash_backward_queries, 64, 128, 32)
BACKWARD_QUERIES(flash_backward_queries, 128, 64, 32)
BACKWARD_QUERIES(flash_backward_queries, 256, 64, 16)

BACKWARD_KEYS(flash_backward_keys_values, 16, 128, 32, true, true)
BACKWARD_KEYS(flash_backward_keys_values, 32, 128, 32, true, true)
BACKWARD_KEYS(flash_backward_keys_values, 64, 128, 32, true, true)
BACKWARD_KEYS(flash_backward_keys_values, 128, 64, 32, true, true)
BACKWARD_KEYS(flash_backward_keys, 256, 64, 16, true, false)
BACKWARD_KEYS(flash_backward_values, 256, 64, 16, false, true)
