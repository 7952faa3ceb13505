// Memory of the simulated GPU: host memory between two pages that may not be touched.
//
// An allocation ends where the forbidden page begins, up to the 16 bytes that loads must be aligned to, or, with
// SIMULATION_PLACE=start, starts where one ends.  It is filled with a NaN pattern; what is left over is checked when it
// is freed, and freed memory stays forbidden for a while.

#include "device.h"

#include <cstring>
#include <sys/mman.h>

using namespace simulation;

namespace {

constexpr size_t PAGE = 4096, ALIGNMENT = 16, QUARANTINE = 256;
constexpr int FILL = 0xff;

struct Allocation {
    char *map;
    size_t mapped, bytes;
    enum { DEVICE, PINNED, REGISTERED } kind;
};

std::map<uintptr_t, Allocation> allocations;
std::deque<std::pair<char *, size_t>> freed;
size_t used = 0;

size_t total() { return size_t(number("SIMULATION_MEMORY", 4ll << 30)); }

int allocate(size_t bytes, bool device, uintptr_t *result) {
    if (!bytes) return INVALID_VALUE;
    if (device && bytes > total() - std::min(used, total())) return OUT_OF_MEMORY;
    size_t body = (bytes + PAGE - 1) / PAGE * PAGE, mapped = body + 2 * PAGE;
    char *map =
        static_cast<char *>(mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map == MAP_FAILED || mprotect(map + PAGE, body, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    memset(map + PAGE, FILL, body);
    size_t slack = setting("SIMULATION_PLACE", "end") == "start" ? 0 : (body - bytes) / ALIGNMENT * ALIGNMENT;
    *result = uintptr_t(map + PAGE + slack);
    allocations[*result] = {map, mapped, bytes, device ? Allocation::DEVICE : Allocation::PINNED};
    if (device) used += bytes;
    return SUCCESS;
}

int release(uintptr_t address, bool device) {
    auto found = allocations.find(address);
    if (found == allocations.end() || (found->second.kind == Allocation::DEVICE) != device ||
        found->second.kind == Allocation::REGISTERED)
        return INVALID_VALUE;
    Allocation a = found->second;
    const unsigned char *begin = reinterpret_cast<unsigned char *>(a.map + PAGE);
    const unsigned char *end = begin + a.mapped - 2 * PAGE, *data = reinterpret_cast<unsigned char *>(address);
    int status = SUCCESS;
    for (const unsigned char *p = begin; p < end && status == SUCCESS; p++) {
        if (p == data) p += a.bytes;
        if (p < end && *p != FILL) {
            Fault fault;
            fault.code = ILLEGAL_ADDRESS;
            fault.message = "somebody has written " + std::to_string(p < data ? data - p : p - data - a.bytes + 1) +
                            " bytes " + (p < data ? "before" : "past the end of") + " an allocation of " +
                            std::to_string(a.bytes) + " bytes";
            status = faulted(fault);
        }
    }
    mprotect(a.map, a.mapped, PROT_NONE);
    madvise(a.map, a.mapped, MADV_DONTNEED);
    freed.emplace_back(a.map, a.mapped);
    if (freed.size() > QUARANTINE) {
        munmap(freed.front().first, freed.front().second);
        freed.pop_front();
    }
    if (device) used -= a.bytes;
    allocations.erase(found);
    return status;
}

const Allocation *find(uintptr_t address, uintptr_t *begin = nullptr) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return nullptr;
    --next;
    if (address >= next->first + std::max<size_t>(next->second.bytes, 1)) return nullptr;
    if (begin) *begin = next->first;
    return &next->second;
}

// Whether a copy may touch this range: not when it leaves the allocation it begins in.
bool within(uintptr_t address, size_t bytes) {
    uintptr_t begin;
    const Allocation *allocation = find(address, &begin);
    return !allocation || address + bytes <= begin + allocation->bytes;
}

int copy(void *to, const void *from, size_t bytes) {
    return guarded([=] { memmove(to, from, bytes); });
}

int synchronous(void *to, const void *from, size_t bytes) {
    if (int status = illegal_now(true)) return status;
    if (!within(uintptr_t(to), bytes) || !within(uintptr_t(from), bytes)) return INVALID_VALUE;
    // It waits for the default stream, and that for blocking ones; others go on.
    for (Stream *stream : gpu.streams)
        if (stream->blocking) drain(stream);
    return copy(to, from, bytes);
}

template <class T> int fill(CUdeviceptr to, T value, size_t count, Stream *stream) {
    if (!stream) return INVALID_HANDLE;
    if (to % sizeof(T) || !within(to, count * sizeof(T))) return INVALID_VALUE;
    return submit(stream, [=] { return guarded([=] { std::fill_n(reinterpret_cast<T *>(to), count, value); }); });
}

// The default stream's: done when it returns, as far as anybody can tell.
template <class T> int fill_now(CUdeviceptr to, T value, size_t count) {
    if (int status = illegal_now(true)) return status;
    int status = fill(to, value, count, &gpu.standard);
    return status ? status : gpu.fault;
}

} // namespace

bool simulation::pinned(const void *host, size_t bytes) {
    uintptr_t begin;
    const Allocation *allocation = find(uintptr_t(host), &begin);
    return allocation && allocation->kind != Allocation::DEVICE && uintptr_t(host) + bytes <= begin + allocation->bytes;
}

void simulation::forget_memory() {
    while (!allocations.empty()) {
        auto [address, allocation] = *allocations.begin();
        if (allocation.kind == Allocation::REGISTERED)
            allocations.erase(address);
        else
            release(address, allocation.kind == Allocation::DEVICE);
    }
}

// ---- allocations -------------------------------------------------------------------------------------

CU CUresult cuMemAlloc_v2(CUdeviceptr *result, size_t bytes) {
    ENTER(cuMemAlloc, CONTEXT);
    if (int status = illegal_now()) return status;
    uintptr_t address = 0;
    int status = allocate(bytes, true, &address);
    *result = address;
    return status;
}

CU CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(cuMemFree, CONTEXT);
    if (int status = illegal_now()) return status;
    if (!address) return SUCCESS;
    drain_all();
    return release(address, true);
}

