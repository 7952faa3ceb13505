"""Causal attention of grouped heads: on tensor cores in bf16 (`flash.cu`, with soft-caps `flash_softcap.cu`), with
simpler kernels otherwise (`attention.cu`), or by cuDNN (`cudnn.py`).
"""

from __future__ import annotations

import math
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
DECODE_KEYS = 128  # the fewest keys worth a block of their own, as in attention.cu
WARP, DECODE_WARPS, THREADS, SIDE = 32, 4, 64, 8  # as in attention.cu
FLASH_THREADS = 128


class Tiles(NamedTuple):
    """Rows that a block of a flash kernel owns, and rows of the tiles it walks over, as in flash.cu."""

    own: int
    other: int


class Flash:
    """The flash kernels of one head size."""

    def __init__(
        self, file: str, D: int, forward: Tiles, backward_queries: Tiles, backward_keys: Tiles, *parts: str
    ) -> None:
        self.forward_tiles, self.queries_tiles, self.keys_tiles = forward, backward_queries, backward_keys
        self.forward = Kernel(file, f"{file}_forward_{D}", "PPPiiiiiiff")
        self.queries = Kernel(file, f"{file}_backward_queries_{D}", "PPPPPPiiiiiiff")
        self.keys = [Kernel(file, f"{file}_backward_{part}_{D}", "PPPPPiiiiiiff") for part in parts]
        row = 2 * D  # bytes
        self.forward_nbytes = row * (forward.own + 4 * forward.other)
        self.queries_nbytes = row * (2 * backward_queries.own + 4 * backward_queries.other)
        self.keys_nbytes = row * (2 * backward_keys.own + 4 * backward_keys.other) + 16 * backward_keys.other


class Simple:
    """The simple kernels for heads of up to `widest` channels."""

    def __init__(self, widest: int) -> None:
        self.forward = Kernel("attention", f"attention_forward_{widest}", "PPPiiiiiiff")
        self.queries = Kernel("attention", f"attention_backward_queries_{widest}", "PPPPPPiiiiiiff")
        self.keys = Kernel("attention", f"attention_backward_keys_{widest}", "PPPPPiiiiiiff")
        self.decode = Kernel("attention", f"attention_decode_{widest}", "PPPPPPiiiiiiff")
        self.rows = SIDE * (4 if widest <= 128 else 2)
        self.decode_nbytes = 4 * DECODE_WARPS * (widest + 2)

    def shared_nbytes(self, D: int, tiles: int) -> int:
        """Tiles of float32, rows padded to an odd number of 16 bytes, and the probabilities of one."""
        return 4 * self.rows * (tiles * 4 * (blocks(D, 4) | 1) + self.rows + 4)


