"""attention_forward, attention_backward, attention_decode.

Shapes of plain attention are ragged about every block; then come grouped heads, windows and soft-caps, which on a CPU
meet blocks of 256 queries and 128 keys.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import reference
from attention_bounds import Told, backward_bound, forward_bounds, join, parts, shared, split
from guard import Array, blank, check, compare, floats
from numpy.random import Generator

WIDTHS = [1, 5, 16, 40, 64, 80, 128, 256]
TIMES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 67, 96, 97]
LONG = [127, 128, 129, 191, 193, 257, 300]
# B, T, H, width of a head
SHAPES = (
    [(1, T, 1, 8) for T in TIMES]
    + [(2, 13, 3, width) for width in WIDTHS]
    + [(1, 67, 1, width) for width in WIDTHS]
    + [(1, 6, 1, width) for width in (2, 3, 4, 7, 9, 12, 15, 17, 24, 32, 33, 48, 63, 65, 96)]
    + [(3, 5, 2, 4), (5, 1, 7, 3), (0, 3, 2, 4), (2, 0, 2, 4)]
)
HEAVY = [pytest.param(1, T, 2, 16, marks=pytest.mark.heavy) for T in LONG] + [
    pytest.param(2, 130, 3, 64, marks=pytest.mark.heavy),
    pytest.param(1, 259, 1, 40, marks=pytest.mark.heavy),
]
# B, T, width of a head, and what attention is told: windows of a token, within a block, of a block and one more or
# less, over several, of all but the first token, of more than there are
GROUPED = [
    (2, 13, 40, Told(6, 3)), (1, 37, 5, Told(4, 1, 0.2)), (1, 9, 256, Told(2, 1, 1 / 16)), (2, 5, 3, Told(12, 2, 1.5)),
    (2, 21, 8, Told(2, 2, None, 1)), (1, 37, 40, Told(3, 3, None, 7)), (2, 19, 16, Told(4, 2, 0.3, 18)),
    (1, 19, 16, Told(2, 1, 0.3, 19)), (1, 19, 16, Told(2, 1, 0.3, 1 << 40)), (1, 23, 8, Told(2, 1, 1.0, 0, 2.0)),
    (2, 33, 12, Told(6, 3, 0.5, 5, 1.5)), (0, 5, 8, Told(4, 2, None, 3, 1.0)), (2, 0, 8, Told(4, 2, None, 3, 1.0)),
]  # fmt: skip
WINDOWS = [
    pytest.param(1, T, 8, Told(2, 1, None, window), marks=pytest.mark.heavy)
    for T, window in [(300, 1), (300, 127), (300, 128), (300, 129), (389, 100), (389, 257), (389, 388)]
] + [pytest.param(2, 270, 40, Told(6, 3, 0.3, 77, 4.0), marks=pytest.mark.heavy)]  # fmt: skip


def arguments(qkv: Array, told: Told) -> tuple[Any, ...]:
    """Those of attention_forward."""
    B, T, width = qkv.shape
    D = width // (told.H + 2 * told.G)
    return (blank(B, T, told.H * D), blank(B, told.H, T), qkv, *told.scalars(D))


def check_forward(ops: ModuleType, qkv: Array, told: Told) -> dict[str, Array]:
    out, lse = forward_bounds(*parts(qkv, told), 0, told)
    return check(ops, "attention_forward", arguments(qkv, told), {"out": out, "lse": lse})


def check_backward(ops: ModuleType, qkv: Array, dout: Array, told: Told) -> dict[str, Array]:
    out, lse, _, *scalars = arguments(qkv, told)
    reference.attention_forward(out, lse, qkv, *scalars)
    bounds = {"dqkv": backward_bound(dout, qkv, out, lse, told)}
    return check(ops, "attention_backward", (blank(*qkv.shape), dout, qkv, out, lse, *scalars), bounds)


@pytest.mark.parametrize("B, T, H, width", SHAPES + HEAVY)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    check_forward(ops, floats(rng, B, T, 3 * H * width), Told(H, H))


@pytest.mark.parametrize("B, T, H, width", SHAPES + HEAVY)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    C = H * width
    check_backward(ops, floats(rng, B, T, 3 * C), floats(rng, B, T, C), Told(H, H))


@pytest.mark.parametrize("B, T, width, told", GROUPED + WINDOWS)
def test_grouped(ops: ModuleType, rng: Generator, B: int, T: int, width: int, told: Told) -> None:
    """Forward and backward of grouped heads, with windows and soft-caps."""
    qkv = floats(rng, B, T, (told.H + 2 * told.G) * width)
    check_forward(ops, qkv, told)
    check_backward(ops, qkv, floats(rng, B, T, told.H * width), told)


def large_scores(rng: Generator, B: int, T: int, H: int, width: int, size: float) -> Array:
    """qkv whose scores reach `size` either way."""
    C = H * width
    qkv = floats(rng, B, T, 3 * C)
    qkv[..., : 2 * C] *= np.float32(math.sqrt(size / 3))
    return qkv


@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("T", [5, 33, 97])
def test_large_scores(ops: ModuleType, rng: Generator, T: int, size: float, softcap: float) -> None:
    """exp of the bare score overflows from 89 on; a soft-cap holds what is beyond it, whose slope is 0."""
    qkv, dout, told = large_scores(rng, 2, T, 2, 16, size), floats(rng, 2, T, 32), Told(2, 2, softcap=softcap)
    lse = check_forward(ops, qkv, told)["lse"]
    assert np.abs(lse).max() > (min(size, softcap) if softcap else size) / 3
    check_backward(ops, qkv, dout, told)


@pytest.mark.parametrize("T", [1, 4, 17, 65, 130])
def test_equal_scores(ops: ModuleType, rng: Generator, T: int) -> None:
    """No query: every key weighs the same, so out is a running mean and lse log(t + 1)."""
    qkv = floats(rng, 1, T, 3 * 24)
    qkv[..., :24] = 0
    found = check_forward(ops, qkv, Told(3, 3))
    count = np.arange(1, T + 1)
    mean = np.cumsum(qkv[0, :, 48:].astype(np.float64), axis=0) / count[:, None]
    np.testing.assert_allclose(found["out"][0], mean, atol=1e-5)
    np.testing.assert_allclose(found["lse"][0], np.broadcast_to(np.log(count), (3, T)), atol=1e-5)


@pytest.mark.parametrize("T", [2, 16, 33, 65, 100])
def test_the_future_does_not_exist(ops: ModuleType, rng: Generator, T: int) -> None:
    """Whatever stands in a later token changes no bit of an earlier one."""
    qkv = floats(rng, 1, T, 3 * 20)
    results = []
    for t in {0, T // 2, T - 2}:
        for later in (0.0, 1.0, -1e15):
            changed, out, lse = qkv.copy(), blank(1, T, 20), blank(1, 2, T)
            changed[:, t + 1 :] = later
            ops.attention_forward(out, lse, changed, 0.3, 0, 0.0)
            results.append((t, out[:, : t + 1].tobytes(), lse[:, :, : t + 1].tobytes()))
    for t in {t for t, _, _ in results}:
        assert len({result for result in results if result[0] == t}) == 1


@pytest.mark.parametrize("window, wrong", [(0, -1), (0, 1), (5, 4), (5, 6), (20, 0)])
def test_mask_off_by_one(ops: ModuleType, rng: Generator, window: int, wrong: int) -> None:
    """A mask that hides the token itself (-1), or shows the next one (1), or a window of one token less or more or of
    all, lies far outside the bound."""
    B, T, H, width = 1, 33, 2, 16
    qkv, told = floats(rng, B, T, 3 * H * width), Told(H, H, window=window)
    found = check_forward(ops, qkv, told)
    q, k, v = parts(qkv, told)
    bound, _ = forward_bounds(q, k, v, 0, told)
    ahead = np.arange(T)[:, None] - np.arange(T)
    allowed = ahead >= -wrong if window == 0 else (ahead >= 0) & (ahead < (wrong or T))
    allowed[0, 0] = True
    raised = np.where(allowed, np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(width)), 0.0)
    mistaken = join(raised / raised.sum(axis=-1, keepdims=True) @ v)
    apart = np.abs(found["out"] - mistaken) / bound
    assert np.median(apart[:, max(2, window + 1) : -1]) > 1000


def test_a_window_forgets(ops: ModuleType, rng: Generator) -> None:
    """Whatever stands in a block of keys before the window changes no bit, NaN neither: the block is not read."""
    T, window, before = 300, 40, 128
    qkv, dout, results = floats(rng, 1, T, 4 * 8), floats(rng, 1, T, 16), []
    for value in (0.0, np.nan):
        qkv[:, :96, 16:] = value  # whole blocks also of 32 keys, as on a GPU
        out, lse, dqkv = blank(1, T, 16), blank(1, 2, T), blank(1, T, 32)
        ops.attention_forward(out, lse, qkv, 0.3, window, 0.0)
        ops.attention_backward(dqkv, dout, qkv, out, lse, 0.3, window, 0.0)
        later = slice(before + window - 1, None)
        results.append((out[:, later].tobytes(), lse[:, :, later].tobytes(), dqkv[:, later].tobytes()))
    assert results[0] == results[1]


@pytest.mark.parametrize("T", [1, 7, 40, 70])
def test_nan_is_kept(ops: ModuleType, rng: Generator, T: int) -> None:
    """A NaN in a query, a key or a value reaches the rows that use it, and lse where it is a score."""
    C = 16
    for part in range(3):
        for t in {0, T // 2, T - 1}:
            qkv, out, lse = floats(rng, 1, T, 3 * C), blank(1, T, C), blank(1, 2, T)
            qkv[0, t, part * C + 3] = np.nan  # in the first of two heads
            ops.attention_forward(out, lse, qkv, 0.3, 0, 0.0)
            reached = [t] if part == 0 else list(range(t, T))
            if part == 2:
                assert np.isnan(out[0, reached, 3]).all()
            else:
                assert np.isnan(out[0, reached, :8]).all() and np.isnan(lse[0, 0, reached]).all()
            assert np.isfinite(out[0, :, 8:]).all() and np.isfinite(lse[0, 1]).all()


# B, T, width of a head, and what attention is told
DECODE = [
    (1, 1, 1, Told(1, 1)), (2, 7, 5, Told(3, 3)), (1, 20, 16, Told(2, 2)), (1, 70, 64, Told(1, 1)),
    (2, 33, 40, Told(6, 3)), (1, 18, 80, Told(3, 1, 0.1, 5)), (1, 9, 128, Told(2, 2, None, 0, 2.0)),
    (1, 5, 256, Told(4, 1)), (2, 40, 8, Told(35, 1, 0.5, 17, 3.0)),
    pytest.param(1, 135, 64, Told(2, 2), marks=pytest.mark.heavy),
    pytest.param(1, 300, 8, Told(4, 2, None, 150), marks=pytest.mark.heavy),
]  # fmt: skip


def check_decode(
    ops: ModuleType, keys: Array, values: Array, qkv: Array, positions: Array, told: Told
) -> dict[str, Array]:
    """keys and values hold NaN after each sequence's tokens: what is there must not matter."""
    B, T, width = qkv.shape
    D = width // (told.H + 2 * told.G)
    wide, end = told.H * D, int(positions.max(initial=0)) + T
    k, v = keys.copy(), values.copy()
    for b in range(B):
        k[b, positions[b] : positions[b] + T] = qkv[b, :, wide : wide + told.G * D]
        v[b, positions[b] : positions[b] + T] = qkv[b, :, wide + told.G * D :]
    seen = (shared(np.nan_to_num(x[:, :end]), told) for x in (k, v))
    bound, _ = forward_bounds(split(qkv[..., :wide], told.H), *seen, positions, told)
    given = (blank(B, T, wide), keys, values, qkv, positions, told.H, *told.scalars(D))
    return check(ops, "attention_decode", given, {"out": bound, "keys": 0, "values": 0})


