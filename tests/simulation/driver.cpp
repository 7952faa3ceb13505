// libcuda.so.1 for machines without a GPU: devices, contexts and errors.  Every function has the prototype
// of cuda.h; what is not simulated returns CUDA_ERROR_NOT_SUPPORTED (the list at the end).
//
//     SIMULATION_DEVICES=1         SIMULATION_CAPABILITY=9.0     SIMULATION_MULTIPROCESSORS=4
//     SIMULATION_DRIVER=13000      SIMULATION_MEMORY=4294967296  (bytes)
//     SIMULATION_FAULT=NAME:CODE[:N],...   the Nth call of a driver function, or launch of a kernel, fails

#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

using namespace simulation;

Device simulation::gpu;
thread_local std::vector<Context *> simulation::current;

namespace {

std::set<Context *> contexts;

struct Error {
    int code;
    const char *name, *text;
};
const Error ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {35, "CUDA_ERROR_INSUFFICIENT_DRIVER", "CUDA driver version is insufficient for CUDA runtime version"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {301, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {401, "CUDA_ERROR_ILLEGAL_STATE", "the operation cannot be performed in the present state"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {902, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "operation would result in a merge of separate capture sequences"},
    {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "capture was not ended in the same stream as it began"},
    {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "capturing stream has unjoined work"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
    {908, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

int devices() { return int(number("SIMULATION_DEVICES", 1)); }

void destroy(Context *context) {
    drain_all();
    forget_modules();
    forget_memory();
    while (!gpu.streams.empty()) {
        delete *gpu.streams.begin();
        gpu.streams.erase(gpu.streams.begin());
    }
    gpu.captures.clear();
    contexts.erase(context);
    if (gpu.primary == context) gpu.primary = nullptr;
    delete context;
}

} // namespace

int simulation::capability() {
    std::string text = setting("SIMULATION_CAPABILITY", "9.0");
    size_t dot = text.find('.');
    return atoi(text.c_str()) * 10 + (dot == std::string::npos ? 0 : atoi(text.c_str() + dot + 1));
}

int simulation::shared_limit() {
    switch (capability()) {
    case 80:
        return 163 << 10;
    case 86:
    case 89:
    case 120:
        return 99 << 10;
    case 90:
    case 100:
    case 103:
        return 227 << 10;
    default:
        return 64 << 10;
    }
}

std::string simulation::setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

long long simulation::number(const char *name, long long otherwise) {
    const char *value = getenv(name);
    return value && *value ? atoll(value) : otherwise;
}

void simulation::note(const std::string &text) { fprintf(stderr, "simulation: %s\n", text.c_str()); }

int simulation::injected(const char *name) {
    const char *setting = getenv("SIMULATION_FAULT");
    if (!setting || !*setting) return SUCCESS;
    std::string all = std::string(",") + setting + ",", wanted = std::string(",") + name + ":";
    size_t at = all.find(wanted);
    if (at == std::string::npos) return SUCCESS;
    char *rest;
    long code = strtol(all.c_str() + at + wanted.size(), &rest, 10);
    long which = *rest == ':' ? strtol(rest + 1, nullptr, 10) : 1;
    return ++gpu.calls[name] == which ? int(code) : SUCCESS;
}

int simulation::faulted(const Fault &fault) {
    if (fault.code && !gpu.fault) {
        gpu.fault = fault.code;
        gpu.message = fault.message;
        note(fault.message);
    }
    return fault.code;
}

int simulation::guarded(std::function<void()> work) {
    return faulted(run([](void *data) { (*static_cast<std::function<void()> *>(data))(); }, &work));
}

simulation::Call::Call(const char *name, Need need) : lock(gpu.lock), status(SUCCESS) {
    if (need != NOTHING && !gpu.initialized)
        status = NOT_INITIALIZED;
    else if (need == CONTEXT && (current.empty() || !contexts.count(current.back())))
        status = INVALID_CONTEXT;
    else if (int code = injected(name))
        status = code;
    else if (need == CONTEXT && gpu.fault)
        status = gpu.fault;
}

// ---- what tests ask for ------------------------------------------------------------------------------

// The message of the fault that is left; null without one.
CU const char *simulation_message() { return gpu.fault ? gpu.message.c_str() : nullptr; }

// A new start after a fault, which no real GPU allows.
CU void simulation_forgive() {
    gpu.fault = SUCCESS;
    gpu.calls.clear();
}

// ---- errors, versions, devices -------------------------------------------------------------------------

CU CUresult cuGetErrorString(CUresult code, const char **text) {
    for (const Error &error : ERRORS)
        if (error.code == code) {
            *text = error.text;
            return SUCCESS;
        }
    *text = nullptr;
    return INVALID_VALUE;
}

CU CUresult cuGetErrorName(CUresult code, const char **text) {
    for (const Error &error : ERRORS)
        if (error.code == code) {
            *text = error.name;
            return SUCCESS;
        }
    *text = nullptr;
    return INVALID_VALUE;
}

CU CUresult cuInit(unsigned flags) {
    ENTER(cuInit, NOTHING);
    if (flags) return INVALID_VALUE;
    if (devices() < 1) return NO_DEVICE;
    gpu.initialized = true;
    return SUCCESS;
}

CU CUresult cuDriverGetVersion(int *version) {
    ENTER(cuDriverGetVersion, NOTHING);
    *version = int(number("SIMULATION_DRIVER", 13000));
    return SUCCESS;
}

CU CUresult cuGetProcAddress_v2(const char *name, void **function, int, unsigned long long, int *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    for (const char *suffix : {"_v2", "_v3", "_v4"})
        if (void *newer = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str())) *function = newer;
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : int(NOT_FOUND);
}

CU CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount, DRIVER);
    *count = devices();
    return SUCCESS;
}

CU CUresult cuDeviceGet(CUdevice *device, int index) {
    ENTER(cuDeviceGet, DRIVER);
    if (index < 0 || index >= devices()) return INVALID_DEVICE;
    *device = index;
    return SUCCESS;
}

CU CUresult cuDeviceGetName(char *name, int bytes, CUdevice) {
    ENTER(cuDeviceGetName, DRIVER);
    snprintf(name, size_t(bytes), "%s", setting("SIMULATION_NAME", "Simulated GPU").c_str());
    return SUCCESS;
}

CU CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice) {
    ENTER(cuDeviceTotalMem, DRIVER);
    *bytes = size_t(number("SIMULATION_MEMORY", 4ll << 30));
    return SUCCESS;
}

CU CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice) {
    ENTER(cuDeviceComputeCapability, DRIVER);
    *major = capability() / 10, *minor = capability() % 10;
    return SUCCESS;
}

