"""AdamW, the gradient's norm and what clipping makes of it; see `optimizer.cu`."""

from __future__ import annotations

from collections.abc import Sequence

from llmc._cuda import check, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import aligned, blocks

SUM_THREADS, SUM_CHUNK = 256, 16384  # as in optimizer.cu
SPANS, GROUP, THREADS = 64, 8, 256  # as in optimizer.cu
BLOCKS_PER_MULTIPROCESSOR = 4  # as many as run at a time: what registers leave room for

SQUARES = {name: Kernel("optimizer", f"square_sums_{name}", "PPq") for name in ("single", "stored")}
SQUARES |= {f"{name}_any": Kernel("optimizer", f"square_sums_{name}_any", "PPq") for name in ("single", "stored")}
NORM = Kernel("optimizer", "norm_of_sums", "PPi")
CLIP = Kernel("optimizer", "clip_scale", "PPPd")
# A struct of SPANS starts, stops and decays follows the scalars, and lies as its members would.
ADAMW = {
    name: Kernel("optimizer", name, "PPPPPPPdddqQii" + "q" * (2 * SPANS) + "f" * SPANS)
    for name in ("adamw_step", "adamw_step_stored")
}


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    """A float64 for every chunk of the norm's sum."""
    return 8 * blocks(parameters, SUM_CHUNK)


def global_norm(norm: DeviceArray, x: DeviceArray) -> None:
    _scalar("norm", norm)
    n = check.numbers("x", x).size
    chunks = blocks(n, SUM_CHUNK)
    partial = device.workspace(8 * chunks)
    name = "single" if x.dtype == "float32" else "stored"
    SQUARES[name if aligned(x) else f"{name}_any"](chunks, SUM_THREADS, partial, x, n)
    NORM(1, 1024, norm, partial, chunks)


def clip_scale(scale: DeviceArray, norm: DeviceArray, loss: DeviceArray, limit: float) -> None:
    for name, array in (("scale", scale), ("norm", norm), ("loss", loss)):
        _scalar(name, array)
    CLIP(1, 1, scale, norm, loss, limit)


def _scalar(name: str, a: DeviceArray, size: int = 1) -> None:
    check.expect(name, check.vector(name, a, "float64").shape, (size,))


def adamw_step(
    w: DeviceArray, m: DeviceArray, v: DeviceArray, dw: DeviceArray, copy: DeviceArray | None, hyper: DeviceArray,
    scale: DeviceArray, spans: Sequence[tuple[int, int, float]], beta1: float, beta2: float, eps: float, seed: int,
) -> None:  # fmt: skip
    (n,) = check.vector("w", w, device.storage if getattr(w, "dtype", None) == device.storage else "float32").shape
    for name, array, dtype in (("m", m, "float32"), ("v", v, "float32"), ("dw", dw, None), ("copy", copy, None)):
        if name != "copy" or array is not None:
            check.expect(name, check.vector(name, array, dtype).shape, (n,))
    _scalar("hyper", hyper, 2)
    _scalar("scale", scale)
    _check_spans(spans, n)
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: must be from 0 to 2^64 - 1, got {seed}")
    kernel = ADAMW["adamw_step" if w.dtype == "float32" else "adamw_step_stored"]
    grid = min(blocks(n, THREADS * GROUP), BLOCKS_PER_MULTIPROCESSOR * device.multiprocessors())
    wide = aligned(w, m, v, dw, copy)
    for first in range(0, len(spans), SPANS):
        some = spans[first : first + SPANS]
        table = [[span[i] for span in some] + [0] * (SPANS - len(some)) for i in range(3)]
        kernel(
            grid, THREADS, w, m, v, dw, copy, hyper, scale, beta1, beta2, eps, n, seed, len(some), wide, *table[0],
            *table[1], *table[2],
        )  # fmt: skip


def _check_spans(spans: Sequence[tuple[int, int, float]], n: int) -> None:
    end = 0
    for start, stop, _ in spans:
        if not end <= start <= stop <= n:
            raise ValueError(f"spans: ({start}, {stop}) does not follow {end} within the {n} elements")
        end = stop