@pytest.mark.parametrize("chunks", ["ones", "ragged", "whole"])
@pytest.mark.parametrize("B, T, width, told", DECODE)
def test_decode(ops: ModuleType, rng: Generator, B: int, T: int, width: int, told: Told, chunks: str) -> None:
    """A cache filled by chunks gives what attention_forward gives for the whole, whose rows it is."""
    qkv = floats(rng, B, T, (told.H + 2 * told.G) * width)
    whole = np.empty((B, T, told.H * width))
    reference.attention_forward(whole, np.empty((B, told.H, T)), qkv, *told.scalars(width))
    keys, values = (np.full((B, T + 2, told.G * width), np.nan, np.float32) for _ in range(2))
    sizes = {"ones": [1] * min(T, 24), "whole": [T], "ragged": [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144]}[chunks]
    position = 0
    for size in sizes:
        part = np.ascontiguousarray(qkv[:, position : position + size])
        if not part.shape[1]:
            break
        found = check_decode(ops, keys, values, part, np.full(B, position, np.int32), told)
        end = position + part.shape[1]
        bound, _ = forward_bounds(*(x[:, :, :end] for x in parts(qkv, told)), 0, told)
        compare("attention_decode", "out", found["out"], whole[:, position:end], bound[:, position:end])
        keys, values, position = found["keys"].copy(), found["values"].copy(), end
    assert position == T or chunks == "ones"


