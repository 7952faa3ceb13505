// What the driver asks of fibres.cpp.
#pragma once

#include "fibres.h"

#include <string>

namespace simulation {

// As CUresult has them.
enum { ILLEGAL_ADDRESS = 700, LAUNCH_TIMEOUT = 702, MISALIGNED_ADDRESS = 716, LAUNCH_FAILED = 719 };

struct Fault {
    int code = 0; // 0: none
    std::string message;
};

// Runs a kernel over a grid, or one function of a library, until it is done or does what a GPU would not survive.
Fault run(const Kernel &kernel, Range statics, uint3 grid, uint3 block, size_t dynamic_bytes, const void *buffer);
Fault run(void (*function)(void *), void *data);

} // namespace simulation
