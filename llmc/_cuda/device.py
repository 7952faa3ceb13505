"""One GPU: its context and streams, its memory and the arrays in it, and what is said when it fails.

There are two streams.  Ops run in the compute stream, in the order of their calls; values from the host travel in the
copy stream while ops run (`transfer.py`).  Everything that belongs to the context hangs on one object, `_Opened`, so
that closing drops it all: kernels, staging, workspace.

A fault of a kernel shows late, in whatever asks the driver next, and ends all use of CUDA in this process: `fault` says
so, naming the op if each was waited for (LLMC_CUDA_CHECK=1, and every first run of a recording).
"""

from __future__ import annotations

import atexit
import collections
import functools
import math
import operator
import os
import sys
import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeVar

import ml_dtypes  # noqa: F401 - makes NumPy know the name "bfloat16"
import numpy as np

from llmc._cuda import driver, gpu, transfer
from llmc.errors import DeviceError, DeviceMemoryError

LIBRARY_NBYTES = 32 << 20  # what cuBLASLt may use beside its arguments, as much as it asks for on Hopper

# What `configure` has chosen; ops read these.
storage: np.dtype[Any] = np.dtype(np.float32)  # of activations, weights and their gradients
dtype = "fp32"  # of matrix products
gemm = "cublaslt"
attention = "own"
attention_asked = False  # whether somebody named it

_opened: _Opened | None = None
_lost = ""  # why there will be none any more in this process

F = TypeVar("F", bound=Callable[..., Any])


class _Opened:
    """A GPU in use."""

    def __init__(self, index: int) -> None:
        self.cuda = cuda = gpu.import_pycuda()
        self.errors: type[Exception] = cuda.Error
        self.driver_version: int = gpu.driver_version(cuda)
        gpu.initialise(cuda)
        self.index, self.gpu = index, gpu.find(cuda, index)
        self.name: str = self.gpu.name()
        self.capability: tuple[int, int] = tuple(self.gpu.compute_capability())
        attribute = cuda.device_attribute
        self.multiprocessors: int = self.gpu.get_attribute(attribute.MULTIPROCESSOR_COUNT)
        self.shared_limit: int = self.gpu.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        try:
            self.context = self.gpu.retain_primary_context()
            self.context.push()
        except cuda.Error as error:
            raise DeviceError(_unusable(index, self.name, error)) from error
        self.home = get_ident()  # the thread where the context is current
        self.functions: dict[Any, Any] = {}  # kernels, by whatever `compiler.Kernel` finds them with
        self.dead: list[Callable[[], None]] = []  # what frees memory and graphs, to be called when that is possible
        self.recent: collections.deque[str] = collections.deque(maxlen=16)  # ops, for the message of a fault
        self.always_checks = os.environ.get("LLMC_CUDA_CHECK", "0") not in ("", "0")
        self.checks = self.always_checks  # wait after every op
        self.recording: Any = None  # the one being run or captured
        self.capturing = False
        self.workspace: Memory | None = None
        self.library: Memory | None = None

    def begin(self) -> None:
        """Make what lives in the context."""
        non_blocking = 1  # CU_STREAM_NON_BLOCKING: nobody's default stream holds ours up
        self.compute, self.copy = self.cuda.Stream(non_blocking), self.cuda.Stream(non_blocking)
        self.staging = transfer.Staging(self.cuda, self.compute, self.copy)
        self.fetches = transfer.Fetches(self.cuda, self.compute)

    def discard(self, free: Callable[[], None]) -> None:
        """Call `free` once no op needs any more what it frees: at once, or after a capture, or on the right thread."""
        self.dead.append(free)
        self.bury()

    def bury(self) -> None:
        """Free what was discarded while that could not be done."""
        if self is not _opened or self.capturing or self.home != get_ident() or not self.dead:
            return
        try:
            self.compute.synchronize()
        except self.errors:
            return  # whoever asks next reports it
        while self.dead:
            self.dead.pop()()