CU CUresult cuDeviceGetPCIBusId(char *name, int bytes, CUdevice device) {
    ENTER(cuDeviceGetPCIBusId, DRIVER);
    snprintf(name, size_t(bytes), "0000:%02X:00.0", unsigned(device) & 0xff);
    return SUCCESS;
}

CU CUresult cuDeviceCanAccessPeer(int *can, CUdevice, CUdevice) {
    ENTER(cuDeviceCanAccessPeer, DRIVER);
    *can = 0;
    return SUCCESS;
}

CU CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    ENTER(cuDeviceGetAttribute, DRIVER);
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    switch (attribute) {
    case 1:
    case 2:
    case 3:
        *value = 1024;
        break; // threads of a block, along x, y
    case 4:
        *value = 64;
        break;
    case 5:
        *value = 0x7fffffff;
        break; // blocks of a grid
    case 6:
    case 7:
        *value = 65535;
        break;
    case 8:
        *value = 48 << 10;
        break; // shared memory of a block that does not ask
    case 9:
        *value = 64 << 10;
        break;
    case 10:
        *value = 32;
        break;
    case 12:
    case 82:
        *value = 65536;
        break; // registers of a block, of a multiprocessor
    case 13:
        *value = 1000000;
        break;
    case 14:
        *value = 512;
        break;
    case 15:
    case 18:
    case 19:
    case 31:
    case 35:
    case 41:
    case 90:
        *value = 1;
        break; // unified addresses among them
    case 16:
        *value = int(number("SIMULATION_MULTIPROCESSORS", 4));
        break;
    case 33:
        *value = device + 1;
        break;
    case 36:
        *value = 1000000;
        break; // memory clock, kHz
    case 37:
        *value = 512;
        break; // bus width, bits
    case 38:
        *value = 32 << 20;
        break; // L2
    case 39:
        *value = capability() == 80 || capability() / 10 >= 9 ? 2048 : 1536;
        break;
    case 40:
        *value = 2;
        break;
    case 75:
        *value = capability() / 10;
        break;
    case 76:
        *value = capability() % 10;
        break;
    case 81:
        *value = shared_limit() + 1024;
        break;
    case 97:
        *value = shared_limit();
        break;
    case 106:
        *value = 32;
        break;
    case 111:
        *value = 1024;
        break;
    default:
        *value = 0;
    }
    return SUCCESS;
}

