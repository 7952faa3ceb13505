"""LayerNorm; see `norm.cu`."""

from __future__ import annotations

from llmc._cuda import check, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks, elements, rows_aligned

WARP = 32
HELD = 3  # packs of a row in each thread's registers, as in norm.cu
MOST_THREADS = 192  # of a block of the kernels that hold rows, as in norm.cu
THREADS = 128  # of a block, if a row takes fewer
CHUNK_ROWS = 8  # the fewest rows whose sums are worth a partial pair of their own
CHUNKS_PER_MULTIPROCESSOR = 3  # as many as run at a time: what registers leave room for

FORWARD = Kernel("norm", "layernorm_forward", "PPPPPPiif")
RESIDUAL = Kernel("norm", "residual_layernorm_forward", "PPPPPPPPiif")
FORWARD_ANY = Kernel("norm", "layernorm_forward_any", "PPPPPPPPiif")
BACKWARD = Kernel("norm", "layernorm_backward", "PPPPPPPiii")
BACKWARD_ANY = Kernel("norm", "layernorm_backward_any", "PPPPPPii")
COLUMNS_ANY = Kernel("norm", "layernorm_columns_any", "PPPPPiii")
COMBINE = Kernel("norm", "layernorm_combine", "PPPiii")


def _chunks(M: int) -> tuple[int, int]:
    """How many chunks M rows are cut into for their sums, and how many rows each has."""
    rows = max(CHUNK_ROWS, blocks(M, CHUNKS_PER_MULTIPROCESSOR * device.multiprocessors()))
    return blocks(M, rows), rows


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int) -> int:
    """The pairs of dw and db of every chunk, in float32."""
    most = min(blocks(tokens, CHUNK_ROWS), CHUNKS_PER_MULTIPROCESSOR * device.multiprocessors())
    return most * 2 * channels * 4


def _block(C: int, *arrays: DeviceArray | None) -> tuple[int, int] | None:
    """Threads of a row and rows of a block for the kernels that hold rows; None if they cannot."""
    if not rows_aligned(C, *arrays):
        return None
    threads = max(1, blocks(C // elements(), HELD * WARP)) * WARP
    return (threads, max(1, THREADS // threads)) if threads <= MOST_THREADS else None


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
    dx: DeviceArray, dw: DeviceArray, db: DeviceArray, dout: DeviceArray, x: DeviceArray, mean: DeviceArray,
    rstd: DeviceArray, w: DeviceArray, accumulate: bool,
) -> None:  # fmt: skip
    B, T, C = check.cube("x", x).shape
    M = B * T
    for name, array in (("dx", dx), ("dout", dout)):
        check.expect(name, check.cube(name, array).shape, (B, T, C))
    for name, array in (("mean", mean), ("rstd", rstd)):
        check.expect(name, check.matrix(name, array, "float32").shape, (B, T))
    for name, array in (("w", w), ("dw", dw), ("db", db)):
        check.expect(name, check.vector(name, array).shape, (C,))
    chunks, rows = _chunks(M)
    partial = device.workspace(chunks * 2 * C * 4)
    if block := _block(C, dx, dout, x, w):
        shared = 2 * C * 4 if block[1] > 1 else 0
        BACKWARD(chunks, block, dx, partial, dout, x, mean, rstd, w, M, C, rows, shared=shared)
    else:
        COLUMNS_ANY((blocks(C, THREADS), chunks), THREADS, partial, dout, x, mean, rstd, M, C, rows)
        BACKWARD_ANY(blocks(M, THREADS // WARP), (WARP, THREADS // WARP), dx, dout, x, mean, rstd, w, M, C)
    COMBINE(blocks(2 * C, WARP), (WARP, WARP), dw, db, partial, chunks, C, bool(accumulate))
