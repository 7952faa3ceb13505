"""GELU, the residual sum, zero and copies; see `activation.cu`."""

from __future__ import annotations

from llmc._cuda import check
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import aligned, blocks, elements

THREADS = 256
LOADS = 2  # packs that a thread reads at once, as in activation.cu


class _Map:
    """A kernel over vectors of one length, and its twin for addresses that are not multiples of 16 bytes."""

    def __init__(self, name: str, arrays: int) -> None:
        signature = "P" * arrays + "q"
        self.packed = Kernel("activation", name, signature)
        self.any = Kernel("activation", f"{name}_any", signature)

    def __call__(self, *arrays: DeviceArray) -> None:
        n = arrays[0].size
        if aligned(*arrays):
            self.packed(blocks(n, THREADS * LOADS * elements()), THREADS, *arrays, n)
        else:
            self.any(blocks(n, THREADS * LOADS), THREADS, *arrays, n)


_gelu_forward = _Map("gelu_forward", 2)
_gelu_backward = _Map("gelu_backward", 3)
_residual_forward = _Map("residual_forward", 3)
_narrow = _Map("narrow", 2)
_widen = _Map("widen", 2)


def zero(x: DeviceArray) -> None:
    check.numbers("x", x)[...] = 0


def copy(out: DeviceArray, x: DeviceArray) -> None:
    check.expect("out", check.numbers("out", out).shape, check.numbers("x", x).shape)
    if out.dtype == x.dtype:
        out[...] = x
    elif x.dtype == "float32":
        _narrow(out, x)
    else:
        _widen(out, x)


def gelu_forward(out: DeviceArray, x: DeviceArray) -> None:
    check.expect("out", check.flat("out", out).shape, check.flat("x", x).shape)
    _gelu_forward(out, x)


def gelu_backward(dx: DeviceArray, dout: DeviceArray, x: DeviceArray) -> None:
    check.expect("dx", check.flat("dx", dx).shape, check.flat("x", x).shape)
    check.expect("dout", check.flat("dout", dout).shape, x.shape)
    _gelu_backward(dx, x, dout)


def residual_forward(out: DeviceArray, x: DeviceArray, branch: DeviceArray) -> None:
    check.expect("out", check.flat("out", out).shape, check.flat("x", x).shape)
    check.expect("branch", check.flat("branch", branch).shape, x.shape)
    _residual_forward(out, x, branch)
