// What compiled kernels and the driver share: one fibre per CUDA thread, run by fibres.cpp inside libcuda.so.1.
// Plain C interfaces: a kernel's object is loaded with dlopen and finds them there.
#pragma once

#include <cstddef>
#include <cstdint>

#define SIMULATION_API extern "C" __attribute__((visibility("default")))

struct uint3 {
    unsigned x, y, z;
};

namespace simulation {

// A kernel as its object exports it, in the array `simulation_kernels`, which ends with an entry without a name.
struct Kernel {
    const char *name;
    void (*call)(const void *arguments); // one thread: takes the arguments apart and calls the kernel
    const unsigned *offsets, *sizes;     // of its arguments in the buffer
    unsigned count;
    unsigned bytes;       // of all arguments
    unsigned max_threads; // __launch_bounds__, 0 without
};

// Where the object's __shared__ variables are, filled with a NaN pattern before every block.
struct Range {
    char *begin, *end;
};

struct Launch {
    uint3 block, block_dim, grid_dim;
    char *dynamic; // shared memory, `extern __shared__`
    size_t dynamic_bytes;
};

enum Vote { PLAIN, OR, AND, COUNT };

} // namespace simulation

// The running thread's index, and the launch's shape.
SIMULATION_API uint3 simulation_thread;
SIMULATION_API simulation::Launch simulation_launch;

// A barrier of the block.  `count` 0: every thread takes part; else that many threads of the barrier numbered `id`.
SIMULATION_API int simulation_barrier(int id, unsigned count, int vote, int predicate, const char *name,
                                      const char *file, int line);

// The lanes in `mask` meet; the last to come runs `run` once on the operands of all (null for lanes not in mask).
// All must come from the same line with the same mask and function.
SIMULATION_API void simulation_collective(unsigned mask, void *operand, void (*run)(void **operands, unsigned mask),
                                          const char *name, const char *file, int line);

// cp.async: the destination holds a NaN pattern until the thread waits for the copy's group; `bytes` of which `given`
// are copied and the rest zeroed.
SIMULATION_API void simulation_copy_async(void *to, const void *from, unsigned bytes, unsigned given);
SIMULATION_API void simulation_copy_commit();
SIMULATION_API void simulation_copy_wait(unsigned groups); // until at most `groups` of the latest are under way

SIMULATION_API unsigned simulation_lane();
SIMULATION_API unsigned simulation_active(); // lanes of the warp that have not returned

// Ends the launch with an error that names kernel, block and thread.
SIMULATION_API void simulation_fail(const char *what, const char *file, int line) __attribute__((noreturn));
