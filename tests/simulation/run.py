"""Kernels on NumPy arrays through the simulated NVRTC and libcuda alone, without PyCUDA and llmc/_cuda."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

import simulation

KERNELS = Path(__file__).parents[2] / "llmc" / "_cuda"
ARCHITECTURE = "sm_90"


class KernelError(Exception):
    """A compiler's log, or a fault of a kernel."""


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = simulation.load()
    context, device = c_void_p(), c_int()
    driver.cuInit(0)
    driver.cuDeviceGet(byref(device), 0)
    driver.cuDevicePrimaryCtxRetain(byref(context), device)
    driver.cuCtxPushCurrent_v2(context)
    return driver


def compile(source: str, name: str = "test.cu", options: Sequence[str] = ()) -> bytes:
    """The object for one source text, which may include the headers of llmc/_cuda."""
    simulation.load()
    nvrtc = simulation._loaded[1]
    headers = {path.name: path.read_bytes() for path in sorted(KERNELS.glob("*.cuh"))}
    program = c_void_p()
    nvrtc.nvrtcCreateProgram(
        byref(program), source.encode(), name.encode(), len(headers),
        (c_char_p * len(headers))(*headers.values()), (c_char_p * len(headers))(*(n.encode() for n in headers)),
    )  # fmt: skip
    given = [f"-arch={ARCHITECTURE}", *options]
    status = nvrtc.nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*(o.encode() for o in given)))
    texts = []
    for what in ("ProgramLog", "CUBIN"):
        size = c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
        texts.append(buffer.raw)
    nvrtc.nvrtcDestroyProgram(byref(program))
    if status:
        raise KernelError(texts[0].rstrip(b"\0").decode())
    return texts[1]


class Source:
    """Compiled kernels: `Source(text).launch("name", grid, block, *arguments)`.

    Arrays are passed as they are (device memory is host memory), None as a null pointer, int as int, float as float;
    anything else as the ctypes value it is.
    """

    def __init__(self, text: str | Path, bf16: bool = False, options: Sequence[str] = ()) -> None:
        name = "test.cu"
        if isinstance(text, Path):
            name, text = f"llmc/_cuda/{text.name}", text.read_text("utf-8")
        self.image = compile(text, name, [f"-DSTORAGE_BF16={int(bf16)}", *options])
        self._module = c_void_p()
        if status := _driver().cuModuleLoadData(byref(self._module), self.image):
            raise KernelError(f"cuModuleLoadData: {status}")

    def launch(self, name: str, grid: Any, block: Any, *arguments: Any, shared: int = 0) -> None:
        """Run it to its end.  KernelError with the fault's message."""
        driver, function = _driver(), c_void_p()
        if driver.cuModuleGetFunction(byref(function), self._module, name.encode()):
            raise KernelError(f"no kernel {name}")
        values = [_value(a) for a in arguments]
        pointers = (c_void_p * len(values))(*(ctypes.cast(byref(v), c_void_p) for v in values))
        if shared:
            driver.cuFuncSetAttribute(function, 8, shared)
        sizes = [(*(n if isinstance(n, tuple) else (n,)), 1, 1)[:3] for n in (grid, block)]
        status = driver.cuLaunchKernel(
            function, *(c_uint(n) for size in sizes for n in size), c_uint(shared), None, pointers, None
        )
        status = status or driver.cuCtxSynchronize()
        if status:
            message = driver.simulation_message()
            driver.simulation_forgive()
            raise KernelError(f"{status}: {message.decode() if message else 'refused'}")


def _value(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return c_void_p(argument.ctypes.data)
    if argument is None:
        return c_void_p()
    if isinstance(argument, (bool, int, np.integer)):
        return c_int(int(argument))
    if isinstance(argument, (float, np.floating)):
        return ctypes.c_float(float(argument))
    return argument