def _flash_kernels(file: str, together: tuple[int, ...], forward_128: Tiles) -> dict[int, Flash]:
    """By head size; for those in `together` one kernel makes the gradients of keys and values."""
    tiles = {
        16: (Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
        32: (Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
        64: (Tiles(128, 64), Tiles(128, 32), Tiles(128, 32)),
        128: (forward_128, Tiles(64, 32), Tiles(64, 32)),
        256: (Tiles(64, 32), Tiles(64, 16), Tiles(64, 16)),
    }
    parts = {D: ("keys_values",) if D in together else ("values", "keys") for D in tiles}
    return {D: Flash(file, D, *tiles[D], *parts[D]) for D in tiles}


FLASH = _flash_kernels("flash", (16, 32, 64, 128), Tiles(128, 32))
FLASH_SOFTCAP = _flash_kernels("flash_softcap", (), Tiles(64, 32))
SIMPLE = {widest: Simple(widest) for widest in WIDEST}
COMBINE = Kernel("attention", "attention_decode_combine", "PPPiiiiiff")


def kind(head_size: int) -> str:
    """Which kernels attend, with the storage type in use: "flash" or "simple"."""
    return "flash" if device.storage.name == "bfloat16" and head_size in FLASH else "simple"


def scratch_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> int:
    """delta (B,H,T), or what the blocks of a decoding leave."""
    return max(4 * tokens * heads, 4 * DECODE_BLOCKS * (head_size + 2))


def check_heads(head_size: int) -> None:
    """ConfigError for heads that no kernel takes."""
    if head_size > WIDEST[-1]:
        raise ConfigError("head_size", f"heads of {head_size} channels; attention on a GPU takes at most {WIDEST[-1]}")


# ---- arguments -------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """The contract's letters."""

    B: int
    T: int
    H: int
    G: int
    D: int


def _head_size(name: str, C: int, H: int) -> int:
    if H < 1 or C % H:
        raise ValueError(f"{name}: {C} channels do not divide into {H} heads")
    if C // H > WIDEST[-1]:
        raise ConfigError(name, f"a head of {C // H} channels; attention on a GPU takes at most {WIDEST[-1]}")
    return C // H


def _groups(name: str, channels: int, H: int, D: int) -> int:
    """G, of `channels` that are G heads of keys; heads of no channels are as many as one likes."""
    G = channels // D if D else H
    if G < 1 or G * D != channels or H % G:
        raise ValueError(f"{name}: {channels} channels of keys are not of heads of {D} that {H} heads of queries share")
    return G


def _sizes(out: DeviceArray, lse: DeviceArray, qkv: DeviceArray) -> _Sizes:
    B, T, C = check.cube("out", out).shape
    H = check.cube("lse", lse, "float32").shape[1]
    check.expect("lse", lse.shape, (B, H, T))
    N = check.cube("qkv", qkv).shape[2]
    check.expect("qkv", qkv.shape, (B, T, N))
    D = _head_size("lse", C, H)
    if N < C or (N - C) % 2:
        raise ValueError(f"qkv: {N} channels are not {C} of queries and as many of keys as of values")
    return _Sizes(B, T, H, _groups("qkv", (N - C) // 2, H, D), D)


def _scores(scale: float, window: int, softcap: float, longest: int) -> tuple[int, float, float]:
    """What the kernels take: a window of at most `longest` keys, a scale, and a soft-cap or 0."""
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: must be positive, got {scale}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: must be positive and finite, or 0 for none, got {softcap}")
    return min(window, longest) if window > 0 else longest, scale, softcap


# ---- which kernels ---------------------------------------------------------------------------------


def _by_cudnn(D: int, plain: bool) -> bool:
    """Whether cuDNN attends, which is for `plain` attention without window and soft-cap alone: where it was asked for,
    else with the heads that it is known to take."""
    return device.attention == "cudnn" and plain and (device.attention_asked or (D % 8 == 0 and D <= CUDNN_WIDEST))


def _flash(D: int, softcap: float, *arrays: DeviceArray) -> Flash | None:
    """The flash kernels, where there are some for this head size and every row begins at a multiple of 16 bytes."""
    if kind(D) == "flash" and all(array.ptr % ALIGNED == 0 for array in arrays):
        return (FLASH_SOFTCAP if softcap else FLASH)[D]
    return None


def _simple(D: int) -> Simple:
    return next(SIMPLE[widest] for widest in WIDEST if D <= widest)


def _group(T: int, D: int, shared: int) -> int:
    """Heads that are worked on at a time so that what they read, in bf16, stays in L2: rows of two arrays, which
    `shared` of them have in common."""
    return max(1, L2_NBYTES * shared // (4 * max(1, T * D)))


# ---- ops -------------------------------------------------------------------------------------------


def attention_forward(
    out: DeviceArray, lse: DeviceArray, qkv: DeviceArray, scale: float, window: int, softcap: float
) -> None:
    B, T, H, G, D = _sizes(out, lse, qkv)
    window, scale, softcap = _scores(scale, window, softcap, T)
    if _by_cudnn(D, window == T and softcap == 0.0):
        cudnn.forward(out, lse, qkv, G, scale)
    elif flash := _flash(D, softcap, out, qkv):
        grid = B * H * blocks(T, flash.forward_tiles.own)
        last = T, H, G, B * H, _group(T, D, H // G), window, scale, softcap
        flash.forward(grid, FLASH_THREADS, out, lse, qkv, *last, shared=flash.forward_nbytes)
    else:
        simple = _simple(D)
        grid, shared = B * H * blocks(T, simple.rows), simple.shared_nbytes(D, 3)
        simple.forward(grid, THREADS, out, lse, qkv, T, H, G, B * H, D, window, scale, softcap, shared=shared)


def attention_backward(
    dqkv: DeviceArray, dout: DeviceArray, qkv: DeviceArray, out: DeviceArray, lse: DeviceArray, scale: float,
    window: int, softcap: float,
) -> None:
    B, T, H, G, D = _sizes(out, lse, qkv)
    check.expect("dout", check.cube("dout", dout).shape, out.shape)
    check.expect("dqkv", check.cube("dqkv", dqkv).shape, qkv.shape)
    window, scale, softcap = _scores(scale, window, softcap, T)
    if _by_cudnn(D, window == T and softcap == 0.0):
        cudnn.backward(dqkv, dout, qkv, out, lse, G, scale)
        return
    delta = device.workspace(4 * B * H * T)
    last = window, scale, softcap
    if flash := _flash(D, softcap, dqkv, dout, qkv, out):
        grid, group = B * H * blocks(T, flash.queries_tiles.own), _group(T, D, H // G)
        flash.queries(
            grid, FLASH_THREADS, dqkv, delta, dout, qkv, out, lse, T, H, G, B * H, group, *last,
            shared=flash.queries_nbytes,
        )  # fmt: skip
        # a head of keys is read with the H / G heads of queries that share it
        grid, group = B * G * blocks(T, flash.keys_tiles.own), _group(T * (H // G), D, 1)
        for keys in flash.keys:
            keys(
                grid, FLASH_THREADS, dqkv, dout, qkv, lse, delta, T, H, G, B * G, group, *last, shared=flash.keys_nbytes
            )
    else:
        simple = _simple(D)
        rows, shared = blocks(T, simple.rows), simple.shared_nbytes(D, 4)
        simple.queries(B * H * rows, THREADS, dqkv, delta, dout, qkv, out, lse, T, H, G, B * H, D, *last, shared=shared)
        simple.keys(B * G * rows, THREADS, dqkv, dout, qkv, lse, delta, T, H, G, B * G, D, *last, shared=shared)


def attention_decode(
    out: DeviceArray, keys: DeviceArray, values: DeviceArray, qkv: DeviceArray, positions: DeviceArray, H: int,
    scale: float, window: int, softcap: float,
) -> None:
    B, T, C = check.cube("out", out).shape
    max_T, width = check.cube("keys", keys).shape[1:]
    check.expect("keys", keys.shape, (B, max_T, width))
    check.expect("values", check.cube("values", values).shape, keys.shape)
    check.expect("qkv", check.cube("qkv", qkv).shape, (B, T, C + 2 * width))
    D = _head_size("H", C, H)
    G = _groups("keys", width, H, D)
    check.places("positions", positions, B, T, max_T, "tokens of the cache")
    window, scale, softcap = _scores(scale, window, softcap, max_T)
    if B * T == 0:
        return
    # The keys there will be are not known when a launch is recorded: as many blocks as the longest window needs.
    rows = B * H * T
    splits = max(1, min(DECODE_BLOCKS // rows, blocks(window, DECODE_KEYS)))
    partial = device.workspace(4 * splits * rows * (D + 2)) if splits > 1 else None
    simple = _simple(D)
    simple.decode(
        (rows, splits), WARP * DECODE_WARPS, out, keys, values, partial, qkv, positions, T, max_T, H, G, D, window,
        scale, softcap, shared=simple.decode_nbytes,
    )
    if splits > 1:
        COMBINE(rows, min(D, THREADS), out, partial, positions, T, H, D, window, splits, scale, softcap)
