// Streams, events, capture and graphs of the simulated GPU.  What capture forbids is refused as the CUDA programming
// guide has it ("Prohibited and Unhandled Operations"), and breaks the capture.

#include "device.h"

#include <chrono>

using namespace simulation;

struct Event {
    bool timing;
    bool recorded = false;
    Stream *stream = nullptr;
    uint64_t ticket = 0; // of its place in the stream
    std::shared_ptr<double> time;
    std::shared_ptr<Capture> capture;
};

struct Graph {
    std::vector<Work> nodes;
};

namespace {

std::set<Event *> events;
std::set<Graph *> graphs, executables;

bool lazy() { return setting("SIMULATION_STREAMS", "eager") == "lazy"; }

int run_until(Stream *stream, uint64_t ticket) {
    while (stream->done < ticket && !gpu.fault) {
        Work work = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        if (int status = work()) return status;
    }
    return gpu.fault;
}

void capture_into(Stream *stream, Work work) {
    Capture &capture = *stream->capture;
    capture.nodes.push_back(std::move(work));
    if (stream != capture.origin) capture.joined[stream] = false;
}

Event *event_of(void *handle) {
    auto *event = static_cast<Event *>(handle);
    return events.count(event) ? event : nullptr;
}

int broken_by(Stream *stream, int status) {
    if (!stream->capture->broken) stream->capture->broken = status;
    return status;
}

} // namespace

Stream *simulation::stream_of(void *handle) {
    if (!handle || handle == reinterpret_cast<void *>(1) || handle == reinterpret_cast<void *>(2)) return &gpu.standard;
    auto *stream = static_cast<Stream *>(handle);
    return gpu.streams.count(stream) ? stream : nullptr;
}

int simulation::illegal_now(bool implicit) {
    for (Capture *capture : gpu.captures) {
        // 0: forbidden to all threads, 1: to this one, 2: not at all
        bool applies = capture->mode == 0 || (capture->mode == 1 && capture->thread == std::this_thread::get_id());
        if (!applies && !(implicit && capture->origin->blocking)) continue;
        int status = implicit && capture->origin->blocking ? CAPTURE_IMPLICIT : CAPTURE_UNSUPPORTED;
        if (!capture->broken) capture->broken = status;
        return status;
    }
    return SUCCESS;
}

int simulation::submit(Stream *stream, Work work) {
    if (stream->capture) {
        if (stream->capture->broken) return CAPTURE_INVALIDATED;
        capture_into(stream, std::move(work));
        return SUCCESS;
    }
    if (stream == &gpu.standard) {
        for (Capture *capture : gpu.captures)
            if (capture->origin->blocking) {
                capture->broken = CAPTURE_IMPLICIT;
                return CAPTURE_IMPLICIT;
            }
        for (Stream *other : gpu.streams)
            if (other->blocking) drain(other);
        work();
        return SUCCESS;
    }
    stream->queue.push_back(std::move(work));
    stream->submitted++;
    if (!lazy()) drain(stream);
    return SUCCESS; // a fault is the next call's
}

int simulation::drain(Stream *stream) { return run_until(stream, stream->submitted); }

int simulation::drain_all() {
    for (Stream *stream : gpu.streams) drain(stream);
    return gpu.fault;
}

CU void simulation_enqueue(void *handle, void (*run)(void *), void *data, size_t size) {
    std::unique_lock<std::recursive_mutex> lock(gpu.lock);
    Stream *stream = stream_of(handle);
    if (!stream) {
        note("simulation_enqueue on what is no stream");
        gpu.fault = gpu.fault ? gpu.fault : int(INVALID_HANDLE);
        return;
    }
    const char *begin = static_cast<const char *>(data);
    std::vector<char> copy(begin, begin + size);
    submit(stream, [copy, run]() mutable { return guarded([&] { run(copy.data()); }); });
}

// ---- streams -----------------------------------------------------------------------------------------

CU CUresult cuStreamCreate(void **handle, unsigned flags) {
    ENTER(cuStreamCreate, CONTEXT);
    if (!handle || flags > 1) return INVALID_VALUE;
    auto *stream = new Stream{flags == 0, {}, 0, 0, nullptr};
    gpu.streams.insert(stream);
    *handle = stream;
    return SUCCESS;
}

CU CUresult cuStreamCreateWithPriority(void **handle, unsigned flags, int) { return cuStreamCreate(handle, flags); }

CU CUresult cuStreamDestroy_v2(void *handle) {
    ENTER(cuStreamDestroy, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream || stream == &gpu.standard) return INVALID_HANDLE;
    drain(stream);
    if (stream->capture) gpu.captures.erase(stream->capture.get());
    gpu.streams.erase(stream);
    for (Event *event : events)
        if (event->stream == stream) event->stream = nullptr;
    delete stream;
    return SUCCESS;
}

