"""llmc/_cuda for tests that pass NumPy arrays: `Adapter`, and which GPU there is to run them on.

LLMC_TEST_CUDA chooses: "device" is a real GPU, "simulation" the simulated one (tests/simulation), "off" none; unset,
the first of these that there is.

On the simulated GPU device memory is host memory, so an op gets a test's own arrays, and the forbidden pages around
them (guard.py) guard them there too.  On a real one, and for bfloat16, they are copied: arrays that share memory share
it on the device, and what lies around them is checked afterwards.

With bfloat16 storage the tests' float32 arrays become bfloat16 where the contract says so (guard.stored), and come back
as float32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guard
import ml_dtypes
import numpy as np
import pytest
import simulation
from guard import Array, stored

BF16 = np.dtype(ml_dtypes.bfloat16)
MARGIN = 256  # bytes around a copy on a real GPU
FILL = 0xFF

# ---- which GPU -------------------------------------------------------------------------------------


@functools.cache
def mode() -> tuple[str, str]:
    """"device", "simulation" or "off", and why it is off."""
    wanted = os.environ.get("LLMC_TEST_CUDA", "")
    if wanted not in ("", "device", "simulation", "off"):
        raise ValueError(f"LLMC_TEST_CUDA={wanted}: choose from device, simulation, off")
    if wanted == "off":
        return "off", "LLMC_TEST_CUDA is off"
    try:
        import pycuda  # noqa: F401
    except ModuleNotFoundError:
        return "off", "PyCUDA is not installed (.ci/pycuda builds it)"
    if wanted == "device" or (not wanted and any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))):
        return "device", ""
    try:
        simulation.load()
    except simulation.Unavailable as error:
        return "off", str(error)
    return "simulation", ""


def require() -> str:
    """Skips the test where there is neither a GPU nor a simulated one; gives which it is."""
    which, why = mode()
    if which == "off":
        pytest.skip(f"no cuda: {why}")
    return which


def opened(dtype: str, workspace: dict[str, int]) -> Iterator[Any]:
    """The CUDA backend itself, with products of `dtype`."""
    if require() == "simulation":
        simulation.load().simulation_forgive()  # what another test has left
    from llmc import ops

    backend = ops.load("cuda", dtype=dtype)
    backend.reserve(**workspace)
    yield backend


def configured(dtype: str, workspace: dict[str, int]) -> Iterator[Adapter]:
    """The same for tests that pass NumPy arrays."""
    for backend in opened(dtype, workspace):
        yield Adapter(backend, mode()[0] == "simulation")


# ---- the adapter -----------------------------------------------------------------------------------


class Adapter:
    """The backend's functions; ops take NumPy arrays (and the device's own, as they are), and are done on return."""

    def __init__(self, backend: Any, simulated: bool) -> None:
        self._backend, self.simulated = backend, simulated
        self.bf16 = backend.info()["storage"] == "bfloat16"

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._backend, name)
        if name not in guard.OUTPUTS:
            return function
        return functools.wraps(function)(functools.partial(self._call, name, function))

    def _call(self, op: str, function: Callable[..., None], *values: Any, **named: Any) -> None:
        from llmc._cuda import device

        arguments = {**dict(zip(guard.names(op), values, strict=False)), **named}
        surplus = values[len(guard.names(op)) :]
        arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
        converted = {name for name in arrays if self.bf16 and stored(op, name, arguments)}
        passed = dict(arguments)
        copies: list[_Copy] = []
        for bf16 in (False, True):
            these = {name: value for name, value in arrays.items() if (name in converted) == bf16}
            if self.simulated and not bf16:
                passed.update({name: _over(value) for name, value in these.items()})
            else:
                for members in _sharing(these):
                    copies.append(_Copy(members, bf16, self.simulated))
                    passed.update(copies[-1].arrays)
        positional = [passed[name] for name in guard.names(op)[: len(values)]]
        function(*positional, *surplus, **{name: passed[name] for name in named})
        device.synchronize()
        for copy in copies:
            copy.back(op)


def _over(array: Array) -> Any:
    """The simulated device's array that is a host's."""
    from llmc._cuda import device

    memory = device.Memory.__new__(device.Memory)
    memory._allocation, memory._opened, memory.known = None, device.handle(), {}
    memory.ptr, memory.nbytes = array.ctypes.data, array.nbytes
    return device.DeviceArray(memory, array)


def _extent(array: Array) -> tuple[int, int]:
    if array.size == 0:
        return array.ctypes.data, array.ctypes.data
    spans = [(size - 1) * step for size, step in zip(array.shape, array.strides, strict=True)]
    low = array.ctypes.data + sum(span for span in spans if span < 0)
    return low, array.ctypes.data + sum(span for span in spans if span > 0) + array.itemsize


def _sharing(arrays: dict[str, Array]) -> list[dict[str, Array]]:
    """Groups of arrays whose memory overlaps; each array is in one group."""
    groups: list[dict[str, Array]] = []
    end = -1
    for name in sorted(arrays, key=lambda name: _extent(arrays[name])):
        start, stop = _extent(arrays[name])
        if groups and start < end:
            groups[-1][name] = arrays[name]
        else:
            groups.append({name: arrays[name]})
        end = max(end, stop)
    return groups


class _Copy:
    """Memory of the device for arrays that share memory of the host."""

    def __init__(self, members: dict[str, Array], bf16: bool, simulated: bool) -> None:
        from llmc._cuda import device

        self._members, self._bf16 = members, bf16
        self.start = min(_extent(array)[0] for array in members.values())
        stop = max(_extent(array)[1] for array in members.values())
        # Of the host, byte for byte.  Only bytes that belong to one of the arrays are touched.
        self._host = np.empty(stop - self.start, np.uint8)
        for array in members.values():
            self._view(self._host, array)[...] = array
        values = self._convert(self._host)
        # At the end of the allocation, whose length is a multiple of what it is aligned to, when the host's is at the
        # end of a page.
        margin = 0 if simulated else MARGIN
        room = -(-max(values.nbytes, 1) // 16) * 16
        slack = room - values.nbytes if stop % 4096 == 0 else 0
        self._begin = margin + slack
        self._whole = device.empty((2 * margin + room,), "uint8")
        filled = np.full(2 * margin + room, FILL, np.uint8)
        filled[self._begin : self._begin + values.nbytes] = values
        self._whole[...] = self._before = filled
        base = self._whole.ptr + self._begin
        self.arrays = {name: self._device_view(device, base, array) for name, array in members.items()}

    def _view(self, whole: Array, array: Array) -> Array:
        """The part of a copy of the host's bytes that is `array`."""
        at = array.ctypes.data - self.start
        if array.size == 0:
            return np.empty_like(array)
        return np.ndarray(array.shape, array.dtype, whole.data, at, array.strides)

    def _convert(self, host: Array) -> Array:
        """The device's bytes for the host's."""
        if not self._bf16:
            return host
        with np.errstate(over="ignore", invalid="ignore"):
            return host.view(np.float32).astype(BF16).view(np.uint8)

    def _device_view(self, device: Any, base: int, array: Array) -> Any:
        at = array.ctypes.data - self.start if array.size else 0
        kind, strides = array.dtype, array.strides
        if self._bf16:
            at, kind, strides = at // 2, BF16, tuple(step // 2 for step in strides)
        geometry = np.asarray(_Geometry(base + at, array.shape, kind.itemsize, strides)).view(kind)
        geometry.flags.writeable = array.flags.writeable
        return device.DeviceArray(self._whole._memory, geometry)

    def back(self, op: str) -> None:
        """Copy what the op has written to the host; it must have written nothing else."""
        found = np.asarray(self._whole)
        inside = np.zeros(len(found), bool)
        values = found[self._begin : self._begin + len(self._convert(self._host))]
        for name, array in self._members.items():
            if name not in guard.OUTPUTS[op]:
                continue
            host = values.view(BF16).astype(np.float32).view(np.uint8) if self._bf16 else values
            array[...] = self._view(np.ascontiguousarray(host), array)
            mask = np.zeros(len(self._host), bool)
            self._view(mask.view(np.uint8), array).view(np.uint8)[...] = 1
            written = mask.reshape(-1, 4)[:, :2].reshape(-1) if self._bf16 else mask
            inside[self._begin : self._begin + len(values)] |= written
        same = (found == self._before) | inside
        assert same.all(), f"{op} wrote outside its outputs, near {', '.join(self._members)}"


class _Geometry:
    def __init__(self, ptr: int, shape: tuple[int, ...], itemsize: int, strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{itemsize}", "shape": shape, "strides": strides, "data": (ptr, False),
        }  # fmt: skip