CU CUresult cuMemGetInfo_v2(size_t *available, size_t *all) {
    ENTER(cuMemGetInfo, CONTEXT);
    *all = total();
    *available = total() - std::min(used, total());
    return SUCCESS;
}

CU CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr address) {
    ENTER(cuMemGetAddressRange, CONTEXT);
    uintptr_t begin;
    const Allocation *allocation = find(address, &begin);
    if (!allocation || allocation->kind != Allocation::DEVICE) return NOT_FOUND;
    if (base) *base = begin;
    if (bytes) *bytes = allocation->bytes;
    return SUCCESS;
}

CU CUresult cuMemHostAlloc(void **result, size_t bytes, unsigned) {
    ENTER(cuMemHostAlloc, CONTEXT);
    if (int status = illegal_now()) return status;
    uintptr_t address = 0;
    int status = allocate(bytes, false, &address);
    *result = reinterpret_cast<void *>(address);
    return status;
}

CU CUresult cuMemAllocHost_v2(void **result, size_t bytes) { return cuMemHostAlloc(result, bytes, 0); }

CU CUresult cuMemFreeHost(void *host) {
    ENTER(cuMemFreeHost, CONTEXT);
    if (int status = illegal_now()) return status;
    drain_all();
    return release(uintptr_t(host), false);
}

CU CUresult cuMemHostRegister_v2(void *host, size_t bytes, unsigned) {
    ENTER(cuMemHostRegister, CONTEXT);
    if (int status = illegal_now()) return status;
    if (!host || !bytes || find(uintptr_t(host))) return host && bytes ? 712 : int(INVALID_VALUE);
    allocations[uintptr_t(host)] = {nullptr, 0, bytes, Allocation::REGISTERED};
    return SUCCESS;
}

CU CUresult cuMemHostUnregister(void *host) {
    ENTER(cuMemHostUnregister, CONTEXT);
    auto found = allocations.find(uintptr_t(host));
    if (found == allocations.end() || found->second.kind != Allocation::REGISTERED) return 713;
    drain_all();
    allocations.erase(found);
    return SUCCESS;
}

