"""LayerNorm and RMSNorm; see `norm.cu` and `rmsnorm.cu`."""

from __future__ import annotations

from llmc._cuda import check, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks, elements, rows_aligned

WARP = 32
HELD = 3  # packs of a row in each thread's registers, as in norm.cuh
MOST_THREADS, MOST_RMS_THREADS = 192, 384  # of a block of the kernels that hold rows, as in norm.cu and rmsnorm.cu
THREADS = 128  # of a block, if a row takes fewer
CHUNK_ROWS = 8  # the fewest rows whose sums are worth a partial pair of their own
CHUNKS_PER_MULTIPROCESSOR = 3  # as many as run at a time: what registers leave room for

FORWARD = Kernel("norm", "layernorm_forward", "PPPPPPiif")
RESIDUAL = Kernel("norm", "residual_layernorm_forward", "PPPPPPPPiif")
FORWARD_ANY = Kernel("norm", "layernorm_forward_any", "PPPPPPPPiif")
BACKWARD = Kernel("norm", "layernorm_backward", "PPPPPPPiii")
BACKWARD_INPUT = Kernel("norm", "layernorm_backward_input", "PPPPPPiii")
BACKWARD_ANY = Kernel("norm", "layernorm_backward_any", "PPPPPPii")
COLUMNS_ANY = Kernel("norm", "layernorm_columns_any", "PPPPPiii")
COMBINE = Kernel("norm", "layernorm_combine", "PPPiii")
RMS_FORWARD = Kernel("rmsnorm", "rmsnorm_forward", "PPPPiiff")
RMS_RESIDUAL = Kernel("rmsnorm", "residual_rmsnorm_forward", "PPPPPPiiff")
RMS_FORWARD_ANY = Kernel("rmsnorm", "rmsnorm_forward_any", "PPPPPPiiff")
RMS_BACKWARD = Kernel("rmsnorm", "rmsnorm_backward", "PPPPPPiifi")
RMS_BACKWARD_INPUT = Kernel("rmsnorm", "rmsnorm_backward_input", "PPPPPiifi")
RMS_BACKWARD_ANY = Kernel("rmsnorm", "rmsnorm_backward_any", "PPPPPiif")
RMS_COLUMNS_ANY = Kernel("rmsnorm", "rmsnorm_columns_any", "PPPPiii")
RMS_COMBINE = Kernel("rmsnorm", "rmsnorm_combine", "PPiii")


def _chunks(M: int) -> tuple[int, int]:
    """How many chunks M rows are cut into for their sums, and how many rows each has."""
    rows = max(CHUNK_ROWS, blocks(M, CHUNKS_PER_MULTIPROCESSOR * device.multiprocessors()))
    return blocks(M, rows), rows


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    """The pairs of dw and db of every chunk, in float32."""
    most = min(blocks(tokens, CHUNK_ROWS), CHUNKS_PER_MULTIPROCESSOR * device.multiprocessors())
    return most * 2 * channels * 4


