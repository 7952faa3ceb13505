"""What the CUDA path takes, and what of it this machine has: for `llmc info`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from llmc._cuda import compiler, cublaslt, cudnn, device, gpu
from llmc.errors import LlmcError


def found() -> dict[str, str]:
    """Each part with its version, or why it is not there; a GPU that is in use, or is cuda:0, is named.  Raises
    nothing."""
    return {
        "GPU": _told(_gpu),
        "PyCUDA": _pycuda(),
        "kernel compiler": _told(lambda: compiler.find().name),
        "cuBLASLt": _told(lambda: cublaslt.library().version()),
        "attention": _attention(),
    }


def _told(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except (LlmcError, OSError) as error:
        return f"none: {' '.join(str(error).split())}"


def _gpu() -> str:
    was_open = device.is_open()
    device.open_gpu(device.handle().index if was_open else 0)
    try:
        opened = device.handle()
        major, minor = opened.capability
        free, total = device.memory()
        return (
            f"{opened.name}, compute capability {major}.{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
            f"driver for CUDA {gpu.cuda_version(opened.driver_version)}"
        )
    finally:
        if not was_open:
            device.close()


def _pycuda() -> str:
    try:
        return version("pycuda")
    except PackageNotFoundError:
        return f"not installed: {gpu.INSTALL}"


def _attention() -> str:
    fast = cudnn.available()
    if fast is None:
        return "own kernels; cuDNN's with nvidia-cudnn-frontend and nvidia-cudnn-cu13"
    return f"cuDNN {fast} in bf16, else own kernels"
