"""Rotary embedding; see `rope.cu`."""

from __future__ import annotations

from llmc._cuda import check
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks, elements, rows_aligned

WARP, THREADS = 32, 256

TURN = {name: Kernel("rope", f"rope{name}", "PPPiiiif") for name in ("", "_any")}


def rope_forward(qkv: DeviceArray, positions: DeviceArray, table: DeviceArray, heads: int) -> None:
    B, T, _ = _check("qkv", qkv, table, heads)
    check.places("positions", positions, B, T, table.shape[0], "rows of table")
    _turn(qkv, positions, table, heads, 1.0)


def rope_backward(dqkv: DeviceArray, table: DeviceArray, heads: int) -> None:
    T = _check("dqkv", dqkv, table, heads)[1]
    if T > table.shape[0]:
        raise ValueError(f"table: {table.shape[0]} rows for {T} tokens")
    _turn(dqkv, None, table, heads, -1.0)


def _check(name: str, qkv: DeviceArray, table: DeviceArray, heads: int) -> tuple[int, ...]:
    """The shape of qkv."""
    N, D = check.cube(name, qkv).shape[2], check.matrix("table", table, "float32").shape[1]
    if D % 2:
        raise ValueError(f"table: {D} numbers for a position are no pairs of cosine and sine")
    if not 0 <= heads * D <= N or heads < 0:
        raise ValueError(f"heads: {heads} of {D} channels do not fit into the {N} of {name}")
    return qkv.shape


def _turn(qkv: DeviceArray, positions: DeviceArray | None, table: DeviceArray, heads: int, sign: float) -> None:
    (B, T, N), D = qkv.shape, table.shape[1]
    wide = rows_aligned(N, qkv, table) and rows_aligned(D // 2)
    pairs = heads * (D // 2) // (elements() if wide else 1)
    if not pairs:
        return
    rounds = blocks(pairs, THREADS)  # of equal size, so that the last one is not a few threads' alone
    threads = blocks(blocks(pairs, rounds), WARP) * WARP
    TURN["" if wide else "_any"](B * T, threads, qkv, positions, table, T, N, heads, D, sign)
