// The simulated GPU's state, and what its four parts share: driver.cpp (devices, contexts, errors), kernels.cpp
// (modules, launches), memory.cpp (allocations, copies) and streams.cpp (streams, events, capture, graphs).
//
// Work runs when it is submitted; with SIMULATION_STREAMS=lazy it runs when somebody waits for it, as late as CUDA
// allows, so that a missing wait shows.  A fault stays: all calls that need the context return it from then on.
#pragma once

#include "run.h"

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

using CUresult = int;
using CUdeviceptr = unsigned long long;
using CUdevice = int;

#define CU SIMULATION_API

namespace simulation {

// CUresult, as far as it occurs here.
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    LAUNCH_OUT_OF_RESOURCES = 701,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908
};

using Work = std::function<int()>; // gives a CUresult

struct Stream;

struct Capture {
    int mode;
    Stream *origin;
    std::thread::id thread;
    int broken = SUCCESS; // what broke it
    std::vector<Work> nodes;
    std::map<Stream *, bool> joined; // of the streams in it: whether the origin has waited for all they got
};

struct Stream {
    bool blocking; // waits for the default stream, and it for this
    std::deque<Work> queue;
    uint64_t submitted = 0, done = 0;
    std::shared_ptr<Capture> capture;
};

struct Context {
    CUdevice device = 0;
    unsigned flags = 0;
    int users = 1;
    bool primary = false;
};

struct Device {
    std::recursive_mutex lock;
    bool initialized = false;
    int fault = SUCCESS; // stays
    std::string message; // of the fault
    Context *primary = nullptr;
    Stream standard{true, {}, 0, 0, nullptr}; // the default stream
    std::set<Stream *> streams;
    std::set<Capture *> captures;     // under way
    std::map<std::string, int> calls; // counted, for SIMULATION_FAULT
};

extern Device gpu;
extern thread_local std::vector<Context *> current; // contexts of this thread, the last on top

std::string setting(const char *name, const char *otherwise);
long long number(const char *name, long long otherwise);
void note(const std::string &text);     // a line on stderr
int injected(const char *name);         // the error that SIMULATION_FAULT has for this call of `name`
int illegal_now(bool implicit = false); // for calls that a capture forbids; breaks the capture
Stream *stream_of(void *handle);        // null for no stream
int submit(Stream *stream, Work work);  // in the stream's order, or into the graph being captured
int drain(Stream *stream);              // run what is queued
int drain_all();
int guarded(std::function<void()> work); // work of the device, whose faults are the device's
int faulted(const Fault &fault);         // notes it; gives its code
void forget_memory();
void forget_modules();
int capability();   // 90 for 9.0
int shared_limit(); // of a block that asks for it
bool pinned(const void *host, size_t bytes);

// A call: holds the lock; `status` is what it must return at once, if not SUCCESS.
struct Call {
    enum Need { NOTHING, DRIVER, CONTEXT };
    std::unique_lock<std::recursive_mutex> lock;
    int status;
    Call(const char *name, Need need);
};

} // namespace simulation

#define ENTER(name, need)                                                                                              \
    simulation::Call call(#name, simulation::Call::need);                                                              \
    if (call.status) return call.status
