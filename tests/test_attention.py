"""attention_forward, attention_backward, attention_decode.

Bounds follow the errors through the algorithm: scores, exponentials, weights, sums.  Since the
probabilities enter relatively, an error of a score is a relative error of its weight.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import reference
from guard import FLUSHED, TINY, UNIT, Array, blank, check, compare, floats, summed
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


def split(x: Array, H: int) -> Array:
    """(B,T,C) -> (B,H,T,C/H) in float64."""
    B, T, C = x.shape
    return x.astype(np.float64).reshape(B, T, H, C // H).transpose(0, 2, 1, 3)


def join(x: Array) -> Array:
    """The inverse of `split`."""
    B, H, T, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * width)


def weights(q: Array, k: Array, position: int) -> tuple[Array, Array, Array, Array]:
    """Scores (0 in the future), their error bounds, probabilities and log-denominators, per head."""
    width = q.shape[-1]
    past = np.arange(k.shape[2])[None, :] <= position + np.arange(q.shape[2])[:, None]
    scores = np.where(past, q @ k.swapaxes(-1, -2) / math.sqrt(width), 0.0)
    products = np.abs(q) @ np.abs(k).swapaxes(-1, -2) / math.sqrt(width)
    off = np.where(past, UNIT * (summed(width) + 3) * products, 0.0)
    largest = np.where(past, scores, -np.inf).max(axis=-1, initial=-np.inf, keepdims=True)
    raised = np.where(past, np.exp(np.where(past, scores - largest, 0.0)), 0.0)
    total = raised.sum(axis=-1, keepdims=True)
    return scores, off, raised / total, largest + np.log(total)


def forward_bounds(q: Array, k: Array, v: Array, position: int) -> tuple[Array, Array]:
    """Bounds of out and lse for the online softmax (Milakov & Gimelshein 2018).

    exp(s - m) is off by the error of the score, by that of the difference (and of a product with
    1/ln 2, should it be taken as 2^x), and by 4 units of its own; every later block may rescale it, at
    4 units more, of which there are at most T/16.
    """
    scores, off, p, lse = weights(q, k, position)
    T = k.shape[2]
    largest = scores.max(axis=-1, initial=0.0, keepdims=True)
    relative = off + UNIT * (3 * (np.abs(scores) + np.abs(largest)) + 4 + 4 * (T / 16 + 1))
    total = (p * relative).sum(axis=-1, keepdims=True) + UNIT * (summed(T) + 4)
    sums = UNIT * (summed(T) + 4)
    out = (p * (relative + sums) + FLUSHED) @ np.abs(v) + total * (p @ np.abs(v))
    return join(out) + TINY, (total + 4 * UNIT * (np.abs(lse) + np.abs(largest)))[..., 0]


def check_forward(ops: ModuleType, qkv: Array, H: int) -> dict[str, Array]:
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out, lse = forward_bounds(*(split(part, H) for part in np.split(qkv, 3, axis=-1)), 0)
    return check(ops, "attention_forward", (blank(B, T, C), blank(B, H, T), qkv), {"out": out, "lse": lse})


def backward_bound(dout: Array, qkv: Array, out: Array, lse: Array) -> Array:
    """The bound of dqkv, given out and lse exactly."""
    H = lse.shape[1]
    q, k, v = (split(part, H) for part in np.split(qkv, 3, axis=-1))
    scores, off, _, _ = weights(q, k, 0)
    log_denominator = lse.astype(np.float64)[..., None]
    past = np.tri(q.shape[2], dtype=bool)
    p = np.where(past, np.exp(np.where(past, scores - log_denominator, 0.0)), 0.0)
    relative = off + UNIT * (4 * (np.abs(scores) + np.abs(log_denominator)) + 6)
    T, width = q.shape[2:]
    do, o = split(dout, H), split(out, H)
    dp, delta = do @ v.swapaxes(-1, -2), (do * o).sum(axis=-1, keepdims=True)
    dp_off = UNIT * (summed(width) + 1) * (np.abs(do) @ np.abs(v).swapaxes(-1, -2))
    delta_off = UNIT * (summed(width) + 1) * np.abs(do * o).sum(axis=-1, keepdims=True)
    scale = 1 / math.sqrt(width)
    ds = np.abs(p * (dp - delta)) * scale
    ds_off = relative * np.abs(dp - delta) + dp_off + delta_off + 4 * UNIT * (np.abs(dp) + np.abs(delta))
    ds_off = (ds_off * p + FLUSHED * (np.abs(dp) + np.abs(delta))) * scale + 4 * UNIT * ds
    sums = UNIT * (summed(T) + 2)
    across = (ds_off + sums * ds).swapaxes(-1, -2)
    dq, dk = (ds_off + sums * ds) @ np.abs(k), across @ np.abs(q)
    dv = (p * (relative + sums) + FLUSHED).swapaxes(-1, -2) @ np.abs(do)
    return np.concatenate([join(dq), join(dk), join(dv)], axis=-1) + TINY


@pytest.mark.parametrize("B, T, H, width", SHAPES + HEAVY)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    check_forward(ops, floats(rng, B, T, 3 * H * width), H)


@pytest.mark.parametrize("B, T, H, width", SHAPES + HEAVY)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    C = H * width
    qkv, dout = floats(rng, B, T, 3 * C), floats(rng, B, T, C)
    out, lse = blank(B, T, C), blank(B, H, T)
    reference.attention_forward(out, lse, qkv)
    bounds = {"dqkv": backward_bound(dout, qkv, out, lse)}
    check(ops, "attention_backward", (blank(B, T, 3 * C), dout, qkv, out, lse), bounds)


def large_scores(rng: Generator, B: int, T: int, H: int, width: int, size: float) -> Array:
    """qkv whose scores reach `size` either way."""
    C = H * width
    qkv = floats(rng, B, T, 3 * C)
    qkv[..., : 2 * C] *= np.float32(math.sqrt(size / 3))
    return qkv


@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("T", [5, 33, 97])
def test_large_scores(ops: ModuleType, rng: Generator, T: int, size: float) -> None:
    """exp of the bare score overflows from 89 on."""
    qkv, dout = large_scores(rng, 2, T, 2, 16, size), floats(rng, 2, T, 32)
    check_forward(ops, qkv, 2)
    out, lse = blank(2, T, 32), blank(2, 2, T)
    reference.attention_forward(out, lse, qkv)
    assert np.abs(lse).max() > size / 3
    bounds = {"dqkv": backward_bound(dout, qkv, out, lse)}
    check(ops, "attention_backward", (blank(2, T, 96), dout, qkv, out, lse), bounds)


@pytest.mark.parametrize("T", [1, 4, 17, 65, 130])
def test_equal_scores(ops: ModuleType, rng: Generator, T: int) -> None:
    """No query: every key weighs the same, so out is a running mean and lse log(t + 1)."""
    qkv = floats(rng, 1, T, 3 * 24)
    qkv[..., :24] = 0
    found = check_forward(ops, qkv, 3)
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
            ops.attention_forward(out, lse, changed)
            results.append((t, out[:, : t + 1].tobytes(), lse[:, :, : t + 1].tobytes()))
    for t in {t for t, _, _ in results}:
        assert len({result for result in results if result[0] == t}) == 1


@pytest.mark.parametrize("shift", [-1, 1])
def test_mask_off_by_one(ops: ModuleType, rng: Generator, shift: int) -> None:
    """A mask that hides the token itself, or shows the next one, lies far outside the bound."""
    B, T, H, width = 1, 33, 2, 16
    qkv = floats(rng, B, T, 3 * H * width)
    found = check_forward(ops, qkv, H)
    q, k, v = (split(part, H) for part in np.split(qkv, 3, axis=-1))
    bound, _ = forward_bounds(q, k, v, 0)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(width)
    allowed = np.tri(T, T, shift, dtype=bool)
    allowed[0, 0] = True
    raised = np.where(allowed, np.exp(scores), 0.0)
    wrong = join(raised / raised.sum(axis=-1, keepdims=True) @ v)
    apart = np.abs(found["out"] - wrong) / bound
    assert np.median(apart[:, 2:-1]) > 1000


@pytest.mark.parametrize("T", [1, 7, 40, 70])
def test_nan_is_kept(ops: ModuleType, rng: Generator, T: int) -> None:
    """A NaN in a query, a key or a value reaches the rows that use it, and lse where it is a score."""
    C = 16
    for part in range(3):
        for t in {0, T // 2, T - 1}:
            qkv, out, lse = floats(rng, 1, T, 3 * C), blank(1, T, C), blank(1, 2, T)
            qkv[0, t, part * C + 3] = np.nan  # in the first of two heads
            ops.attention_forward(out, lse, qkv)
            reached = [t] if part == 0 else list(range(t, T))
            if part == 2:
                assert np.isnan(out[0, reached, 3]).all()
            else:
                assert np.isnan(out[0, reached, :8]).all() and np.isnan(lse[0, 0, reached]).all()
            assert np.isfinite(out[0, :, 8:]).all() and np.isfinite(lse[0, 1]).all()


DECODE = [
    (1, 1, 1, 1), (2, 7, 3, 5), (1, 20, 2, 16), (1, 70, 1, 64), (2, 33, 2, 40), (1, 18, 3, 80),
    (1, 9, 2, 128), (1, 5, 1, 256), pytest.param(1, 135, 2, 64, marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("chunks", ["ones", "ragged", "whole"])
@pytest.mark.parametrize("B, T, H, width", DECODE)
def test_decode(ops: ModuleType, rng: Generator, B: int, T: int, H: int, width: int, chunks: str) -> None:
    """A cache filled by chunks gives what attention_forward gives for the whole, whose rows it is."""
    C, maxT = H * width, T + 2
    qkv = floats(rng, B, T, 3 * C)
    whole = np.empty((B, T, C))
    reference.attention_forward(whole, np.empty((B, H, T)), qkv)
    # what is beyond the tokens so far must not matter
    keys, values = np.full((B, maxT, C), np.nan, np.float32), np.full((B, maxT, C), np.nan, np.float32)
    sizes = {"ones": [1] * T, "whole": [T], "ragged": [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]}[chunks]
    position = 0
    for size in sizes:
        part = np.ascontiguousarray(qkv[:, position : position + size])
        if not part.shape[1]:
            break
        end = position + part.shape[1]
        q = split(part[..., :C], H)
        k, v = (split(np.ascontiguousarray(qkv[:, :end, i * C : (i + 1) * C]), H) for i in (1, 2))
        bound, _ = forward_bounds(q, k, v, position)
        given = (blank(B, part.shape[1], C), keys, values, part, H, position)
        found = check(ops, "attention_decode", given, {"out": bound, "keys": 0, "values": 0})
        compare("attention_decode", "out", found["out"], whole[:, position:end], bound)
        keys, values, position = found["keys"].copy(), found["values"].copy(), end
    assert position == T


def test_decode_fills_the_cache_to_its_end(ops: ModuleType, rng: Generator) -> None:
    """position + T = maxT, and of the earlier tokens nothing changes."""
    B, H, width, maxT, T = 2, 2, 12, 9, 4
    C, position = H * width, maxT - T
    keys, values, qkv = floats(rng, B, maxT, C), floats(rng, B, maxT, C), floats(rng, B, T, 3 * C)
    k, v = keys.copy(), values.copy()
    k[:, position:], v[:, position:] = qkv[..., C : 2 * C], qkv[..., 2 * C :]
    bound, _ = forward_bounds(split(qkv[..., :C], H), split(k, H), split(v, H), position)
    given = (blank(B, T, C), keys, values, qkv, H, position)
    check(ops, "attention_decode", given, {"out": bound, "keys": 0, "values": 0})


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0)])
def test_decode_nothing(ops: ModuleType, rng: Generator, B: int, T: int) -> None:
    given = (blank(B, T, 8), floats(rng, B, 6, 8), floats(rng, B, 6, 8), floats(rng, B, T, 24), 2, 3)
    check(ops, "attention_decode", given, {"out": 0, "keys": 0, "values": 0})