// ---- contexts ----------------------------------------------------------------------------------------

CU CUresult cuDevicePrimaryCtxRetain(void **result, CUdevice device) {
    ENTER(cuDevicePrimaryCtxRetain, DRIVER);
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    if (!gpu.primary) {
        gpu.primary = new Context{device, 0, 0, true};
        contexts.insert(gpu.primary);
    }
    gpu.primary->users++;
    *result = gpu.primary;
    return SUCCESS;
}

CU CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    ENTER(cuDevicePrimaryCtxRelease, DRIVER);
    if (!gpu.primary) return INVALID_CONTEXT;
    if (--gpu.primary->users == 0) destroy(gpu.primary);
    return SUCCESS;
}

CU CUresult cuDevicePrimaryCtxReset_v2(CUdevice) {
    ENTER(cuDevicePrimaryCtxReset, DRIVER);
    if (gpu.primary) destroy(gpu.primary);
    return SUCCESS;
}

CU CUresult cuCtxCreate_v4(void **result, void *, unsigned flags, CUdevice device) {
    ENTER(cuCtxCreate, DRIVER);
    if (device < 0 || device >= devices()) return INVALID_DEVICE;
    auto *context = new Context{device, flags, 1, false};
    contexts.insert(context);
    current.push_back(context);
    *result = context;
    return SUCCESS;
}

CU CUresult cuCtxCreate_v2(void **result, unsigned flags, CUdevice device) {
    return cuCtxCreate_v4(result, nullptr, flags, device);
}

CU CUresult cuCtxDestroy_v2(void *handle) {
    ENTER(cuCtxDestroy, DRIVER);
    auto *context = static_cast<Context *>(handle);
    if (!contexts.count(context)) return INVALID_CONTEXT;
    if (!current.empty() && current.back() == context) current.pop_back();
    destroy(context);
    return SUCCESS;
}

CU CUresult cuCtxDetach(void *handle) { return cuCtxDestroy_v2(handle); }

CU CUresult cuCtxAttach(void **result, unsigned) {
    ENTER(cuCtxAttach, CONTEXT);
    *result = current.back();
    return SUCCESS;
}

CU CUresult cuCtxPushCurrent_v2(void *handle) {
    ENTER(cuCtxPushCurrent, DRIVER);
    if (!contexts.count(static_cast<Context *>(handle))) return INVALID_CONTEXT;
    current.push_back(static_cast<Context *>(handle));
    return SUCCESS;
}

CU CUresult cuCtxPopCurrent_v2(void **result) {
    ENTER(cuCtxPopCurrent, DRIVER);
    if (current.empty()) return INVALID_CONTEXT;
    if (result) *result = current.back();
    current.pop_back();
    return SUCCESS;
}

CU CUresult cuCtxGetCurrent(void **result) {
    ENTER(cuCtxGetCurrent, DRIVER);
    *result = current.empty() ? nullptr : current.back();
    return SUCCESS;
}

CU CUresult cuCtxSetCurrent(void *handle) {
    ENTER(cuCtxSetCurrent, DRIVER);
    if (!current.empty()) current.pop_back();
    if (handle) current.push_back(static_cast<Context *>(handle));
    return SUCCESS;
}