CU CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *result, void *host, unsigned) {
    ENTER(cuMemHostGetDevicePointer, CONTEXT);
    if (!pinned(host, 1)) return INVALID_VALUE;
    *result = uintptr_t(host);
    return SUCCESS;
}

CU CUresult cuMemHostGetFlags(unsigned *flags, void *host) {
    ENTER(cuMemHostGetFlags, CONTEXT);
    *flags = 0;
    return pinned(host, 1) ? SUCCESS : int(INVALID_VALUE);
}

CU CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr address) {
    ENTER(cuPointerGetAttribute, CONTEXT);
    uintptr_t begin;
    const Allocation *allocation = find(address, &begin);
    if (!allocation) return INVALID_VALUE;
    switch (attribute) {
    case 1:
        *static_cast<void **>(data) = current.empty() ? nullptr : current.back();
        return SUCCESS;
    case 2:
        *static_cast<unsigned *>(data) = allocation->kind == Allocation::DEVICE ? 2 : 1;
        return SUCCESS;
    case 3:
        *static_cast<CUdeviceptr *>(data) = address;
        return SUCCESS;
    case 9:
        *static_cast<int *>(data) = 0;
        return SUCCESS;
    case 11:
        *static_cast<CUdeviceptr *>(data) = begin;
        return SUCCESS;
    case 12:
        *static_cast<size_t *>(data) = allocation->bytes;
        return SUCCESS;
    default:
        return NOT_SUPPORTED;
    }
}

// ---- copies ------------------------------------------------------------------------------------------

CU CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t bytes) {
    ENTER(cuMemcpyHtoD, CONTEXT);
    return synchronous(reinterpret_cast<void *>(to), from, bytes);
}

CU CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t bytes) {
    ENTER(cuMemcpyDtoH, CONTEXT);
    return synchronous(to, reinterpret_cast<void *>(from), bytes);
}

CU CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    ENTER(cuMemcpyDtoD, CONTEXT);
    return synchronous(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes);
}

CU CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, void *handle) {
    ENTER(cuMemcpyHtoDAsync, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!within(to, bytes) || !within(uintptr_t(from), bytes)) return INVALID_VALUE;
    void *target = reinterpret_cast<void *>(to);
    if (pinned(from, bytes)) return submit(stream, [=] { return copy(target, from, bytes); });
    if (stream->capture) return stream->capture->broken = CAPTURE_UNSUPPORTED;
    // Pageable memory is read before the call returns.
    const char *begin = static_cast<const char *>(from);
    std::vector<char> staged(begin, begin + bytes);
    return submit(stream, [=] { return copy(target, staged.data(), bytes); });
}

CU CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, void *handle) {
    ENTER(cuMemcpyDtoHAsync, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!within(from, bytes) || !within(uintptr_t(to), bytes)) return INVALID_VALUE;
    const void *source = reinterpret_cast<void *>(from);
    if (!pinned(to, bytes) && stream->capture) return stream->capture->broken = CAPTURE_UNSUPPORTED;
    int status = submit(stream, [=] { return copy(to, source, bytes); });
    if (!status && !pinned(to, bytes)) // pageable memory is written before the call returns
        status = drain(stream);
    return status;
}

CU CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, void *handle) {
    ENTER(cuMemcpyDtoDAsync, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!within(to, bytes) || !within(from, bytes)) return INVALID_VALUE;
    return submit(stream, [=] { return copy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
}

CU CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    ENTER(cuMemsetD8, CONTEXT);
    return fill_now(to, value, count);
}

CU CUresult cuMemsetD16_v2(CUdeviceptr to, unsigned short value, size_t count) {
    ENTER(cuMemsetD16, CONTEXT);
    return fill_now(to, value, count);
}

CU CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
    ENTER(cuMemsetD32, CONTEXT);
    return fill_now(to, value, count);
}

CU CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, void *stream) {
    ENTER(cuMemsetD8Async, CONTEXT);
    return fill(to, value, count, stream_of(stream));
}

CU CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, void *stream) {
    ENTER(cuMemsetD16Async, CONTEXT);
    return fill(to, value, count, stream_of(stream));
}

CU CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, void *stream) {
    ENTER(cuMemsetD32Async, CONTEXT);
    return fill(to, value, count, stream_of(stream));
}