# ---- opening and closing ---------------------------------------------------------------------------


def open_gpu(index: int) -> None:
    """Take GPU `index` into use, once per process; errors as in `ops.load`."""
    global _opened
    if _lost:
        raise DeviceError(_lost)
    if _opened is not None:
        if _opened.index != index:
            raise DeviceError(f"cuda:{index}: this process uses cuda:{_opened.index}, and a process uses one GPU")
        return
    _opened = opened = _Opened(index)
    try:
        opened.begin()
    except opened.cuda.MemoryError as error:
        close()
        raise DeviceMemoryError(f"cuda:{index} ({opened.name}) has no memory left to begin with: {error}") from error
    except opened.errors as error:
        close()
        raise DeviceError(_unusable(index, opened.name, error)) from error
    except BaseException:
        close()
        raise
    if threading.current_thread() is not threading.main_thread():
        # PyCUDA ends the process when a thread ends with a context: this one's is pushed for every call anew.
        opened.context.pop()
        opened.home = 0


def _unusable(index: int, name: str, error: Exception) -> str:
    return f"cuda:{index} ({name}) cannot be used, another program may hold it: {error}"


def close() -> None:
    """Give the GPU back; arrays are lost.  Nothing happens where none is open."""
    global _opened
    opened, _opened = _opened, None
    if opened is None:
        return
    driver.alive()  # waits
    # Whatever belongs to the context dies silently once it is detached, in any order.
    opened.context.detach()


@atexit.register
def _close_at_exit() -> None:
    close()
    if pycuda := sys.modules.get("pycuda.driver"):
        # A context that was closed on another thread is still on this one's stack, which PyCUDA wants to see empty;
        # asking for the current one drops those that are gone.
        pycuda.Context.get_current()


def is_open() -> bool:
    """Whether a GPU is in use."""
    return _opened is not None


def handle() -> _Opened:
    """All that belongs to the GPU in use; DeviceError where there is none."""
    if _opened is None:
        raise DeviceError(_lost or 'no GPU is set up: llmc.ops.load("cuda") does that')
    return _opened


# ---- ops, threads and faults -----------------------------------------------------------------------


def op(function: F, name: str = "") -> F:
    """`function` as a backend's: on any thread, and with errors of the driver as DeviceErrors that name it."""
    name = name or function.__name__

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return run(name, function, *args, **kwargs)

    return called  # type: ignore[return-value]