CU CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER(cuCtxGetDevice, DRIVER);
    if (current.empty() || !contexts.count(current.back())) return INVALID_CONTEXT;
    *device = current.back()->device;
    return SUCCESS;
}

CU CUresult cuCtxGetApiVersion(void *, unsigned *version) {
    *version = 13000;
    return SUCCESS;
}

CU CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return SUCCESS;
}

// ---- what is not simulated -----------------------------------------------------------------------------

CU CUresult cuProfilerStart() { return SUCCESS; }
CU CUresult cuProfilerStop() { return SUCCESS; }

#define MISSING(name)                                                                                                  \
    CU CUresult name() { return NOT_SUPPORTED; }
// clang-format off
MISSING(cuArray3DCreate_v2) MISSING(cuArray3DGetDescriptor_v2) MISSING(cuArrayCreate_v2) MISSING(cuArrayDestroy)
MISSING(cuArrayGetDescriptor_v2) MISSING(cuCtxDisablePeerAccess) MISSING(cuCtxEnablePeerAccess)
MISSING(cuCtxGetCacheConfig) MISSING(cuCtxGetLimit) MISSING(cuCtxGetSharedMemConfig) MISSING(cuCtxSetCacheConfig)
MISSING(cuCtxSetLimit) MISSING(cuCtxSetSharedMemConfig) MISSING(cuDeviceGetByPCIBusId) MISSING(cuFuncSetSharedSize)
MISSING(cuIpcCloseMemHandle) MISSING(cuIpcGetEventHandle) MISSING(cuIpcGetMemHandle) MISSING(cuIpcOpenEventHandle)
MISSING(cuIpcOpenMemHandle_v2) MISSING(cuLaunch) MISSING(cuLaunchGrid) MISSING(cuLaunchGridAsync)
MISSING(cuLinkAddData_v2) MISSING(cuLinkAddFile_v2) MISSING(cuLinkComplete) MISSING(cuLinkCreate_v2)
MISSING(cuLinkDestroy) MISSING(cuMemAllocManaged) MISSING(cuMemAllocPitch_v2) MISSING(cuMemcpy2DAsync_v2)
MISSING(cuMemcpy2DUnaligned_v2) MISSING(cuMemcpy2D_v2) MISSING(cuMemcpy3DAsync_v2) MISSING(cuMemcpy3DPeer)
MISSING(cuMemcpy3DPeerAsync) MISSING(cuMemcpy3D_v2) MISSING(cuMemcpyAtoA_v2) MISSING(cuMemcpyAtoD_v2)
MISSING(cuMemcpyAtoH_v2) MISSING(cuMemcpyDtoA_v2) MISSING(cuMemcpyHtoA_v2) MISSING(cuMemcpyPeer)
MISSING(cuMemcpyPeerAsync) MISSING(cuMemsetD2D16Async) MISSING(cuMemsetD2D16_v2) MISSING(cuMemsetD2D32Async)
MISSING(cuMemsetD2D32_v2) MISSING(cuMemsetD2D8Async) MISSING(cuMemsetD2D8_v2) MISSING(cuModuleGetSurfRef)
MISSING(cuModuleGetTexRef) MISSING(cuParamSetSize) MISSING(cuParamSetTexRef) MISSING(cuParamSetf)
MISSING(cuParamSeti) MISSING(cuParamSetv) MISSING(cuProfilerInitialize) MISSING(cuStreamAttachMemAsync)
MISSING(cuSurfRefGetArray) MISSING(cuSurfRefSetArray) MISSING(cuTexRefCreate) MISSING(cuTexRefDestroy)
MISSING(cuTexRefGetAddressMode) MISSING(cuTexRefGetAddress_v2) MISSING(cuTexRefGetArray)
MISSING(cuTexRefGetFilterMode) MISSING(cuTexRefGetFlags) MISSING(cuTexRefGetFormat) MISSING(cuTexRefSetAddress2D_v3)
MISSING(cuTexRefSetAddressMode) MISSING(cuTexRefSetAddress_v2) MISSING(cuTexRefSetArray)
MISSING(cuTexRefSetFilterMode) MISSING(cuTexRefSetFlags) MISSING(cuTexRefSetFormat)
    // clang-format on