def _block(C: int, *arrays: DeviceArray | None, most: int = MOST_THREADS) -> tuple[int, int] | None:
    """Threads of a row and rows of a block of at most `most` threads, for the kernels that hold rows; None if they
    cannot."""
    if not rows_aligned(C, *arrays):
        return None
    threads = max(1, blocks(C // elements(), HELD * WARP)) * WARP
    return (threads, max(1, THREADS // threads)) if threads <= most else None


def layernorm_forward(
    out: DeviceArray, mean: DeviceArray, rstd: DeviceArray, x: DeviceArray, w: DeviceArray, b: DeviceArray, eps: float
) -> None:
    M, C = _check_forward(out, mean, rstd, x, w, b)
    if block := _block(C, out, x, w, b):
        FORWARD(blocks(M, block[1]), block, out, mean, rstd, x, w, b, M, C, eps)
    else:
        block = WARP, THREADS // WARP
        FORWARD_ANY(blocks(M, block[1]), block, None, out, mean, rstd, x, None, w, b, M, C, eps)


def residual_layernorm_forward(
    total: DeviceArray, out: DeviceArray, mean: DeviceArray, rstd: DeviceArray, x: DeviceArray, branch: DeviceArray,
    w: DeviceArray, b: DeviceArray, eps: float,
) -> None:  # fmt: skip
    M, C = _check_forward(out, mean, rstd, x, w, b)
    check.expect("total", check.cube("total", total).shape, x.shape)
    check.expect("branch", check.cube("branch", branch).shape, x.shape)
    if block := _block(C, total, out, x, branch, w, b):
        RESIDUAL(blocks(M, block[1]), block, total, out, mean, rstd, x, branch, w, b, M, C, eps)
    else:
        block = WARP, THREADS // WARP
        FORWARD_ANY(blocks(M, block[1]), block, total, out, mean, rstd, x, branch, w, b, M, C, eps)


def _check_forward(
    out: DeviceArray, mean: DeviceArray, rstd: DeviceArray, x: DeviceArray, w: DeviceArray, b: DeviceArray
) -> tuple[int, int]:
    """The number of rows and their width."""
    B, T, C = check.cube("x", x).shape
    check.expect("out", check.cube("out", out).shape, (B, T, C))
    check.expect("mean", check.matrix("mean", mean, "float32").shape, (B, T))
    check.expect("rstd", check.matrix("rstd", rstd, "float32").shape, (B, T))
    check.expect("w", check.vector("w", w).shape, (C,))
    check.expect("b", check.vector("b", b).shape, (C,))
    return B * T, C


def layernorm_backward(
    dx: DeviceArray, dw: DeviceArray | None, db: DeviceArray | None, dout: DeviceArray, x: DeviceArray,
    mean: DeviceArray, rstd: DeviceArray, w: DeviceArray, accumulate: bool,
) -> None:  # fmt: skip
    B, T, C = check.cube("x", x).shape
    M = B * T
    for name, array in (("dx", dx), ("dout", dout)):
        check.expect(name, check.cube(name, array).shape, (B, T, C))
    for name, array in (("mean", mean), ("rstd", rstd)):
        check.expect(name, check.matrix(name, array, "float32").shape, (B, T))
    check.expect("w", check.vector("w", w).shape, (C,))
    if (dw is None) != (db is None):
        raise ValueError("dw, db: either both are arrays or both are None")
    block = _block(C, dx, dout, x, w)
    if dw is None or db is None:
        if block:
            BACKWARD_INPUT(blocks(M, block[1]), block, dx, dout, x, mean, rstd, w, M, C, block[1])
        else:
            BACKWARD_ANY(blocks(M, THREADS // WARP), (WARP, THREADS // WARP), dx, dout, x, mean, rstd, w, M, C)
        return
    for name, array in (("dw", dw), ("db", db)):
        check.expect(name, check.vector(name, array).shape, (C,))
    chunks, rows = _chunks(M)
    partial = device.workspace(chunks * 2 * C * 4)
    if block:
        shared = 2 * C * 4 if block[1] > 1 else 0
        BACKWARD(chunks, block, dx, partial, dout, x, mean, rstd, w, M, C, rows, shared=shared)
    else:
        COLUMNS_ANY((blocks(C, THREADS), chunks), THREADS, partial, dout, x, mean, rstd, M, C, rows)
        BACKWARD_ANY(blocks(M, THREADS // WARP), (WARP, THREADS // WARP), dx, dout, x, mean, rstd, w, M, C)
    COMBINE(blocks(2 * C, WARP), (WARP, WARP), dw, db, partial, chunks, C, bool(accumulate))


# ---- RMSNorm ---------------------------------------------------------------------------------------


def rmsnorm_forward(
    out: DeviceArray, rstd: DeviceArray, x: DeviceArray, w: DeviceArray, eps: float, offset: float
) -> None:
    M, C = _check_rms(out, rstd, x, w)
    if block := _block(C, out, x, w, most=MOST_RMS_THREADS):
        RMS_FORWARD(blocks(M, block[1]), block, out, rstd, x, w, M, C, eps, offset)
    else:
        block = WARP, THREADS // WARP
        RMS_FORWARD_ANY(blocks(M, block[1]), block, None, out, rstd, x, None, w, M, C, eps, offset)


def residual_rmsnorm_forward(
    total: DeviceArray, out: DeviceArray, rstd: DeviceArray, x: DeviceArray, branch: DeviceArray, w: DeviceArray,
    eps: float, offset: float,
) -> None:  # fmt: skip
    M, C = _check_rms(out, rstd, x, w)
    check.expect("total", check.cube("total", total).shape, x.shape)
    check.expect("branch", check.cube("branch", branch).shape, x.shape)
    if block := _block(C, total, out, x, branch, w, most=MOST_RMS_THREADS):
        RMS_RESIDUAL(blocks(M, block[1]), block, total, out, rstd, x, branch, w, M, C, eps, offset)
    else:
        block = WARP, THREADS // WARP
        RMS_FORWARD_ANY(blocks(M, block[1]), block, total, out, rstd, x, branch, w, M, C, eps, offset)


def _check_rms(
    out: DeviceArray, rstd: DeviceArray, x: DeviceArray, w: DeviceArray, name: str = "out"
) -> tuple[int, int]:
    """The number of rows and their width; `name` is out's."""
    B, T, C = check.cube("x", x).shape
    check.expect(name, check.cube(name, out).shape, (B, T, C))
    check.expect("rstd", check.matrix("rstd", rstd, "float32").shape, (B, T))
    check.expect("w", check.vector("w", w).shape, (C,))
    return B * T, C


def rmsnorm_backward(
    dx: DeviceArray, dw: DeviceArray | None, dout: DeviceArray, x: DeviceArray, rstd: DeviceArray, w: DeviceArray,
    offset: float, accumulate: bool,
) -> None:  # fmt: skip
    M, C = _check_rms(dout, rstd, x, w, "dout")
    check.expect("dx", check.cube("dx", dx).shape, x.shape)
    block, apart = _block(C, dx, dout, x, w, most=MOST_RMS_THREADS), (WARP, THREADS // WARP)
    if dw is None:
        if block:
            RMS_BACKWARD_INPUT(blocks(M, block[1]), block, dx, dout, x, rstd, w, M, C, offset, block[1])
        else:
            RMS_BACKWARD_ANY(blocks(M, apart[1]), apart, dx, dout, x, rstd, w, M, C, offset)
        return
    check.expect("dw", check.vector("dw", dw).shape, (C,))
    chunks, rows = _chunks(M)
    partial = device.workspace(chunks * C * 4)
    if block:
        shared = C * 4 if block[1] > 1 else 0
        RMS_BACKWARD(chunks, block, dx, partial, dout, x, rstd, w, M, C, offset, rows, shared=shared)
    else:
        RMS_COLUMNS_ANY((blocks(C, THREADS), chunks), THREADS, partial, dout, x, rstd, M, C, rows)
        RMS_BACKWARD_ANY(blocks(M, apart[1]), apart, dx, dout, x, rstd, w, M, C, offset)
    RMS_COMBINE(blocks(C, WARP), (WARP, WARP), dw, partial, chunks, C, bool(accumulate))
