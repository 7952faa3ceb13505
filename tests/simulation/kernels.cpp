// Modules, functions and launches of the simulated GPU.  A module's image is a shared object that nvrtc.cpp has made.

#include "device.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>
#include <unistd.h>

using namespace simulation;

struct Module;

struct Function {
    Module *module;
    const Kernel *kernel;
    int dynamic_limit = 48 << 10;
};

struct Module {
    void *library;
    const Kernel *kernels;
    Range statics;
    std::map<std::string, Function> functions;
    std::string path; // of the file that is still needed, for a sanitizer's reports
};

namespace {

std::set<Module *> modules;
std::set<Function *> functions;

// The size of an ELF file in memory, 0 for anything else.
size_t image_size(const void *image) {
    const char *begin = static_cast<const char *>(image);
    if (memcmp(begin, "\177ELF\2", 5)) return 0;
    uint64_t sections;
    uint16_t size, count;
    memcpy(&sections, begin + 40, 8);
    memcpy(&size, begin + 58, 2);
    memcpy(&count, begin + 60, 2);
    return sections + size_t(size) * count;
}

int load(void **result, const void *image) {
    size_t size = image_size(image);
    if (!size) return INVALID_IMAGE;
    std::string path = setting("SIMULATION_CACHE", "/tmp") + "/module-XXXXXX";
    int file = mkstemp(path.data());
    if (file < 0 || write(file, image, size) != ssize_t(size)) {
        note("cannot write in " + path);
        return INVALID_IMAGE;
    }
    close(file);
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    bool keep = setting("SIMULATION_SANITIZE", "0") == "1";
    if (!keep) unlink(path.c_str());
    auto *kernels = library ? static_cast<const Kernel *>(dlsym(library, "simulation_kernels")) : nullptr;
    auto *statics = library ? static_cast<const Range *>(dlsym(library, "simulation_statics")) : nullptr;
    auto *made_for = library ? static_cast<const int *>(dlsym(library, "simulation_architecture")) : nullptr;
    if (!kernels || !statics || !made_for) {
        note(library ? "an image without kernels" : dlerror());
        return INVALID_IMAGE;
    }
    if (*made_for / 10 != capability() / 10 || *made_for > capability()) {
        dlclose(library);
        return NO_BINARY_FOR_GPU;
    }
    auto *module = new Module{library, kernels, *statics, {}, keep ? path : ""};
    for (const Kernel *kernel = kernels; kernel->name; kernel++) {
        Function &function = module->functions[kernel->name];
        function.module = module, function.kernel = kernel;
        functions.insert(&function);
    }
    modules.insert(module);
    *result = module;
    return SUCCESS;
}

void unload(Module *module) {
    for (auto &[name, function] : module->functions) functions.erase(&function);
    modules.erase(module);
    dlclose(module->library);
    if (!module->path.empty()) unlink(module->path.c_str());
    delete module;
}

Function *function_of(void *handle) {
    auto *function = static_cast<Function *>(handle);
    return functions.count(function) ? function : nullptr;
}

size_t statics(const Function &function) {
    return size_t(function.module->statics.end - function.module->statics.begin);
}

} // namespace

void simulation::forget_modules() {
    while (!modules.empty()) unload(*modules.begin());
}

// ---- modules and functions ---------------------------------------------------------------------------

CU CUresult cuModuleLoadData(void **result, const void *image) {
    ENTER(cuModuleLoadData, CONTEXT);
    if (int status = illegal_now()) return status;
    return load(result, image);
}

CU CUresult cuModuleLoadDataEx(void **result, const void *image, unsigned count, int *options, void **values) {
    ENTER(cuModuleLoadData, CONTEXT);
    if (int status = illegal_now()) return status;
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 4 || options[i] == 6) // how much of the log buffers is filled
            values[i] = nullptr;
    return load(result, image);
}

CU CUresult cuModuleLoad(void **result, const char *path) {
    ENTER(cuModuleLoad, CONTEXT);
    if (int status = illegal_now()) return status;
    FILE *file = fopen(path, "rb");
    if (!file) return FILE_NOT_FOUND;
    std::vector<char> image(64);
    size_t got;
    size_t size = 0;
    while (image.resize(size + (1 << 16)), (got = fread(image.data() + size, 1, 1 << 16, file)) > 0) size += got;
    fclose(file);
    return load(result, image.data());
}

CU CUresult cuModuleUnload(void *handle) {
    ENTER(cuModuleUnload, CONTEXT);
    auto *module = static_cast<Module *>(handle);
    if (!modules.count(module)) return INVALID_HANDLE;
    drain_all();
    unload(module);
    return SUCCESS;
}

CU CUresult cuModuleGetFunction(void **result, void *handle, const char *name) {
    ENTER(cuModuleGetFunction, CONTEXT);
    auto *module = static_cast<Module *>(handle);
    if (!modules.count(module)) return INVALID_HANDLE;
    auto found = module->functions.find(name);
    if (found == module->functions.end()) return NOT_FOUND;
    *result = &found->second;
    return SUCCESS;
}

