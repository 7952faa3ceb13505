"""Causal attention: on tensor cores in bf16 (`flash.cu`), with simpler kernels otherwise (`attention.cu`), or by cuDNN
(`cudnn.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from llmc._cuda import check, cudnn, device
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc._cuda.packs import blocks
from llmc.errors import ConfigError

WIDEST = (64, 128, 256)  # channels of a head that the simple kernels are compiled for, at most
CUDNN_WIDEST = 128  # channels of a head that cuDNN's backward pass takes on every GPU
ALIGNED = 16  # bytes; what flash kernels load at a time
L2_NBYTES = 16 << 20  # keys and values worked on at a time; a smaller L2 (3 to 6 MB on sm_86) costs speed alone
DECODE_BLOCKS = 1024  # of one launch, at most, where keys are split among blocks; enough to fill a GPU
DECODE_KEYS = 128  # the fewest keys worth a block of their own
WARP, DECODE_WARPS, THREADS, SIDE = 32, 4, 64, 8  # as in attention.cu
FLASH_THREADS = 128


class Tiles(NamedTuple):
    """Rows that a block of a flash kernel owns, and rows of the tiles it walks over, as in flash.cu."""

    own: int
    other: int


class Flash:
    """The flash kernels of one head size."""

    def __init__(self, D: int, forward: Tiles, backward_queries: Tiles, backward_keys: Tiles) -> None:
        self.forward_tiles, self.queries_tiles, self.keys_tiles = forward, backward_queries, backward_keys
        self.forward = Kernel("flash", f"flash_forward_{D}", "PPPiiii")
        self.queries = Kernel("flash", f"flash_backward_queries_{D}", "PPPPPPiiii")
        parts = ("keys_values",) if D <= 128 else ("values", "keys")
        self.keys = [Kernel("flash", f"flash_backward_{part}_{D}", "PPPPPiiii") for part in parts]
        row = 2 * D  # bytes
        self.forward_nbytes = row * (forward.own + 4 * forward.other)
        self.queries_nbytes = row * (2 * backward_queries.own + 4 * backward_queries.other)
        self.keys_nbytes = row * (2 * backward_keys.own + 4 * backward_keys.other) + 16 * backward_keys.other


class Simple:
    """The simple kernels for heads of up to `widest` channels."""

    def __init__(self, widest: int) -> None:
        self.forward = Kernel("attention", f"attention_forward_{widest}", "PPPiiii")
        self.queries = Kernel("attention", f"attention_backward_queries_{widest}", "PPPPPPiiii")
        self.keys = Kernel("attention", f"attention_backward_keys_{widest}", "PPPPPiiii")
        self.decode = Kernel("attention", f"attention_decode_{widest}", "PPPPPiiiiii")
        self.rows = SIDE * (4 if widest <= 128 else 2)
        self.decode_nbytes = 4 * DECODE_WARPS * (widest + 2)

    def shared_nbytes(self, D: int, tiles: int) -> int:
        """Tiles of float32, rows padded to an odd number of 16 bytes, and the probabilities of one."""
        return 4 * self.rows * (tiles * 4 * (blocks(D, 4) | 1) + self.rows + 4)


FLASH = {
    16: Flash(16, Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
    32: Flash(32, Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
    64: Flash(64, Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
    128: Flash(128, Tiles(128, 32), Tiles(64, 32), Tiles(64, 32)),
    256: Flash(256, Tiles(64, 32), Tiles(64, 16), Tiles(64, 16)),
}
SIMPLE = {widest: Simple(widest) for widest in WIDEST}
COMBINE = Kernel("attention", "attention_decode_combine", "PPiiii")


def kind(head_size: int) -> str:
    """Which kernels attend, with the storage type in use: "flash" or "simple"."""
    return "flash" if device.storage.name == "bfloat16" and head_size in FLASH else "simple"


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int) -> int:
    """delta (B,H,T), or what the blocks of a decoding leave."""
    return max(4 * tokens * heads, 4 * DECODE_BLOCKS * (WIDEST[-1] + 2))


def check_heads(channels: int, heads: int) -> None:
    """ConfigError for heads that no kernel takes."""
    if heads and channels // heads > WIDEST[-1]:
        detail = f"makes heads of {channels // heads} channels; attention on a GPU takes at most {WIDEST[-1]}"
        raise ConfigError("num_heads", detail)


def _by_cudnn(D: int) -> bool:
    """Whether cuDNN attends: where it was asked for always, else with the heads that it is known to take."""
    return device.attention == "cudnn" and (device.attention_asked or (D % 8 == 0 and D <= CUDNN_WIDEST))


def _head_size(name: str, C: int, H: int) -> int:
    if H < 1 or C % H:
        raise ValueError(f"{name}: {C} channels do not divide into {H} heads")
    if C // H > WIDEST[-1]:
        raise ConfigError(name, f"a head of {C // H} channels; attention on a GPU takes at most {WIDEST[-1]}")
    return C // H


def _flash(D: int, *arrays: DeviceArray) -> Flash | None:
    """The flash kernels, where there are some for this head size and every row begins at a multiple of 16 bytes."""
    if kind(D) == "flash" and all(array.ptr % ALIGNED == 0 for array in arrays):
        return FLASH[D]
    return None


def _simple(D: int) -> Simple:
    return next(SIMPLE[widest] for widest in WIDEST if D <= widest)


def attention_forward(out: DeviceArray, lse: DeviceArray, qkv: DeviceArray) -> None:
    B, T, C = check.cube("out", out).shape
    H = check.cube("lse", lse, "float32").shape[1]
    check.expect("qkv", check.cube("qkv", qkv).shape, (B, T, 3 * C))
    check.expect("lse", lse.shape, (B, H, T))
    D = _head_size("lse", C, H)
    if _by_cudnn(D):
        cudnn.forward(out, lse, qkv)
    elif flash := _flash(D, out, qkv):
        grid = B * H * blocks(T, flash.forward_tiles.own)
        flash.forward(grid, FLASH_THREADS, out, lse, qkv, T, H, B * H, _group(T, D), shared=flash.forward_nbytes)
    else:
        simple = _simple(D)
        grid, shared = B * H * blocks(T, simple.rows), simple.shared_nbytes(D, 3)
        simple.forward(grid, THREADS, out, lse, qkv, T, H, B * H, D, shared=shared)


def attention_backward(
    dqkv: DeviceArray, dout: DeviceArray, qkv: DeviceArray, out: DeviceArray, lse: DeviceArray
) -> None:
    B, T, C = check.cube("out", out).shape
    H = check.cube("lse", lse, "float32").shape[1]
    check.expect("dout", check.cube("dout", dout).shape, out.shape)
    check.expect("qkv", check.cube("qkv", qkv).shape, (B, T, 3 * C))
    check.expect("dqkv", check.cube("dqkv", dqkv).shape, (B, T, 3 * C))
    check.expect("lse", lse.shape, (B, H, T))
    D = _head_size("lse", C, H)
    if _by_cudnn(D):
        cudnn.backward(dqkv, dout, qkv, out, lse)
        return
    delta = device.workspace(4 * B * H * T)
    if flash := _flash(D, dqkv, dout, qkv, out):
        last = T, H, B * H, _group(T, D)
        grid = B * H * blocks(T, flash.queries_tiles.own)
        flash.queries(grid, FLASH_THREADS, dqkv, delta, dout, qkv, out, lse, *last, shared=flash.queries_nbytes)
        grid = B * H * blocks(T, flash.keys_tiles.own)
        for keys in flash.keys:
            keys(grid, FLASH_THREADS, dqkv, dout, qkv, lse, delta, *last, shared=flash.keys_nbytes)
    else:
        simple = _simple(D)
        grid, shared = B * H * blocks(T, simple.rows), simple.shared_nbytes(D, 4)
        simple.queries(grid, THREADS, dqkv, delta, dout, qkv, out, lse, T, H, B * H, D, shared=shared)
        simple.keys(grid, THREADS, dqkv, dout, qkv, lse, delta, T, H, B * H, D, shared=shared)


def _group(T: int, D: int) -> int:
    """Heads whose keys and values, in bf16, are to share L2."""
    return max(1, L2_NBYTES // (4 * max(1, T * D)))


def attention_decode(
    out: DeviceArray, keys: DeviceArray, values: DeviceArray, qkv: DeviceArray, H: int, position: int
) -> None:
    B, T, C = check.cube("out", out).shape
    max_T = check.cube("keys", keys).shape[1]
    check.expect("qkv", check.cube("qkv", qkv).shape, (B, T, 3 * C))
    check.expect("keys", keys.shape, (B, max_T, C))
    check.expect("values", check.cube("values", values).shape, (B, max_T, C))
    D = _head_size("H", C, H)
    if not 0 <= position <= max_T - T:
        raise ValueError(f"position: {T} tokens from {position} exceed the cache's {max_T}")
    if B * T == 0:
        return
    rows, longest = B * H * T, position + T
    splits = max(1, min(DECODE_BLOCKS // rows, longest // DECODE_KEYS))
    partial = device.workspace(4 * splits * rows * (D + 2)) if splits > 1 else None
    simple = _simple(D)
    simple.decode(
        (rows, splits), WARP * DECODE_WARPS, out, keys, values, partial, qkv, T, max_T, H, D, position,
        blocks(longest, splits), shared=simple.decode_nbytes,
    )
    if splits > 1:
        COMBINE(rows, min(D, THREADS), out, partial, T, H, D, splits)