@pytest.mark.parametrize("T", [1, 3, 9])
@pytest.mark.parametrize("told", [Told(4, 2), Told(3, 3, 0.3, 6, 2.0)])
def test_decode_at_different_positions(ops: ModuleType, rng: Generator, told: Told, T: int) -> None:
    """Each sequence has its own number of tokens before: none, some, and as many as leave room for just these."""
    maxT, D = 21, 12
    positions = np.array([0, 7, maxT - T], np.int32)
    keys, values = floats(rng, 3, maxT, told.G * D), floats(rng, 3, maxT, told.G * D)
    for b, position in enumerate(positions):
        keys[b, position:], values[b, position:] = np.nan, np.nan
    check_decode(ops, keys, values, floats(rng, 3, T, (told.H + 2 * told.G) * D), positions, told)


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_decode_nothing(ops: ModuleType, rng: Generator, B: int, T: int) -> None:
    qkv, positions = floats(rng, B, T, 24), np.full(B, 3, np.int32)
    given = (blank(B, T, 8), floats(rng, B, 6, 8), floats(rng, B, 6, 8), qkv, positions, 2, 0.5, 0, 0.0)
    check(ops, "attention_decode", given, {"out": 0, "keys": 0, "values": 0})


def test_any_number_of_threads(each_isa: ModuleType, rng: Generator) -> None:
    """The same bits, with more threads than heads of keys, too."""
    qkv, dout, told = floats(rng, 2, 150, 10 * 8), floats(rng, 2, 150, 48), Told(6, 2, 0.3, 70, 5.0)
    results = []
    for threads in (1, 2, 5):
        each_isa.configure(isa=each_isa.info()["isa"], threads=threads)
        out, lse, _, *scalars = arguments(qkv, told)
        each_isa.attention_forward(out, lse, qkv, *scalars)
        dqkv = blank(*qkv.shape)
        each_isa.attention_backward(dqkv, dout, qkv, out, lse, *scalars)
        results.append(out.tobytes() + lse.tobytes() + dqkv.tobytes())
        for T in (1, 9):
            keys, values = np.full((2, 150, 16), 0.5, np.float32), np.full((2, 150, 16), 0.25, np.float32)
            rows, part = blank(2, T, 48), np.ascontiguousarray(qkv[:, :T])
            each_isa.attention_decode(rows, keys, values, part, np.array([3, 99], np.int32), 6, *scalars)
            results[-1] += rows.tobytes()
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("which, value, message", [
    ("scale", 0.0, "scale: must be positive"), ("scale", math.nan, "scale: must be positive"),
    ("softcap", -1.0, "softcap: must be positive"), ("window", -1, "window: must be positive"),
    ("qkv", (1, 4, 31), "qkv: 31 channels are no 2 query heads of 8"),
    ("qkv", (1, 4, 16), "qkv: 0 channels of keys are no key-value heads"),
    ("qkv", (1, 4, 64), "qkv: 24 channels of keys are no key-value heads of 8 for 2 query heads"),
    ("lse", (1, 3, 4), "lse: 16 channels do not divide into 3 heads"),
])  # fmt: skip
def test_refusals(cpu: ModuleType, which: str, value: Any, message: str) -> None:
    given = {"out": (1, 4, 16), "lse": (1, 2, 4), "qkv": (1, 4, 32), "scale": 0.5, "window": 0, "softcap": 0.0}
    given[which] = value
    values = [blank(*x) if isinstance(x, tuple) else x for x in given.values()]
    with pytest.raises(ValueError, match=message):
        cpu.attention_forward(*values)


@pytest.mark.parametrize("positions", [[-1, 0], [0, 3]])
def test_decode_refuses_positions(cpu: ModuleType, positions: list[int]) -> None:
    arrays = blank(2, 2, 8), blank(2, 4, 4), blank(2, 4, 4), blank(2, 2, 16)
    with pytest.raises(ValueError, match="positions: 2 tokens from -?[13] at .* exceed the 4 of the cache"):
        cpu.attention_decode(*arrays, np.array(positions, np.int32), 2, 0.5, 0, 0.0)
