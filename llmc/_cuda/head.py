"""The head: logits, softmax, cross-entropy and their backward, a chunk of tokens at a time; see `head.cu`.

The logits of a chunk are computed once and turned into their own gradient in place, so a training step pays for three
products with wte and holds CHUNK x Vp of them.  All Vp columns are computed, padding too: rows of whole 16 bytes are
what fast products want.
"""

from __future__ import annotations

from llmc._cuda import check, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.linear import Pointer, gemm
from llmc._cuda.packs import NBYTES, blocks, elements

CHUNK = 4096  # tokens whose logits exist at a time
THREADS = 512  # of a row of logits, as in head.cu

BESIDE = 2048  # bytes of shared memory that a block takes beside its row: the kernel's own, and the system's

CLASSIFIER_HELD = Kernel("head", "classifier_held", "PPPiifi")
CLASSIFIER = Kernel("head", "classifier", "PPPiifi")
CLASSIFIER_ANY = Kernel("head", "classifier_any", "PPPiifi")
ROUND = Kernel("head", "round_sums", "PPqi")
SUM = Kernel("head", "sum_losses", "PPqdi")


def _scratch(tokens: int, rows: int, channels: int) -> tuple[int, int]:
    """Bytes of a chunk of logits and, if there are several and dw is narrow, of dw in float32: it is rounded once."""
    itemsize = device.storage.itemsize
    logits = blocks(min(tokens, CHUNK) * rows * itemsize, 256) * 256
    return logits, rows * channels * 4 if tokens > CHUNK and itemsize < 4 else 0


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int) -> int:
    return sum(_scratch(tokens, vocab_size, channels))


def classify(
    logits: Pointer, losses: Pointer, targets: Pointer, tokens: int, V: int, rows: int, scale: float, train: bool
) -> None:  # fmt: skip
    """Losses of some tokens from their logits (tokens,rows), which become their own gradient if `train`."""
    args = (logits, losses, targets, V, rows, scale, train)
    if rows % elements():
        CLASSIFIER_ANY(tokens, THREADS, *args)
        return
    held = blocks(V, elements()) * NBYTES
    if 2 * (held + BESIDE) <= device.shared_limit():  # two blocks at a time, so that one computes while one reads
        CLASSIFIER_HELD(tokens, THREADS, *args, shared=held)
    else:
        CLASSIFIER(tokens, THREADS, *args)


def head_loss(
    losses: DeviceArray, dx: DeviceArray | None, dw: DeviceArray | None, x: DeviceArray, w: DeviceArray,
    targets: DeviceArray, V: int, scale: float, accumulate: bool,
) -> None:  # fmt: skip
    (B, T, C), rows = check.cube("x", x).shape, check.matrix("w", w).shape[0]
    check.expect("losses", check.matrix("losses", losses, "float32").shape, (B, T))
    check.expect("w", w.shape, (rows, C))
    _check_vocabulary(V, rows)
    check.expect("targets", check.ids("targets", targets, V).shape, (B, T))
    if (dx is None) != (dw is None):
        raise ValueError("dx, dw: either both are arrays or both are None")
    if dx is not None:
        check.expect("dx", check.cube("dx", dx).shape, (B, T, C))
        check.expect("dw", check.matrix("dw", dw).shape, (rows, C))
    M, itemsize = B * T, x.itemsize
    sizes = _scratch(M, rows, C if dx is not None else 0)
    logits = device.workspace(sum(sizes))
    sums = logits + sizes[0] if sizes[1] else None
    for start in range(0, M, CHUNK) or (0,):  # with no tokens at all dw is still to be zeroed
        n, skipped = min(CHUNK, M - start), start * C * itemsize
        gemm(logits, x.ptr + skipped, w, n, rows, C, tb=True)
        classify(logits, losses.ptr + start * 4, targets.ptr + start * 4, n, V, rows, scale, dx is not None)
        if dx is None or dw is None:
            continue
        if sums is None:
            gemm(dw, logits, x.ptr + skipped, rows, C, n, ta=True, beta=int(accumulate or start > 0))
        else:
            gemm(sums, logits, x.ptr + skipped, rows, C, n, ta=True, beta=int(start > 0), single=True)
        gemm(dx.ptr + skipped, logits, w, n, C, rows)
    if sums is not None and dw is not None:
        ROUND(blocks(dw.size, 256 * elements()), 256, dw, sums, dw.size, bool(accumulate))


def head_logits(logits: DeviceArray, x: DeviceArray, w: DeviceArray, V: int) -> None:
    (B, T, C), rows = check.cube("x", x).shape, check.matrix("w", w).shape[0]
    check.expect("w", w.shape, (rows, C))
    _check_vocabulary(V, rows)
    check.expect("logits", check.cube("logits", logits).shape, (B, T, V))
    gemm(logits, x, w, B * T, V, C, tb=True)


def _check_vocabulary(V: int, rows: int) -> None:
    if not 0 < V <= rows:
        raise ValueError(f"V: {V} is outside [1, {rows}], the rows of w")


def sum_losses(total: DeviceArray, losses: DeviceArray, scale: float, accumulate: bool) -> None:
    check.expect("total", check.vector("total", total, "float64").shape, (1,))
    SUM(1, 1024, total, check.matrix("losses", losses, "float32"), losses.size, scale, bool(accumulate))
