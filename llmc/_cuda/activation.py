"""GELU, gates, the residual sum, zero and copies; see `activation.cu`."""

from __future__ import annotations

from llmc._cuda import check
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import aligned, blocks, elements, rows_aligned

WARP, THREADS = 32, 256
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


class _Gate:
    """A kernel over rows of gate and up, and its twin for rows that do not begin at multiples of 16 bytes."""

    def __init__(self, name: str, arrays: int) -> None:
        signature = "P" * arrays + "ii"
        self.packed = Kernel("activation", name, signature)
        self.any = Kernel("activation", f"{name}_any", signature)

    def __call__(self, M: int, F: int, *arrays: DeviceArray) -> None:
        wide = rows_aligned(F, *arrays)
        packs = F // elements() if wide else F
        if not packs:
            return
        each = blocks(packs, THREADS * LOADS)  # blocks of a row, all of one size
        threads = blocks(blocks(packs, each * LOADS), WARP) * WARP
        (self.packed if wide else self.any)(M * each, threads, *arrays, F, each)


_gelu_forward = _Map("gelu_forward", 2)
_gelu_backward = _Map("gelu_backward", 3)
_residual_forward = _Map("residual_forward", 3)
_narrow = _Map("narrow", 2)
_widen = _Map("widen", 2)
_swiglu_forward, _swiglu_backward = _Gate("swiglu_forward", 2), _Gate("swiglu_backward", 3)
_geglu_forward, _geglu_backward = _Gate("geglu_forward", 2), _Gate("geglu_backward", 3)


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


def swiglu_forward(out: DeviceArray, x: DeviceArray) -> None:
    _swiglu_forward(*_check_gate("out", out, x), out, x)


def swiglu_backward(dx: DeviceArray, dout: DeviceArray, x: DeviceArray) -> None:
    M, F = _check_gate("dout", dout, x)
    check.expect("dx", check.cube("dx", dx).shape, x.shape)
    _swiglu_backward(M, F, dx, dout, x)


def geglu_forward(out: DeviceArray, x: DeviceArray) -> None:
    _geglu_forward(*_check_gate("out", out, x), out, x)


def geglu_backward(dx: DeviceArray, dout: DeviceArray, x: DeviceArray) -> None:
    M, F = _check_gate("dout", dout, x)
    check.expect("dx", check.cube("dx", dx).shape, x.shape)
    _geglu_backward(M, F, dx, dout, x)


def _check_gate(name: str, out: DeviceArray, x: DeviceArray) -> tuple[int, int]:
    """The number of rows, and F."""
    B, T, F = check.cube(name, out).shape
    check.expect("x", check.cube("x", x).shape, (B, T, 2 * F))
    return B * T, F
