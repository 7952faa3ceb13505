"""Token and position embedding; see `embed.cu`."""

from __future__ import annotations

from llmc._cuda import check, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks, elements, rows_aligned

WARP = 32
THREADS = 256
BITS = 8  # of a token that a pass of the sort looks at
DIGITS, TILE, PARTS, ROWS = 1 << BITS, 512, 4, 32  # as in embed.cu

FORWARD = {name: Kernel("embed", f"embedding_forward{name}", "PPPPPiiif") for name in ("", "_any")}
WORDS = {name: Kernel("embed", f"embedding_words{name}", "PPPPPiiif") for name in ("", "_any")}
SUM_ROWS = {name: Kernel("embed", f"embedding_rows{name}", "PPPPiif") for name in ("", "_any")}
POSITIONS = {name: Kernel("embed", f"embedding_positions{name}", "PPiiiii") for name in ("", "_any")}
COUNTS = Kernel("embed", "digit_counts", "PPPii")
OFFSETS = Kernel("embed", "digit_offsets", "Pi")
SCATTER = Kernel("embed", "digit_scatter", "PPPPii")
COMBINE = Kernel("embed", "embedding_combine", "PPPiif")


def _scratch(tokens: int, channels: int) -> list[int]:
    """Bytes of the two buffers of sorted pairs, of the digits' counts and of the parts of sums."""
    sizes = [8 * tokens, 8 * tokens, 4 * DIGITS * blocks(tokens, TILE), 8 * channels * blocks(tokens, ROWS)]
    return [blocks(size, 256) * 256 for size in sizes]


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    return sum(_scratch(tokens, channels))


def embedding_forward(
    out: DeviceArray, tokens: DeviceArray, positions: DeviceArray, wte: DeviceArray, wpe: DeviceArray | None, V: int,
    scale: float,
) -> None:  # fmt: skip
    (B, T), (rows, C) = check.ids("tokens", tokens, V).shape, check.matrix("wte", wte).shape
    check.expect("out", check.cube("out", out).shape, (B, T, C))
    if not 0 <= V <= rows:
        raise ValueError(f"V: {V} is outside [0, {rows}], the rows of wte")
    if wpe is None:
        check.expect("positions", check.vector("positions", positions, "int32").shape, (B,))
    else:
        room = check.matrix("wpe", wpe).shape[0]
        check.expect("wpe", wpe.shape, (room, C))
        check.places("positions", positions, B, T, room, "rows of wpe")
    warps = THREADS // WARP
    forward = (WORDS if wpe is None else FORWARD)["" if rows_aligned(C, out, wte, wpe) else "_any"]
    forward(blocks(B * T, warps), (WARP, warps), out, tokens, positions, wte, wpe, B * T, T, C, scale)


def embedding_backward(
    dwte: DeviceArray, dwpe: DeviceArray | None, dout: DeviceArray, tokens: DeviceArray, scale: float, accumulate: bool
) -> None:
    rows, C = check.matrix("dwte", dwte).shape
    B, T = check.ids("tokens", tokens, rows).shape
    check.expect("dout", check.cube("dout", dout).shape, (B, T, C))
    if dwpe is not None:
        places = check.matrix("dwpe", dwpe).shape[0]
        check.expect("dwpe", dwpe.shape, (places, C))
        if places < T:
            raise ValueError(f"dwpe: {places} rows for {T} tokens")
    n = B * T
    sizes = _scratch(n, C)
    pairs = device.workspace(sum(sizes))
    spare, counts, partial = (pairs + sum(sizes[:i]) for i in (1, 2, 3))
    kind, width = ("", elements()) if rows_aligned(C, dwte, dwpe, dout) else ("_any", 1)

    tiles, source = blocks(n, TILE), None
    for shift in range(0, max(1, (rows - 1).bit_length()), BITS):
        COUNTS(tiles, DIGITS, counts, tokens, source, n, shift)
        OFFSETS(min(1, tiles), (DIGITS, PARTS), counts, tiles)
        SCATTER(tiles, DIGITS, pairs, counts, tokens, source, n, shift)
        source, pairs, spare = pairs, spare, pairs
    threads = min(THREADS, max(1, blocks(C, width * WARP)) * WARP)
    SUM_ROWS[kind](blocks(n, ROWS), threads, dwte, partial, dout, source, n, C, scale)
    COMBINE(blocks(n, ROWS) - 1 if n else 0, threads, dwte, partial, source, n, C, scale)
    if dwpe is not None:
        warps = THREADS // WARP
        grid = blocks(dwpe.shape[0], warps), blocks(C, width * WARP)
        POSITIONS[kind](grid, (WARP, warps), dwpe, dout, B, T, dwpe.shape[0], C, bool(accumulate))
