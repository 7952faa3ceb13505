"""What PyCUDA lacks of the driver's interface, by ctypes: stream capture and graphs, and whether a context still lives;
and where NVIDIA's libraries lie.

Handles (streams, graphs) are plain ints.  The library itself is the one that PyCUDA has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ulonglong, c_void_p
from pathlib import Path

from llmc.errors import DeviceError

THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may do as they like

_SIGNATURES = {
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuCtxSynchronize": [],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphGetNodes": [c_void_p, c_void_p, POINTER(c_size_t)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuGraphExecDestroy": [c_void_p],
}  # fmt: skip


class CallError(DeviceError):
    """A driver function has returned an error, with the driver's own words."""


@functools.cache
def load() -> ctypes.CDLL:
    """The driver's library; OSError where there is no driver."""
    # For all to see: PyCUDA may have been built without naming it.
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _function(name: str) -> Callable[..., int]:
    function = getattr(load(), name)
    function.argtypes, function.restype = _SIGNATURES[name], c_int
    return function


def _call(name: str, *arguments: object) -> None:
    if status := _function(name)(*arguments):
        raise CallError(f"{name}: {error_string(status)}")


def error_string(status: int) -> str:
    """The driver's words for a status."""
    text = c_char_p()
    _function("cuGetErrorString")(status, byref(text))
    return text.value.decode() if text.value else f"error {status}"


def alive() -> bool:
    """Whether the current context, once all its work is done, has met no fault.  A fault stays for good: it is reported
    by whatever call comes next."""
    return _function("cuCtxSynchronize")() == 0


# ---- graphs ----------------------------------------------------------------------------------------


def begin_capture(stream: int) -> None:
    """What is sent to the stream from now on is recorded and not run."""
    _call("cuStreamBeginCapture_v2", stream, THREAD_LOCAL)


def end_capture(stream: int) -> int:
    """The graph of what was sent to the stream.  CallError where something in between broke the capture; the stream is
    usable again in any case."""
    graph = c_void_p()
    _call("cuStreamEndCapture", stream, byref(graph))
    return graph.value or 0


def count_nodes(graph: int) -> int:
    """Launches and copies in a graph."""
    count = c_size_t()
    _call("cuGraphGetNodes", graph, None, byref(count))
    return count.value


def instantiate(graph: int) -> int:
    """An executable graph; `graph` itself is not needed any more."""
    executable = c_void_p()
    _call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
    return executable.value or 0


def launch(executable: int, stream: int) -> None:
    """Run the graph in the order of the stream."""
    _call("cuGraphLaunch", executable, stream)


def destroy_graph(graph: int) -> None:
    """Free what `end_capture` gave.  Never fails: there is nothing one could do."""
    _function("cuGraphDestroy")(graph)


def destroy_executable(executable: int) -> None:
    """Free what `instantiate` gave; a run under way is finished first.  Never fails."""
    _function("cuGraphExecDestroy")(executable)


# ---- libraries -------------------------------------------------------------------------------------


def library(name: str, package: str) -> ctypes.CDLL:
    """NVIDIA's library `name` ("cublasLt"), which the pip package `package` brings; DeviceError where there is none."""
    for path in libraries(name, package):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise DeviceError(f"lib{name} was not found: pip install {package}")


def libraries(name: str, package: str) -> Iterator[str]:
    """Paths and names to try for NVIDIA's library `name`, best first: in LLMC_CUDA_LIBRARIES, in pip's packages, what
    the system's loader knows, in the CUDA toolkit."""
    stem = f"lib{name}"
    for folder in _library_folders(package):
        yield from map(str, _versions(folder, stem))
    for version in (".13", ".12", ""):
        yield f"{stem}.so{version}"
    for toolkit in toolkits():
        for place in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            yield from map(str, _versions(toolkit / place, stem))


def _library_folders(package: str) -> Iterator[Path]:
    if chosen := os.environ.get("LLMC_CUDA_LIBRARIES"):
        yield Path(chosen)
    for root in wheel_roots():
        yield root / "cu13" / "lib"  # of CUDA 13 in common, before that a folder for each package
        yield root / package.removeprefix("nvidia-").replace("-", "_") / "lib"


def _versions(folder: Path, stem: str) -> list[Path]:
    """The library's files in one folder, the newest first."""

    def version(path: Path) -> list[int]:
        return [int(part) for part in path.name.split(".") if part.isdecimal()]

    return sorted(folder.glob(f"{stem}.so*"), key=version, reverse=True)


def wheel_roots() -> list[Path]:
    """The folders `nvidia` of the packages that pip installs."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []


def toolkits() -> list[Path]:
    """Where a CUDA toolkit may be installed."""
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return [Path(place) for place in (*named, "/usr/local/cuda")]
