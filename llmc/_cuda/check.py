"""Arguments of ops: a ValueError (TypeError for what is no array of this device) that names the argument, before any
launch.  Messages are those of `_cpu/check.pyx`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmc._cuda import device, graphs
from llmc._cuda.device import DeviceArray
from llmc.errors import DeviceError


def _array(name: str, a: Any, dtype: Any, ndim: int) -> DeviceArray:
    if not isinstance(a, DeviceArray):
        raise TypeError(f"{name}: expected an array of the GPU, got {type(a).__name__}")
    if a.lost:
        raise DeviceError(f"{name}: lies on a GPU that has been closed since")
    if a.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {np.dtype(dtype)}, got {a.dtype}")
    if ndim and a.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got shape {a.shape}")
    flags = a.flags
    if not flags.c_contiguous:
        raise ValueError(f"{name}: must be C-contiguous")
    if not flags.writeable:
        raise ValueError(f"{name}: must be writable")
    return a


def vector(name: str, a: Any, dtype: Any = None) -> DeviceArray:
    """`a`, which has one axis; `dtype` None is the storage type."""
    return _array(name, a, device.storage if dtype is None else dtype, 1)


def matrix(name: str, a: Any, dtype: Any = None) -> DeviceArray:
    """`a`, which has two axes."""
    return _array(name, a, device.storage if dtype is None else dtype, 2)


def cube(name: str, a: Any, dtype: Any = None) -> DeviceArray:
    """`a`, which has three axes."""
    return _array(name, a, device.storage if dtype is None else dtype, 3)


def flat(name: str, a: Any, dtype: Any = None) -> DeviceArray:
    """`a` of any shape, to be seen as one vector."""
    return _array(name, a, device.storage if dtype is None else dtype, 0)


def numbers(name: str, a: Any) -> DeviceArray:
    """`a` of any shape, of float32 or the storage type."""
    return _array(name, a, device.storage if getattr(a, "dtype", None) == device.storage else np.float32, 0)


def ids(name: str, a: Any, V: int) -> DeviceArray:
    """`a`, int32 with two axes, every id of which lies in [0, V).

    What was written from the host is known without asking the device; else the ids are fetched, which waits.  A
    recording asks again at every replay, since it does not run the op's own check.
    """
    a = _array(name, a, np.int32, 2)
    graphs.require(lambda: in_range(name, a, V))
    return a


def in_range(name: str, a: DeviceArray, V: int) -> None:
    """ValueError unless every id of `a` (two axes) lies in [0, V)."""
    known = a.bounds
    if a.size == 0 or (known is not None and 0 <= known[0] and known[1] < V):
        return
    values = np.asarray(a)
    outside = np.argwhere((values < 0) | (values >= V))
    if len(outside):
        i, j = outside[0]
        raise ValueError(f"{name}: id {values[i, j]} at [{i}, {j}] is outside [0, {V})")


def places(name: str, a: Any, B: int, T: int, limit: int, what: str) -> DeviceArray:
    """`a` (B,), int32: where T tokens of each sequence begin, among the `limit` places of `what`, as "rows of wpe".

    Like those of ids, values that are not known are fetched, and a recording asks again.
    """
    a = _array(name, a, np.int32, 1)
    expect(name, a.shape, (B,))
    graphs.require(lambda: in_places(name, a, T, limit, what))
    return a


def in_places(name: str, a: DeviceArray, T: int, limit: int, what: str) -> None:
    """ValueError unless T tokens from each of `a` on lie in [0, limit)."""
    known = a.bounds
    if a.size == 0 or (known is not None and 0 <= known[0] and known[1] + T <= limit):
        return
    for b, start in enumerate(np.asarray(a).tolist()):
        if not 0 <= start <= limit - T:
            raise ValueError(f"{name}: {T} tokens from {start} at [{b}] exceed the {limit} {what}")


def expect(name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    """ValueError unless an argument has the shape that others ask for."""
    if got != want:
        raise ValueError(f"{name}: expected shape {want}, got {got}")
