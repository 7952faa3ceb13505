"""What this GPU can do at this moment: the rates that ops are compared with.

A copy is the driver's own, of arrays many times as large as the L2 cache, counted once for reading and once for
writing.  A product is square, of the type and by the library in use, and large enough that the last round of its tiles
weighs little.  Both lie in memory that the caller makes once, `peak_nbytes()` of it, and are timed by events.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llmc._cuda import check, device, head, linear, philox
from llmc._cuda.device import DeviceArray

CACHES = 8  # sizes of the L2 cache that a copy's two arrays take together
TILES = 16  # of 128 x 256 results that each multiprocessor gets of a product
MOST = 1 << 14  # calls between two events


def cache_nbytes() -> int:
    """Bytes of the L2 cache."""
    opened = device.handle()
    return int(opened.gpu.get_attribute(opened.cuda.device_attribute.L2_CACHE_SIZE))


def _side() -> int:
    """Rows of a product's matrices: 8192 on an H100."""
    results = TILES * 128 * 256 * device.multiprocessors()
    return max(1, math.isqrt(results) // 256) * 256


def peak_nbytes() -> int:
    """Bytes of memory that measuring takes."""
    return max(CACHES * cache_nbytes(), 3 * _side() ** 2 * device.storage.itemsize)


def measure_copy(memory: DeviceArray, seconds: float = 0.02) -> float:
    """B/s, read and written, of a copy from one half of `memory` (uint8) to the other, over `seconds` or a little
    more."""
    half = memory.size // 512 * 256
    return _rate(lambda: _copy(memory, half), 2.0 * half, seconds)


def hold(memory: DeviceArray, seconds: float) -> None:
    """Keep the compute stream busy for about `seconds` with copies within `memory` (uint8), and come back at once: what
    is launched meanwhile runs without a gap when they are done."""
    half = memory.size // 512 * 256
    if seconds <= 0 or not half:
        return
    begin = device.stamp()
    _copy(memory, half)
    one = max(device.elapsed(begin, device.stamp()), 1e-6)
    for _ in range(min(MOST, math.ceil(seconds / one))):
        _copy(memory, half)


def measure_product(memory: DeviceArray, seconds: float = 0.02) -> float:
    """FLOP/s of a product of square matrices, over `seconds` or a little more; `memory` (uint8) is overwritten.

    Its operands are small numbers, as a model's are: a GPU slows down where every bit of them changes.
    """
    n, itemsize = _side(), device.storage.itemsize
    a, b, out = (
        memory[k * n * n * itemsize : (k + 1) * n * n * itemsize].view(device.storage).reshape(n, n) for k in range(3)
    )
    for stream, operand in enumerate((a, b)):
        philox.normal(operand, 0, stream, 0.02)
    return _rate(lambda: linear.gemm(out, a, b, n, n, n, tb=True), 2.0 * n**3, seconds)


def product(use: str, out: DeviceArray, a: DeviceArray, b: DeviceArray) -> None:
    """One of a linear layer's products, x (M,K) @ w (N,K).T, alone: "forward" out = a @ b.T, "dx" out = a @ b,
    "dw" out = a.T @ b.  ValueError for another use or shapes that do not fit."""
    kinds = {"forward": (False, True), "dx": (False, False), "dw": (True, False)}
    if use not in kinds:
        raise ValueError(f"use: {use!r} is none of {', '.join(kinds)}")
    ta, tb = kinds[use]
    for name, array in (("out", out), ("a", a), ("b", b)):
        check.matrix(name, array)
    M, K = a.shape[::-1] if ta else a.shape
    N = b.shape[0 if tb else 1]
    check.expect("b", b.shape, (N, K) if tb else (K, N))
    check.expect("out", out.shape, (M, N))
    linear.gemm(out, a, b, M, N, K, ta=ta, tb=tb)


def classifier(
    logits: DeviceArray, losses: DeviceArray, targets: DeviceArray, V: int, scale: float
) -> None:  # fmt: skip
    """The part of `head_loss` that is no product: losses (B,T), and logits (B T,Vp) become their own gradient."""
    M, rows = check.matrix("logits", logits).shape
    check.expect("losses", check.matrix("losses", losses, "float32").shape, targets.shape)
    check.expect("targets", (check.ids("targets", targets, V).size,), (M,))
    head.classify(logits, losses, targets, M, V, rows, scale, 0.0, True)


def _copy(memory: DeviceArray, half: int) -> None:
    opened = device.handle()
    opened.cuda.memcpy_dtod_async(memory.ptr + half, memory.ptr, half, opened.compute)


def _rate(call: Callable[[], None], work: float, seconds: float) -> float:
    """Work per second by the device's clock, after a call that does not count."""
    call()
    count = 1
    while True:
        begin = device.stamp()
        for _ in range(count):
            call()
        took = max(device.elapsed(begin, device.stamp()), 1e-9)
        if took >= seconds or count == MOST:
            return work * count / took
        count = min(MOST, max(2 * count, math.ceil(count * seconds / took)))
