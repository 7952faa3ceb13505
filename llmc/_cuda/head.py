"""The head: logits, softmax, cross-entropy and their backward, a chunk of tokens at a time; see `head.cu`.

The logits of a chunk are computed once and turned into their own gradient in place, so a training step pays for three
products with wte and holds CHUNK x Vp of them.  All Vp columns are computed, padding too: rows of whole 16 bytes are
what fast products want.
"""

from __future__ import annotations

import math

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
CAPPED_CLASSIFIER = Kernel("head", "capped_classifier", "PPPiiffi")
CAPPED_CLASSIFIER_ANY = Kernel("head", "capped_classifier_any", "PPPiiffi")
CAP = Kernel("head", "cap_logits", "PPqf")
ROUND = Kernel("head", "round_sums", "PPqi")
SUM = Kernel("head", "sum_losses", "PPqdi")


def _scratch(tokens: int, rows: int, channels: int) -> tuple[int, int]:
    """Bytes of a chunk of logits, with room for one token's in float32, and, if there are several and dw is narrow, of
    dw in float32: it is rounded once."""
    itemsize = device.storage.itemsize
    logits = blocks(max(min(tokens, CHUNK) * itemsize, 4) * rows, 256) * 256
    return logits, rows * channels * 4 if tokens > CHUNK and itemsize < 4 else 0


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    return sum(_scratch(tokens, vocab_size, channels))


def classify(
    logits: Pointer, losses: Pointer, targets: Pointer, tokens: int, V: int, rows: int, scale: float, softcap: float,
    train: bool,
) -> None:  # fmt: skip
    """Losses of some tokens from their products (tokens,rows) with w, which become their own gradient if `train`."""
    if softcap:
        kernel = CAPPED_CLASSIFIER_ANY if rows % elements() else CAPPED_CLASSIFIER
        kernel(tokens, THREADS, logits, losses, targets, V, rows, scale, softcap, train)
        return
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
    targets: DeviceArray, V: int, scale: float, softcap: float, accumulate: bool,
) -> None:  # fmt: skip
    (B, T, C), rows = check.cube("x", x).shape, check.matrix("w", w).shape[0]
    check.expect("losses", check.matrix("losses", losses, "float32").shape, (B, T))
    check.expect("w", w.shape, (rows, C))
    _check_vocabulary(V, rows)
    _check_cap(softcap)
    check.expect("targets", check.ids("targets", targets, V).shape, (B, T))
    if dx is not None:
        check.expect("dx", check.cube("dx", dx).shape, (B, T, C))
    if dw is not None:
        if dx is None:
            raise ValueError("dw: must be None where dx is")
        check.expect("dw", check.matrix("dw", dw).shape, (rows, C))
    M, itemsize = B * T, x.itemsize
    sizes = _scratch(M, rows, C if dw is not None else 0)
    logits = device.workspace(sum(sizes))
    sums = logits + sizes[0] if sizes[1] else None
    for start in range(0, M, CHUNK) or (0,):  # with no tokens at all dw is still to be zeroed
        n, skipped = min(CHUNK, M - start), start * C * itemsize
        gemm(logits, x.ptr + skipped, w, n, rows, C, tb=True)
        classify(logits, losses.ptr + start * 4, targets.ptr + start * 4, n, V, rows, scale, softcap, dx is not None)
        if dx is None:
            continue
        if dw is None:
            pass
        elif sums is None:
            gemm(dw, logits, x.ptr + skipped, rows, C, n, ta=True, beta=int(accumulate or start > 0))
        else:
            gemm(sums, logits, x.ptr + skipped, rows, C, n, ta=True, beta=int(start > 0), single=True)
        gemm(dx.ptr + skipped, logits, w, n, C, rows)
    if sums is not None and dw is not None:
        ROUND(blocks(dw.size, 256 * elements()), 256, dw, sums, dw.size, bool(accumulate))


def head_logits(logits: DeviceArray, x: DeviceArray, w: DeviceArray, V: int, softcap: float) -> None:
    (B, T, C), rows = check.cube("x", x).shape, check.matrix("w", w).shape[0]
    check.expect("w", w.shape, (rows, C))
    _check_vocabulary(V, rows)
    _check_cap(softcap)
    check.expect("logits", check.cube("logits", logits).shape, (B, T, V))
    M, itemsize = B * T, x.itemsize
    if softcap and itemsize < 4:  # capped before they are rounded, a chunk at a time
        chunk = max(1, min(M, CHUNK) * itemsize // 4)
        sums = device.workspace(4 * chunk * V)
        for start in range(0, M, chunk):
            n = min(chunk, M - start)
            gemm(sums, x.ptr + start * C * itemsize, w, n, V, C, tb=True, single=True)
            CAP(blocks(n * V, 256), 256, logits.ptr + start * V * itemsize, sums, n * V, softcap)
        return
    gemm(logits, x, w, M, V, C, tb=True)
    if softcap:
        CAP(blocks(M * V, 256), 256, logits, logits, M * V, softcap)


def _check_vocabulary(V: int, rows: int) -> None:
    if not 0 < V <= rows:
        raise ValueError(f"V: {V} is outside [1, {rows}], the rows of w")


def _check_cap(softcap: float) -> None:
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: must be positive and finite, or 0 for none, got {softcap}")


def sum_losses(total: DeviceArray, losses: DeviceArray, scale: float, accumulate: bool) -> None:
    check.expect("total", check.vector("total", total, "float64").shape, (1,))
    SUM(1, 1024, total, check.matrix("losses", losses, "float32"), losses.size, scale, bool(accumulate))
