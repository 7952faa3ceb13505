"""Finding a GPU, and saying what is missing where there is none to use."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import Any

from llmc._cuda import driver
from llmc.errors import DeviceError, MissingDependencyError

OLDEST = (7, 5)  # compute capability: the least that CUDA 13 compiles for
INSTALL = "pip install pycuda nvidia-cuda-nvrtc nvidia-cublas (README, On a GPU, says what that takes)"


def import_pycuda() -> Any:
    if importlib.util.find_spec("pycuda") is None:
        raise MissingDependencyError(f"the device cuda needs PyCUDA: {INSTALL}")
    try:
        driver.load()
    except OSError as error:
        raise DeviceError(
            "the NVIDIA driver is not installed, libcuda.so.1 was not found: install driver 580 or newer, until "
            "nvidia-smi lists the GPU; a container has to be started with GPUs (docker run --gpus all)"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyCUDA's guess at why it cannot be imported
            import pycuda.driver as cuda
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"PyCUDA needs {error.name}: {INSTALL}") from error
    except ImportError as error:
        if re.search(r"undefined symbol: cu[A-Z]", str(error)):
            raise DeviceError(f"the NVIDIA driver is too old for PyCUDA ({error}); it must be 580 or newer") from error
        again = "pip install --force-reinstall --no-cache-dir --no-binary pycuda pycuda"
        raise DeviceError(f"PyCUDA cannot be loaded ({error}); build it anew: {again}") from error
    return cuda


def driver_version(cuda: Any) -> int:
    """The newest CUDA that the driver knows: 13000 is 13.0."""
    try:
        return int(cuda.get_driver_version())
    except cuda.Error as error:
        raise DeviceError(f"the NVIDIA driver does not answer: {error}") from error


def initialise(cuda: Any) -> None:
    try:
        cuda.init()
    except cuda.Error as error:
        if "no CUDA-capable device" in str(error):
            raise DeviceError(_no_gpu()) from error
        raise DeviceError(f"the NVIDIA driver cannot be initialised: {error}") from error


def _no_gpu() -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "nvidia-smi lists those that the driver sees"
    return f"there is no GPU to use: {why}"


def find(cuda: Any, index: int) -> Any:
    count = cuda.Device.count()
    if count == 0:
        raise DeviceError(_no_gpu())
    if index >= count:
        have = "cuda:0 is the only GPU" if count == 1 else f"the GPUs are cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"there is no cuda:{index}: {have}")
    found = cuda.Device(index)
    major, minor = found.compute_capability()
    if (major, minor) < OLDEST:
        raise DeviceError(
            f"cuda:{index} ({found.name()}) is of compute capability {major}.{minor}; "
            f"llmc needs {OLDEST[0]}.{OLDEST[1]} or newer"
        )
    return found


def cuda_version(number: int) -> str:
    """13000 -> 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_name(number: int) -> str:
    """580.82.07 (CUDA 13.0), or only the latter where the system does not tell."""
    try:
        found = re.search(r"\s(\d+\.[\d.]+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    cuda = f"CUDA {cuda_version(number)}"
    return f"{found[1]} ({cuda})" if found else cuda