def run(op: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What `op` makes of a function."""
    opened = _opened
    if opened is None or opened.home != get_ident():
        return _elsewhere(op, function, args, kwargs)
    opened.recent.append(op)
    try:
        result = function(*args, **kwargs)
        if opened.checks and not opened.capturing:
            opened.compute.synchronize()
        return result
    except (opened.errors, driver.CallError) as error:
        raise fault(op, error) from error


def _elsewhere(op: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run on a thread that the context is not current on, and make it current for as long as that takes."""
    opened = handle()
    home = opened.home
    try:
        opened.context.push()
    except opened.errors as error:
        raise DeviceError(f"{op}: {error}") from error
    opened.home = get_ident()
    try:
        return run(op, function, *args, **kwargs)
    finally:
        if opened is _opened:
            opened.context.pop()
            opened.home = home


def fault(name: str, error: Exception) -> DeviceError:
    """The error to raise for one of the driver's, met in `name`.  If it has cost the context, everything is closed."""
    global _lost
    opened = handle()
    if opened.capturing or driver.alive():
        if isinstance(error, opened.cuda.MemoryError) or "out of memory" in str(error):
            advice = "a smaller batch size or recompute block needs less"
            return DeviceMemoryError(f"{name}: {error}; {free_memory()}; {advice}")
        return DeviceError(f"{name}: {error}")
    if opened.checks:
        message = f"{name}: the GPU has failed: {error}"
    else:
        among = ", ".join(dict.fromkeys(opened.recent))
        message = (
            f"{name}: the GPU has failed, here or in an op before it (the last were {among}): {error}; "
            "with LLMC_CUDA_CHECK=1 the message names the op"
        )
    close()
    _lost = f"the GPU is out of this process's reach since this error: {message}"
    return DeviceError(message)


def not_captured(what: str) -> None:
    """RuntimeError in a capture, of which `what` cannot be a part."""
    if _opened is not None and _opened.capturing:
        raise RuntimeError(f"{what} cannot be part of a recording")


@op
def synchronize() -> None:
    """Wait for everything that was asked of the GPU."""
    not_captured("waiting")
    opened = handle()
    opened.compute.synchronize()
    opened.copy.synchronize()


# ---- memory ----------------------------------------------------------------------------------------


class Memory:
    """One zero-filled allocation, freed with its last array."""

    __slots__ = ("__weakref__", "_allocation", "_opened", "known", "nbytes", "ptr")

    def __init__(self, nbytes: int, purpose: str) -> None:
        self._allocation = None
        opened = self._opened = handle()
        not_captured(f"{purpose} takes memory, which")
        opened.bury()
        try:
            self._allocation = opened.cuda.mem_alloc(max(1, nbytes))
        except opened.cuda.MemoryError as error:
            raise DeviceMemoryError(f"{purpose}: {_mib(nbytes)} asked for, {free_memory()}") from error
        self.ptr, self.nbytes = int(self._allocation), nbytes
        self.known: dict[tuple[int, int], tuple[int, int]] = {}  # least and greatest of int32 written from the host
        if nbytes:
            opened.cuda.memset_d8_async(self.ptr, 0, nbytes, opened.compute)

    def __del__(self) -> None:
        if self._allocation is not None:
            self._opened.discard(self._allocation.free)

    def forget(self, start: int, stop: int) -> None:
        """Addresses in [start, stop) are written to."""
        for place in [place for place in self.known if place[0] < stop and start < place[1]]:
            del self.known[place]


def free_memory() -> str:
    """How much memory is left, in words."""
    opened = handle()
    free, total = opened.cuda.mem_get_info()
    return f"{_mib(free)} of {_mib(total)} are free on cuda:{opened.index} ({opened.name})"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


class _Span:
    """Bytes of the device as NumPy's geometry sees them."""

    __slots__ = ("__array_interface__",)

    def __init__(self, ptr: int, nbytes: int) -> None:
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (nbytes,), "data": (ptr, False)}