CU CUresult cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *bytes, void *handle, const char *name) {
    ENTER(cuModuleGetGlobal, CONTEXT);
    auto *module = static_cast<Module *>(handle);
    if (!modules.count(module)) return INVALID_HANDLE;
    void *symbol = dlsym(module->library, name);
    if (!symbol) return NOT_FOUND;
    *address = uintptr_t(symbol);
    if (bytes) { // dladdr1 knows the size of symbols
        Dl_info info;
        const struct {
            unsigned name;
            unsigned char about[4];
            uint64_t value, size;
        } *entry = nullptr;
        dladdr1(symbol, &info, reinterpret_cast<void **>(const_cast<void *>(static_cast<const void *>(&entry))), 1);
        *bytes = entry ? entry->size : 0;
    }
    return SUCCESS;
}

CU CUresult cuFuncGetAttribute(int *value, int attribute, void *handle) {
    ENTER(cuFuncGetAttribute, CONTEXT);
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    switch (attribute) {
    case 0:
        *value = function->kernel->max_threads ? int(function->kernel->max_threads) : 1024;
        break;
    case 1:
        *value = int(statics(*function));
        break; // of the file: the most it can be
    case 4:
        *value = 32;
        break;
    case 5:
    case 6:
        *value = capability();
        break;
    case 8:
        *value = function->dynamic_limit;
        break;
    default:
        *value = 0;
    }
    return SUCCESS;
}

CU CUresult cuFuncSetAttribute(void *handle, int attribute, int value) {
    ENTER(cuFuncSetAttribute, CONTEXT);
    Function *function = function_of(handle);
    if (!function) return INVALID_HANDLE;
    if (attribute == 8) {
        if (value < 0 || value > shared_limit()) return INVALID_VALUE;
        function->dynamic_limit = value;
    }
    return SUCCESS;
}

// Of launches as they were before CUDA 4, whose place cuLaunchKernel has taken; PyCUDA still says it.
CU CUresult cuFuncSetBlockShape(void *handle, int x, int y, int z) {
    ENTER(cuFuncSetBlockShape, CONTEXT);
    return !function_of(handle) ? int(INVALID_HANDLE) : x < 1 || y < 1 || z < 1 ? int(INVALID_VALUE) : SUCCESS;
}

CU CUresult cuFuncSetCacheConfig(void *handle, int) {
    ENTER(cuFuncSetCacheConfig, CONTEXT);
    return function_of(handle) ? SUCCESS : int(INVALID_HANDLE);
}

// ---- launches ----------------------------------------------------------------------------------------

CU CUresult cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                           unsigned block_y, unsigned block_z, unsigned dynamic, void *stream_handle, void **parameters,
                           void **extra) {
    ENTER(cuLaunchKernel, CONTEXT);
    Function *function = function_of(handle);
    Stream *stream = stream_of(stream_handle);
    if (!function || !stream) return INVALID_HANDLE;
    const Kernel &kernel = *function->kernel;
    uint64_t threads = uint64_t(block_x) * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || !threads || grid_x > 0x7fffffff || grid_y > 65535 || grid_z > 65535 ||
        block_x > 1024 || block_y > 1024 || block_z > 64 || threads > 1024)
        return INVALID_VALUE;
    if (dynamic > unsigned(function->dynamic_limit)) {
        note(std::string(kernel.name) + ": " + std::to_string(dynamic) + " bytes of dynamic shared memory, of " +
             std::to_string(function->dynamic_limit));
        return INVALID_VALUE;
    }
    if (kernel.max_threads && threads > kernel.max_threads) {
        note(std::string(kernel.name) + ": " + std::to_string(threads) + " threads, bounded to " +
             std::to_string(kernel.max_threads));
        return LAUNCH_OUT_OF_RESOURCES;
    }
    // As doubles, so that it is as aligned as any argument.
    std::vector<double> buffer(kernel.bytes / sizeof(double) + 1);
    char *arguments = reinterpret_cast<char *>(buffer.data());
    if (parameters && extra) return INVALID_VALUE;
    if (parameters) {
        for (unsigned i = 0; i < kernel.count; i++)
            memcpy(arguments + kernel.offsets[i], parameters[i], kernel.sizes[i]);
    } else if (kernel.count) {
        const void *packed = nullptr;
        size_t bytes = 0;
        for (void **p = extra; p && *p; p += 2) {
            if (*p == reinterpret_cast<void *>(1))
                packed = p[1];
            else if (*p == reinterpret_cast<void *>(2))
                bytes = *static_cast<size_t *>(p[1]);
        }
        if (!packed || bytes != kernel.bytes) {
            note(std::string(kernel.name) + " takes " + std::to_string(kernel.bytes) + " bytes of arguments, not " +
                 std::to_string(bytes));
            return INVALID_VALUE;
        }
        memcpy(arguments, packed, bytes);
    }
    uint3 grid{grid_x, grid_y, grid_z}, block{block_x, block_y, block_z};
    return submit(stream, [=] {
        if (!functions.count(function)) return int(INVALID_HANDLE);
        if (int code = injected(function->kernel->name)) {
            Fault fault;
            fault.code = code;
            fault.message = std::string(function->kernel->name) + ": fault by SIMULATION_FAULT";
            return faulted(fault);
        }
        return faulted(run(*function->kernel, function->module->statics, grid, block, dynamic, buffer.data()));
    });
}

CU CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *handle, int threads, size_t) {
    ENTER(cuOccupancyMaxActiveBlocksPerMultiprocessor, CONTEXT);
    if (!function_of(handle) || threads < 1) return INVALID_VALUE;
    *blocks = std::max(1, std::min(2048 / threads, 32));
    return SUCCESS;
}