CU CUresult cuStreamSynchronize(void *handle) {
    ENTER(cuStreamSynchronize, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return broken_by(stream, CAPTURE_UNSUPPORTED);
    return drain(stream);
}

CU CUresult cuStreamQuery(void *handle) {
    ENTER(cuStreamQuery, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return broken_by(stream, CAPTURE_UNSUPPORTED);
    int status = stream->done < stream->submitted ? int(NOT_READY) : SUCCESS;
    drain(stream); // so that who asks again gets on
    return status;
}

CU CUresult cuCtxSynchronize() {
    ENTER(cuCtxSynchronize, CONTEXT);
    if (!gpu.captures.empty())
        return illegal_now() ? int(CAPTURE_UNSUPPORTED)
                             : broken_by((*gpu.captures.begin())->origin, CAPTURE_UNSUPPORTED);
    return drain_all();
}

CU CUresult cuStreamGetFlags(void *handle, unsigned *flags) {
    ENTER(cuStreamGetFlags, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *flags = stream->blocking ? 0 : 1;
    return SUCCESS;
}

CU CUresult cuLaunchHostFunc(void *handle, void (*function)(void *), void *data) {
    ENTER(cuLaunchHostFunc, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    return submit(stream, [function, data] {
        function(data);
        return int(SUCCESS);
    });
}

// ---- events ------------------------------------------------------------------------------------------

CU CUresult cuEventCreate(void **handle, unsigned flags) {
    ENTER(cuEventCreate, CONTEXT);
    if (!handle) return INVALID_VALUE;
    auto *event = new Event{};
    event->timing = !(flags & 2);
    events.insert(event);
    *handle = event;
    return SUCCESS;
}

CU CUresult cuEventDestroy_v2(void *handle) {
    ENTER(cuEventDestroy, CONTEXT);
    Event *event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    events.erase(event);
    delete event;
    return SUCCESS;
}

CU CUresult cuEventRecord(void *handle, void *stream_handle) {
    ENTER(cuEventRecord, CONTEXT);
    Event *event = event_of(handle);
    Stream *stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    event->recorded = true;
    event->stream = stream;
    event->capture = stream->capture;
    if (stream->capture) return stream->capture->broken ? int(CAPTURE_INVALIDATED) : SUCCESS;
    auto time = event->time = std::make_shared<double>(0);
    int status = submit(stream, [time] {
        *time = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
        return int(SUCCESS);
    });
    event->ticket = stream->submitted;
    return status;
}

CU CUresult cuEventRecordWithFlags(void *event, void *stream, unsigned) { return cuEventRecord(event, stream); }

CU CUresult cuEventQuery(void *handle) {
    ENTER(cuEventQuery, CONTEXT);
    Event *event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return broken_by(event->capture->origin, CAPTURED_EVENT);
    if (int status = illegal_now()) return status;
    if (!event->recorded || !event->stream || event->stream->done >= event->ticket) return SUCCESS;
    run_until(event->stream, event->ticket); // so that who asks again gets on
    return NOT_READY;
}

CU CUresult cuEventSynchronize(void *handle) {
    ENTER(cuEventSynchronize, CONTEXT);
    Event *event = event_of(handle);
    if (!event) return INVALID_HANDLE;
    if (event->capture) return broken_by(event->capture->origin, CAPTURED_EVENT);
    if (int status = illegal_now()) return status;
    return event->recorded && event->stream ? run_until(event->stream, event->ticket) : gpu.fault;
}

CU CUresult cuEventElapsedTime_v2(float *milliseconds, void *begin_handle, void *end_handle) {
    ENTER(cuEventElapsedTime, CONTEXT);
    Event *begin = event_of(begin_handle), *end = event_of(end_handle);
    if (!begin || !end || !begin->recorded || !end->recorded || !begin->timing || !end->timing) return INVALID_HANDLE;
    for (Event *event : {begin, end}) {
        if (event->capture) return CAPTURED_EVENT;
        if (event->stream && event->stream->done < event->ticket) return NOT_READY;
    }
    *milliseconds = float((*end->time - *begin->time) * 1e3);
    return SUCCESS;
}

CU CUresult cuEventElapsedTime(float *milliseconds, void *begin, void *end) {
    return cuEventElapsedTime_v2(milliseconds, begin, end);
}

CU CUresult cuStreamWaitEvent(void *stream_handle, void *handle, unsigned) {
    ENTER(cuStreamWaitEvent, CONTEXT);
    Event *event = event_of(handle);
    Stream *stream = stream_of(stream_handle);
    if (!event || !stream) return INVALID_HANDLE;
    if (event->capture) {
        if (!gpu.captures.count(event->capture.get())) return CAPTURED_EVENT; // of a capture that is over
        if (!stream->capture) {
            if (stream == &gpu.standard) return broken_by(event->capture->origin, CAPTURE_IMPLICIT);
            stream->capture = event->capture; // forks
            event->capture->joined[stream] = false;
        } else if (stream->capture != event->capture) {
            broken_by(event->capture->origin, CAPTURE_MERGE);
            return broken_by(stream, CAPTURE_MERGE);
        }
        if (stream == event->capture->origin && event->stream) event->capture->joined[event->stream] = true;
        return event->capture->broken ? int(CAPTURE_INVALIDATED) : SUCCESS;
    }
    if (stream->capture) return broken_by(stream, CAPTURE_ISOLATION);
    if (!event->recorded || !event->stream || event->stream == stream) return SUCCESS;
    Stream *other = event->stream;
    uint64_t ticket = event->ticket;
    return submit(stream, [other, ticket] { return gpu.streams.count(other) ? run_until(other, ticket) : gpu.fault; });
}

// ---- capture and graphs ------------------------------------------------------------------------------

CU CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER(cuStreamBeginCapture, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (mode < 0 || mode > 2) return INVALID_VALUE;
    if (stream == &gpu.standard) return CAPTURE_UNSUPPORTED;
    if (stream->capture) return ILLEGAL_STATE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->mode = mode;
    stream->capture->origin = stream;
    stream->capture->thread = std::this_thread::get_id();
    gpu.captures.insert(stream->capture.get());
    return SUCCESS;
}

CU CUresult cuStreamEndCapture(void *handle, void **result) {
    ENTER(cuStreamEndCapture, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream || !result) return stream ? int(INVALID_VALUE) : INVALID_HANDLE;
    *result = nullptr;
    if (!stream->capture) return ILLEGAL_STATE;
    std::shared_ptr<Capture> capture = stream->capture;
    if (capture->origin != stream) return broken_by(stream, CAPTURE_UNMATCHED);
    if (capture->mode != 2 && capture->thread != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    bool unjoined = false;
    for (auto &[other, joined] : capture->joined) {
        unjoined |= !joined;
        if (gpu.streams.count(other) && other->capture == capture) other->capture = nullptr;
    }
    stream->capture = nullptr;
    gpu.captures.erase(capture.get());
    if (capture->broken) return CAPTURE_INVALIDATED;
    if (unjoined) return CAPTURE_UNJOINED;
    auto *graph = new Graph{std::move(capture->nodes)};
    graphs.insert(graph);
    *result = graph;
    return SUCCESS;
}

CU CUresult cuStreamIsCapturing(void *handle, int *status) {
    ENTER(cuStreamIsCapturing, CONTEXT);
    Stream *stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->broken ? 2 : 1;
    return SUCCESS;
}

CU CUresult cuGraphGetNodes(void *handle, void **nodes, size_t *count) {
    ENTER(cuGraphGetNodes, CONTEXT);
    auto *graph = static_cast<Graph *>(handle);
    if (!graphs.count(graph)) return INVALID_HANDLE;
    if (nodes)
        for (size_t i = 0; i < *count && i < graph->nodes.size(); i++) nodes[i] = &graph->nodes[i];
    else
        *count = graph->nodes.size();
    return SUCCESS;
}

CU CUresult cuGraphInstantiateWithFlags(void **result, void *handle, unsigned long long) {
    ENTER(cuGraphInstantiate, CONTEXT);
    auto *graph = static_cast<Graph *>(handle);
    if (!graphs.count(graph) || !result) return INVALID_VALUE;
    auto *executable = new Graph(*graph);
    executables.insert(executable);
    *result = executable;
    return SUCCESS;
}

CU CUresult cuGraphUpload(void *handle, void *) {
    ENTER(cuGraphUpload, CONTEXT);
    return executables.count(static_cast<Graph *>(handle)) ? SUCCESS : int(INVALID_VALUE);
}

CU CUresult cuGraphLaunch(void *handle, void *stream_handle) {
    ENTER(cuGraphLaunch, CONTEXT);
    auto *graph = static_cast<Graph *>(handle);
    Stream *stream = stream_of(stream_handle);
    if (!executables.count(graph) || !stream) return INVALID_HANDLE;
    for (Work &work : graph->nodes)
        if (int status = submit(stream, work)) return status;
    return SUCCESS;
}

CU CUresult cuGraphExecDestroy(void *handle) {
    ENTER(cuGraphExecDestroy, DRIVER);
    auto *graph = static_cast<Graph *>(handle);
    if (!executables.erase(graph)) return INVALID_VALUE;
    delete graph;
    return SUCCESS;
}

CU CUresult cuGraphDestroy(void *handle) {
    ENTER(cuGraphDestroy, DRIVER);
    auto *graph = static_cast<Graph *>(handle);
    if (!graphs.erase(graph)) return INVALID_VALUE;
    delete graph;
    return SUCCESS;
}