class DeviceArray:
    """An array in the GPU's memory, or a view of one; `empty` makes it.

    Shapes, strides and views are NumPy's: `_geometry` is a NumPy array over the device's addresses, and never read.
    """

    __slots__ = ("__weakref__", "_geometry", "_memory", "dtype", "ndim", "ptr", "shape", "size")

    def __init__(self, memory: Memory, geometry: np.ndarray[Any, Any]) -> None:
        self._memory, self._geometry = memory, geometry
        self.shape: tuple[int, ...] = geometry.shape
        self.dtype: np.dtype[Any] = geometry.dtype
        self.ndim: int = geometry.ndim
        self.size: int = geometry.size
        self.ptr: int = geometry.__array_interface__["data"][0]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def lost(self) -> bool:
        """Whether the GPU it was on has been closed."""
        return self._memory._opened is not _opened

    @property
    def flags(self) -> Any:
        """NumPy's, of which `c_contiguous` and `writeable` matter."""
        return self._geometry.flags

    @property
    def bounds(self) -> tuple[int, int] | None:
        """Of int32: no value is below the first or above the second.  None where nobody knows without looking."""
        start, stop = self.ptr, self.ptr + self.nbytes
        for place, bounds in self._memory.known.items():
            if place[0] <= start and stop <= place[1]:
                return bounds
        return None

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of unsized object")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, ptr={self.ptr:#x})"

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view, of no axes where every axis has an index."""
        keys = key if isinstance(key, tuple) else (key,)
        for part in keys:
            if part is None or part is Ellipsis or isinstance(part, slice):
                continue
            if isinstance(part, bool) or not hasattr(part, "__index__") or np.ndim(part):
                raise TypeError(f"an array of the GPU is indexed with integers and slices, not {part!r}")
        if Ellipsis not in keys:
            keys = (*keys, Ellipsis)  # NumPy would read the value itself where no axis is left
        return DeviceArray(self._memory, self._geometry[keys])

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view of another shape; ValueError where the array is not contiguous."""
        if not self._geometry.flags.c_contiguous:
            raise ValueError("reshape: the array is not C-contiguous")
        return DeviceArray(self._memory, self._geometry.reshape(*shape))

    def view(self, dtype: Any) -> DeviceArray:
        """The same bytes as another type."""
        return DeviceArray(self._memory, self._geometry.view(dtype))

    # ---- values ------------------------------------------------------------------------------------

    def __setitem__(self, key: Any, values: Any) -> None:
        """Write host values, a scalar or another array of the GPU, converted to this array's type, in stream order;
        the memory of `values` may be written to at once."""
        _assign(self if key is Ellipsis else self[key], values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """The values as a new NumPy array, once the ops so far are done."""
        if copy is False:
            raise ValueError("values of the GPU cannot be seen without copying them")
        values = _read(self)
        return values if dtype is None else values.astype(dtype, copy=False)


def _assign_values(x: DeviceArray, values: Any) -> None:
    opened = handle()
    if not x.flags.c_contiguous:
        raise ValueError("x[...] = values: the view is not C-contiguous")
    if isinstance(values, DeviceArray) and values.dtype == x.dtype and values.flags.c_contiguous:
        if values.shape != x.shape:
            raise ValueError(f"x[...] = values: expected shape {x.shape}, got {values.shape}")
        _know(x, values.bounds)
        if x.size:
            opened.cuda.memcpy_dtod_async(x.ptr, values.ptr, x.nbytes, opened.compute)
        return
    host = np.asarray(values)
    bounds = None
    if x.dtype == np.int32 and x.size:
        host = host.astype(np.int32, copy=False)
        bounds = int(host.min()), int(host.max())
    spread = np.broadcast_to(host, x.shape)
    _know(x, bounds)
    if x.size == 0:
        return
    if host.ndim or not _fill(x, host.astype(x.dtype).tobytes()):
        not_captured("x[...] = values")
        opened.staging.send(x.ptr, spread.reshape(-1), x.dtype)


def _know(x: DeviceArray, bounds: tuple[int, int] | None) -> None:
    """x is about to get values within `bounds`, if they are int32."""
    if x.dtype == np.int32:
        not_captured("writing int32")  # a replay would write again what is known by then to be something else
    start, stop = x.ptr, x.ptr + x.nbytes
    x._memory.forget(start, stop)
    if x.dtype == np.int32 and bounds is not None:
        x._memory.known[start, stop] = bounds


def _fill(x: DeviceArray, pattern: bytes) -> bool:
    """Set every element to `pattern`; False where the driver has no such operation."""
    cuda, stream, size = handle().cuda, handle().compute, x.size
    if len(pattern) == 8 and pattern[:4] == pattern[4:]:
        pattern, size = pattern[:4], 2 * size
    sets = {1: cuda.memset_d8_async, 2: cuda.memset_d16_async, 4: cuda.memset_d32_async}
    if len(pattern) not in sets:
        return False
    sets[len(pattern)](x.ptr, int.from_bytes(pattern, "little"), size, stream)
    return True


def _read_values(x: DeviceArray) -> np.ndarray[Any, Any]:
    not_captured("reading an array")
    opened = handle()
    if not x.flags.c_contiguous:
        raise ValueError("reading an array: the view is not C-contiguous")
    values = np.empty(x.shape, x.dtype)
    if x.size:
        opened.cuda.memcpy_dtoh_async(values.reshape(-1).view(np.uint8), x.ptr, opened.compute)
    opened.compute.synchronize()
    return values


_assign, _read = op(_assign_values, "x[...] = values"), op(_read_values, "reading an array")


@op
def empty(shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """A new zero-filled array; `ops.empty`."""
    kind = np.dtype(dtype)
    shape = tuple(operator.index(size) for size in shape)
    nbytes = math.prod(shape) * kind.itemsize
    memory = Memory(nbytes, "empty")
    return DeviceArray(memory, np.asarray(_Span(memory.ptr, nbytes)).view(kind).reshape(shape))


@op
def memory() -> tuple[int, int]:
    """Bytes that are free, and all there are."""
    opened = handle()
    opened.bury()
    free, total = opened.cuda.mem_get_info()
    return int(free), int(total)


# ---- workspace -------------------------------------------------------------------------------------


def enlarge(nbytes: int) -> None:
    """Make the workspace at least `nbytes` large, and give libraries theirs."""
    opened = handle()
    if opened.workspace is None or opened.workspace.nbytes < nbytes:
        opened.workspace = None  # freed before its successor is made
        opened.workspace = Memory(nbytes, "workspace")
    if gemm == "cublaslt" and opened.library is None:
        opened.library = Memory(LIBRARY_NBYTES, "workspace of cuBLASLt")


def workspace(nbytes: int) -> int:
    """The address of `nbytes` of scratch, the same at every call.  RuntimeError where `reserve` made less."""
    held = handle().workspace
    have = 0 if held is None else held.nbytes
    if nbytes > have:
        raise RuntimeError(f"workspace of {have:,} bytes is too small for {nbytes:,}: call reserve() first")
    return 0 if held is None else held.ptr


def library_workspace() -> tuple[int, int]:
    """Address and bytes of what cuBLASLt may use."""
    opened = handle()
    if opened.library is None:
        opened.library = Memory(LIBRARY_NBYTES, "workspace of cuBLASLt")
    return opened.library.ptr, opened.library.nbytes


def libraries_nbytes() -> int:
    """Bytes that are there beside the workspace: cuBLASLt's, and those that values pass through."""
    return (LIBRARY_NBYTES if gemm == "cublaslt" else 0) + transfer.STAGING_NBYTES


# ---- the GPU ---------------------------------------------------------------------------------------


def stream() -> Any:
    """The compute stream, PyCUDA's; `.handle` is its address."""
    return handle().compute


def multiprocessors() -> int:
    return handle().multiprocessors


def capability() -> tuple[int, int]:
    return handle().capability


def shared_limit() -> int:
    """Bytes of shared memory that a block may have."""
    return handle().shared_limit


# ---- values and times without stopping -------------------------------------------------------------


@op
def fetch(x: DeviceArray) -> Callable[[], np.ndarray[Any, Any]]:
    """The values that x has after the ops so far; `ops.fetch`."""
    not_captured("fetch()")
    opened = handle()
    if not isinstance(x, DeviceArray):
        raise TypeError(f"x: expected an array of the GPU, got {type(x).__name__}")
    if not x.flags.c_contiguous:
        raise ValueError("x: must be C-contiguous")
    wait = opened.fetches.begin(x.ptr, x.shape, x.dtype)

    def fetched() -> np.ndarray[Any, Any]:
        not_captured("waiting for what was fetched")
        if opened is not _opened:
            handle()
            raise DeviceError("fetch: the GPU has been closed since")
        return wait()

    return op(fetched, "fetch")


@op
def stamp() -> Any:
    """A mark in the compute stream; `ops.stamp`."""
    not_captured("stamp()")
    opened = handle()
    return opened.cuda.Event().record(opened.compute)


@op
def elapsed(begin: Any, end: Any) -> float:
    """Seconds from one `stamp` to another; `ops.elapsed`."""
    not_captured("elapsed()")
    end.synchronize()
    return float(end.time_since(begin)) * 1e-3
