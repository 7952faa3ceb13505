"""Attention on a GPU, or a simulated one, beyond test_attention.py: bfloat16 on tensor cores, tiles outside a window,
decoding that is split over keys and that is recorded.

Inputs are bf16 numbers, so the bounds of float32 hold, and what rounding adds to them: of P and dS, once each, before
they are multiplied, and of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import on_device
import pytest
import reference
from attention_bounds import (
    Told,
    backward_bound,
    forward_bounds,
    gathered,
    gradients,
    join,
    parts,
    shared,
    split,
    weights,
)
from guard import UNIT, Array, blank, check, compare, floats, summed
from numpy.random import Generator
from on_device import Adapter

BF16 = 2.0**-8  # relative error of a number rounded to bf16, which has eight significant bits
FLASH = (16, 32, 64, 128, 256)
OTHERS = (1, 5, 17, 24, 40, 80, 96, 200)
ORDERS = ("forward", "reverse", "shuffle")
WORKSPACE = {"channels": 1024, "vocab_size": 1024, "parameters": 1024, "tokens": 2048, "heads": 8, "head_size": 256}

# B, T, width of a head, and what attention is told: ragged about tiles of 16, 32, 64 and 128
PLAIN = (
    [(1, T, 64, Told(1, 1)) for T in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 128, 129, 130, 193)]
    + [(1, T, width, Told(2, 2)) for width in (16, 32, 128, 256) for T in (1, 17, 65, 130)]
    + [(2, 70, 64, Told(3, 3)), (3, 33, 16, Told(2, 2)), (0, 5, 64, Told(2, 2)), (2, 0, 64, Told(2, 2))]
    + [(1, 37, width, Told(2, 2)) for width in OTHERS]
    + [pytest.param(2, 300, 64, Told(2, 2), marks=pytest.mark.heavy)]
    + [pytest.param(1, 261, 256, Told(1, 1), marks=pytest.mark.heavy)]
)
# windows of one token, of less than a tile, across several, of all but the first token
TOLD = (
    [(1, 150, width, told) for width in (16, 64, 128, 40) for told in (Told(2, 1, window=33), Told(2, 1, 0.3, 0, 2.0))]
    + [(1, 150, 64, Told(2, 2, window=window)) for window in (1, 2, 31, 32, 64, 65, 149, 150, 1 << 40)]
    + [(1, 150, 64, Told(1, 1, 0.2, window, 1.5)) for window in (1, 40, 149)]
    + [(2, 70, 64, Told(6, 2, 0.05)), (1, 70, 32, Told(3, 1, 0.5, 20, 5.0)), (2, 40, 16, Told(4, 4, 1.5))]
    + [(1, 70, 256, Told(2, 1, window=24)), (1, 70, 256, Told(2, 1, 1 / 16, 40, 50.0)), (2, 40, 80, Told(3, 1, 1.0, 9))]
    + [(1, 40, 200, Told(4, 2, 0.1, 17, 3.0)), (0, 5, 64, Told(4, 2)), (2, 0, 64, Told(4, 2, window=3))]
)


def configured(dtype: str) -> Iterator[Adapter]:
    for ops in on_device.configured(dtype, WORKSPACE):
        ops.configure(dtype=dtype, attention="own")
        yield ops


@pytest.fixture
def ops() -> Iterator[Adapter]:
    """CUDA in bf16 with its own attention."""
    yield from configured("bf16")


@pytest.fixture(params=["fp32", "bf16"])
def either(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    yield from configured(request.param)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched from now on."""
    from llmc._cuda.compiler import Kernel

    names: list[str] = []
    call = Kernel.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.name)
        call(self, *args, **kwargs)

    monkeypatch.setattr(Kernel, "__call__", recorded)
    return names


def rounded(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def numbers(rng: Generator, *shape: int) -> Array:
    return rounded(floats(rng, *shape))


def stored(bound: Array, exact: Array) -> Array:
    """The bound of a result that is rounded to bf16."""
    return bound + BF16 * (np.abs(exact) + bound)


def attended(qkv: Array, told: Told) -> tuple[Array, Array]:
    """out, rounded to bf16, and lse."""
    B, T = qkv.shape[:2]
    D = qkv.shape[2] // (told.H + 2 * told.G)
    out, lse = blank(B, T, told.H * D), blank(B, told.H, T)
    reference.attention_forward(out, lse, qkv, *told.scalars(D))
    return rounded(out), lse


def check_forward(ops: Adapter, qkv: Array, told: Told) -> dict[str, Array]:
    q, k, v = parts(qkv, told)
    B, H, T, D = q.shape
    out, lse = forward_bounds(q, k, v, 0, told)
    p = weights(q, k, 0, told).p
    bound = stored(1.01 * out + BF16 * join(p @ np.abs(v)), join(p @ v))
    given = blank(B, T, H * D), blank(B, H, T), qkv, *told.scalars(D)
    return check(ops, "attention_forward", given, {"out": bound, "lse": lse})


def gradient_bound(dout: Array, qkv: Array, out: Array, lse: Array, told: Told) -> Array:
    """Of dqkv, given bf16 numbers but for lse."""
    q, k, _ = parts(qkv, told)
    do, g = split(dout, told.H), gradients(dout, qkv, out, lse, told)
    # sums of dP may begin with -delta
    off = BF16 * np.abs(g.ds) + UNIT * summed(q.shape[-1]) * g.p * np.abs(g.delta) * told.scalars(q.shape[-1])[0]
    rounding = off @ np.abs(k), off.swapaxes(-1, -2) @ np.abs(q), BF16 * g.p.swapaxes(-1, -2) @ np.abs(do)
    exact = g.ds @ k, g.ds.swapaxes(-1, -2) @ q, g.p.swapaxes(-1, -2) @ do
    bound = 1.01 * backward_bound(dout, qkv, out, lse, told) + gathered(*rounding, told)
    return stored(bound, gathered(*exact, told))


def check_backward(ops: Adapter, dout: Array, qkv: Array, told: Told) -> dict[str, Array]:
    out, lse = attended(qkv, told)
    given = blank(*qkv.shape), dout, qkv, out, lse, *told.scalars(out.shape[2] // told.H)
    return check(ops, "attention_backward", given, {"dqkv": gradient_bound(dout, qkv, out, lse, told)})


def packed(rng: Generator, B: int, T: int, width: int, told: Told) -> Array:
    """qkv."""
    return numbers(rng, B, T, (told.H + 2 * told.G) * width)


# ---- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, width, told", PLAIN + TOLD)
def test_forward(ops: Adapter, rng: Generator, B: int, T: int, width: int, told: Told) -> None:
    check_forward(ops, packed(rng, B, T, width, told), told)


@pytest.mark.parametrize("B, T, width, told", PLAIN + TOLD)
def test_backward(ops: Adapter, rng: Generator, B: int, T: int, width: int, told: Told) -> None:
    check_backward(ops, numbers(rng, B, T, told.H * width), packed(rng, B, T, width, told), told)


@pytest.mark.parametrize("told", [Told(2, 2), Told(2, 1, window=40), Told(2, 1, softcap=30.0)])
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("T, width", [(5, 64), (97, 16), (150, 64), (70, 24)])
def test_large_scores(ops: Adapter, rng: Generator, T: int, width: int, size: float, told: Told) -> None:
    """exp of the bare score overflows from 89 on."""
    qkv = packed(rng, 1, T, width, told)
    qkv[..., : (told.H + told.G) * width] *= np.float32((size / 3) ** 0.5)
    qkv = rounded(qkv)
    found = check_forward(ops, qkv, told)
    assert told.softcap or np.abs(found["lse"]).max() > size / 3
    check_backward(ops, numbers(rng, 1, T, 2 * width), qkv, told)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("T, width", [(1, 64), (17, 32), (130, 64), (70, 128), (40, 12)])
def test_equal_scores(ops: Adapter, rng: Generator, T: int, width: int, window: int) -> None:
    """No query: every key weighs the same, so out is a running mean and lse log(t + 1)."""
    qkv, told = numbers(rng, 1, T, 3 * width), Told(1, 1, window=window)
    qkv[..., :width] = 0
    found = check_forward(ops, qkv, told)
    values = qkv[0, :, 2 * width :].astype(np.float64)
    count = np.minimum(np.arange(1, T + 1), window or T)
    mean = np.array([values[t + 1 - count[t] : t + 1].mean(axis=0) for t in range(T)])
    np.testing.assert_allclose(found["out"][0], mean, atol=3 * BF16 * np.abs(qkv).max())
    np.testing.assert_allclose(found["lse"][0, 0], np.log(count), atol=1e-6)
    check_backward(ops, numbers(rng, 1, T, width), qkv, told)


@pytest.mark.parametrize("window, wrong", [(32, 31), (32, 33), (65, 64), (65, 66)])
def test_window_off_by_one(either: Adapter, rng: Generator, window: int, wrong: int) -> None:
    """One key more or less lies far outside what rounding costs."""
    told, T = Told(1, 1, window=window), 150
    qkv = numbers(rng, 1, T, 192)
    qkv[..., :64] = 0  # out is a mean
    out, other = (attended(qkv, told._replace(window=size))[0] for size in (window, wrong))
    found, lse = blank(1, T, 64), blank(1, 1, T)
    either.attention_forward(found, lse, qkv, *told.scalars(64))
    full = max(window, wrong)
    assert np.abs(out - other)[0, full:].max(axis=-1).min() > 4 * np.abs(found - out)[0, full:].max()


def test_a_window_of_all_is_none(either: Adapter, rng: Generator) -> None:
    qkv, dout = numbers(rng, 1, 150, 256), numbers(rng, 1, 150, 128)
    none, all_of_it, negative = (run(either, qkv, dout, Told(2, 1, window=window)) for window in (0, 150, -3))
    for one, other, another in zip(none, all_of_it, negative, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, another)


@pytest.mark.parametrize("width", [64, 40])
def test_a_soft_cap_that_caps_nothing(ops: Adapter, rng: Generator, width: int) -> None:
    """Far above the scores it changes little."""
    told, qkv, dout = Told(2, 1), numbers(rng, 1, 100, 4 * width), numbers(rng, 1, 100, 2 * width)
    none, far = (run(ops, qkv, dout, told._replace(softcap=cap)) for cap in (0.0, 1e4))
    for one, other in zip(none, far, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.05, atol=0.05)


# ---- what must not matter --------------------------------------------------------------------------


def run(ops: Adapter, qkv: Array, dout: Array, told: Told) -> tuple[Array, Array, Array]:
    """out, lse and dqkv, the latter from the former."""
    B, T, C = dout.shape
    out, lse, dqkv = blank(B, T, C), blank(B, told.H, T), blank(*qkv.shape)
    ops.attention_forward(out, lse, qkv, *told.scalars(C // told.H))
    ops.attention_backward(dqkv, dout, qkv, out, lse, *told.scalars(C // told.H))
    return out, lse, dqkv


WINDOWED = [Told(2, 2), Told(2, 1, window=50), Told(2, 1, softcap=4.0)]


@pytest.mark.parametrize("told", WINDOWED)
@pytest.mark.parametrize("width", [16, 64, 128, 24])
def test_the_future_does_not_exist(ops: Adapter, rng: Generator, width: int, told: Told) -> None:
    """Whatever numbers stand in later tokens change no bit of an earlier one's out, lse and query's gradient."""
    T, C = 150, 2 * width
    qkv, dout = packed(rng, 1, T, width, told), numbers(rng, 1, T, C)
    out, lse, dqkv = run(ops, qkv, dout, told)
    for t, later in ((1, 0.0), (17, 1e15), (64, 0.0), (100, 1e15), (128, 1e15), (149, 0.0)):
        changed, dchanged = qkv.copy(), dout.copy()
        changed[:, t:], dchanged[:, t:] = later, later
        again = run(ops, changed, dchanged, told)
        np.testing.assert_array_equal(again[0][:, :t], out[:, :t])
        np.testing.assert_array_equal(again[1][:, :, :t], lse[:, :, :t])
        np.testing.assert_array_equal(again[2][:, :t, :C], dqkv[:, :t, :C])


@pytest.mark.parametrize("told", WINDOWED)
@pytest.mark.parametrize("width", [16, 64, 128, 24])
def test_the_past_asks_for_nothing(ops: Adapter, rng: Generator, width: int, told: Told) -> None:
    """Whatever numbers stand in earlier queries and their gradients change no bit of a later key's and value's."""
    T, C = 150, 2 * width
    qkv, dout = packed(rng, 1, T, width, told), numbers(rng, 1, T, C)
    out, lse = attended(qkv, told)
    results = {}
    for t in (1, 17, 64, 100, 128):
        for earlier in (0.0, 3.0):
            changed, dchanged, dqkv = qkv.copy(), dout.copy(), blank(*qkv.shape)
            changed[:, :t, :C], dchanged[:, :t] = earlier, earlier
            ops.attention_backward(dqkv, dchanged, changed, out, lse, *told.scalars(width))
            results[t, earlier] = dqkv[:, t:, C:]
        np.testing.assert_array_equal(results[t, 0.0], results[t, 3.0])
    assert (results[1, 0.0] != 0).mean() > 0.98


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("told", [Told(1, 1), Told(2, 1, window=30), Told(2, 1, softcap=4.0)])
@pytest.mark.parametrize("width", [*FLASH, 24])
def test_tiles_of_the_future_are_not_read(ops: Adapter, rng: Generator, width: int, told: Told, bad: float) -> None:
    """Not even NaN matters in tokens of a later tile (in the same one, 0 times NaN is NaN)."""
    T, t, C = 200, 128, told.H * width
    qkv, dout = packed(rng, 1, T, width, told), numbers(rng, 1, T, C)
    out, lse, dqkv = run(ops, qkv, dout, told)
    changed, dchanged = qkv.copy(), dout.copy()
    changed[:, t:], dchanged[:, t:] = bad, bad
    again = run(ops, changed, dchanged, told)
    np.testing.assert_array_equal(again[0][:, :t], out[:, :t])
    np.testing.assert_array_equal(again[1][:, :, :t], lse[:, :, :t])
    np.testing.assert_array_equal(again[2][:, :t, :C], dqkv[:, :t, :C])
    assert np.isnan(again[0][:, t:]).all() or (bad == np.inf and told.softcap)
    # and of queries of an earlier tile, for the gradients of keys and values
    changed, dchanged = qkv.copy(), dout.copy()
    changed[:, :t, :C], dchanged[:, :t] = bad, bad
    dagain = blank(*qkv.shape)
    ops.attention_backward(dagain, dchanged, changed, out, lse, *told.scalars(width))
    np.testing.assert_array_equal(dagain[:, t:, C:], dqkv[:, t:, C:])


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("width", [*FLASH, 24])
def test_tiles_outside_the_window_are_not_read(ops: Adapter, rng: Generator, width: int, softcap: float) -> None:
    """NaN in tokens that are wholly before a query's window, or wholly after a key's: at most 127 further away."""
    T, window, told = 300, 20, Told(2, 1, window=20, softcap=softcap)
    qkv, dout = packed(rng, 1, T, width, told), numbers(rng, 1, T, 2 * width)
    out, lse, dqkv = run(ops, qkv, dout, told)
    t = 128  # tokens before it are NaN
    changed = qkv.copy()
    changed[:, :t] = np.nan
    again, first = run(ops, changed, dout, told), t + 128 + window - 1
    for one, other in zip((out, lse.swapaxes(1, 2), dqkv), (again[0], again[1].swapaxes(1, 2), again[2]), strict=True):
        np.testing.assert_array_equal(other[:, first:], one[:, first:])
    changed, dagain = qkv.copy(), blank(*qkv.shape)
    changed[:, 256:] = np.nan
    ops.attention_backward(dagain, dout, changed, out, lse, *told.scalars(width))
    np.testing.assert_array_equal(dagain[:, : 128 - window + 1], dqkv[:, : 128 - window + 1])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("t, softcap", [(0, 0.0), (40, 0.0), (40, 3.0), (99, 0.0)])
def test_nan_is_kept(ops: Adapter, rng: Generator, part: int, t: int, softcap: float) -> None:
    """A NaN in a query, a key or a value reaches the rows that use it, and lse where it is a score."""
    T, C = 100, 128
    qkv, out, lse = numbers(rng, 1, T, 3 * C), blank(1, T, C), blank(1, 2, T)
    qkv[0, t, part * C + 3] = np.nan  # in the first of two heads
    ops.attention_forward(out, lse, qkv, 0.125, 0, softcap)
    reached = [t] if part == 0 else list(range(t, T))
    if part == 2:
        assert np.isnan(out[0, reached, 3]).all()
    else:
        assert np.isnan(out[0, reached, :64]).all() and np.isnan(lse[0, 0, reached]).all()
    assert np.isfinite(out[0, :, 64:]).all() and np.isfinite(lse[0, 1]).all()


@pytest.mark.parametrize("told", [Told(2, 2), Told(3, 1, window=50, softcap=3.0)])
@pytest.mark.parametrize("width", [16, 64, 128, 256, 40])
def test_same_bits_every_time(
    either: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, width: int, told: Told
) -> None:
    """In whatever order threads and blocks run."""
    qkv, dout = packed(rng, 1, 150, width, told), numbers(rng, 1, 150, told.H * width)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SIMULATION_ORDER", order)
        results.append([x.tobytes() for x in run(either, qkv, dout, told)])
    assert results[0] == results[1] == results[2]
    assert np.isfinite(np.frombuffer(results[0][2], np.float32)).all()


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_order_of_the_blocks(ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Heads are worked on in groups, the last of which may be smaller; it shows in no bit."""
    from llmc._cuda import attention

    B, T, width, told = 2, 150, 64, Told(6, 3)
    qkv, dout = packed(rng, B, T, width, told), numbers(rng, B, T, told.H * width)
    whole = run(ops, qkv, dout, told)
    monkeypatch.setattr(attention, "L2_NBYTES", group * 4 * T * width)
    for one, other in zip(whole, run(ops, qkv, dout, told), strict=True):
        np.testing.assert_array_equal(one, other)


def test_grouped_heads_are_repeated_ones(either: Adapter, rng: Generator) -> None:
    """out and lse are those of heads that each have the shared keys to themselves; of gradients, dq is."""
    T, width, told = 70, 64, Told(6, 2)
    qkv, dout = packed(rng, 1, T, width, told), numbers(rng, 1, T, 6 * width)
    q, k, v = parts(qkv, told)
    apart = np.ascontiguousarray(np.concatenate([join(q), join(k), join(v)], axis=-1), np.float32)
    found, alone = run(either, qkv, dout, told), run(either, apart, dout, Told(6, 6))
    np.testing.assert_array_equal(found[0], alone[0])
    np.testing.assert_array_equal(found[1], alone[1])
    np.testing.assert_array_equal(found[2][..., : 6 * width], alone[2][..., : 6 * width])


# ---- decoding --------------------------------------------------------------------------------------


class Cache:
    """keys and values (B,maxT,G D) of `positions` tokens of each sequence; all else is NaN."""

    def __init__(self, rng: Generator, positions: list[int], maxT: int, width: int, told: Told) -> None:
        self.positions, self.told, self.width = np.array(positions, np.int32), told, width
        self.keys, self.values = (numbers(rng, len(positions), maxT, told.G * width) for _ in range(2))
        for b, position in enumerate(positions):
            for array in (self.keys, self.values):
                array[b, position:] = np.nan
                if told.window:
                    array[b, : max(0, position + 1 - told.window)] = np.nan

    def bound(self, qkv: Array, bf16: bool) -> Array:
        """Of out, sequence by sequence."""
        H, G, D = self.told.H, self.told.G, self.width
        rows = []
        for b, position in enumerate(self.positions):
            q, k, v = np.split(qkv[b : b + 1], [H * D, (H + G) * D], axis=-1)
            keys, values = (
                shared(np.nan_to_num(np.concatenate([cache[b : b + 1, :position], new], axis=1)), self.told)
                for cache, new in ((self.keys, k), (self.values, v))
            )
            bound, _ = forward_bounds(split(q, H), keys, values, int(position), self.told)
            if bf16:
                p = weights(split(q, H), keys, int(position), self.told).p
                bound = stored(bound, join(p @ values))
            rows.append(bound)
        return np.concatenate(rows)

    def given(self, qkv: Array) -> tuple[Any, ...]:
        out = blank(*qkv.shape[:2], self.told.H * self.width)
        return out, self.keys, self.values, qkv, self.positions, self.told.H, *self.told.scalars(self.width)


@pytest.mark.parametrize("told", [Told(2, 2), Told(4, 2, window=7), Told(2, 1, 0.2, 0, 2.0)])
@pytest.mark.parametrize("chunks", [[1] * 20, [20], [1, 3, 16], [150, 1]])
@pytest.mark.parametrize("width", [5, 64, 80, 256])
def test_decode(ops: Adapter, rng: Generator, width: int, chunks: list[int], told: Told) -> None:
    """A cache filled by chunks gives what attention_forward gives for the whole."""
    B, T = 2, sum(chunks)
    qkv = packed(rng, B, T, width, told)
    whole = np.empty((B, T, told.H * width))
    reference.attention_forward(whole, np.empty((B, told.H, T)), qkv, *told.scalars(width))
    cache, position = Cache(rng, [0, 0], T + 2, width, told), 0
    for size in chunks:
        part = np.ascontiguousarray(qkv[:, position : position + size])
        bound = cache.bound(part, True)
        found = check(ops, "attention_decode", cache.given(part), {"out": bound, "keys": 0, "values": 0})
        compare("attention_decode", "out", found["out"], whole[:, position : position + size], bound)
        position += size
        cache.keys, cache.values = found["keys"].copy(), found["values"].copy()
        cache.positions = np.full(B, position, np.int32)


@pytest.mark.parametrize(
    "positions, T, width, told",
    [([0, 130, 700], 1, 64, told) for told in (Told(2, 2), Told(4, 1, window=300), Told(2, 1, 0.2, 0, 2.0))]
    + [([126, 127, 128], 1, width, Told(2, 1, 0.3, window)) for width in (3, 80, 256) for window in (0, 128, 257)]
    + [([100, 3], 30, 64, told) for told in (Told(2, 2), Told(4, 2, window=129))]
    + [([300], T, 64, Told(2, 1)) for T in (2, 200, 300)],  # blocks for each as needed, two, one
)
def test_decode_split_over_keys(
    either: Adapter, rng: Generator, launched: list[str], positions: list[int], T: int, width: int, told: Told
) -> None:
    """Several blocks share a query where the cache is long enough, each sequence with keys of its own number; those
    that a window leaves out are not read."""
    cache, qkv = Cache(rng, positions, 900, width, told), packed(rng, len(positions), T, width, told)
    check(
        either, "attention_decode", cache.given(qkv),
        {"out": cache.bound(qkv, either.bf16), "keys": 0, "values": 0},
    )  # fmt: skip
    several = len(positions) * told.H * T <= 512 and told.window != 128
    assert ("attention_decode_combine" in launched) == several


@pytest.mark.parametrize("maxT", [100, 900])
def test_decode_in_a_recording(ops: Adapter, rng: Generator, maxT: int) -> None:
    """A replay attends from the places that sequences have by then, and refuses those that the cache has not."""
    from llmc import _cuda

    B, width, told = 2, 64, Told(4, 2)
    device = {
        name: ops.empty(shape, "int32" if name == "positions" else "bfloat16")
        for name, shape in (
            ("out", (B, 1, 256)), ("keys", (B, maxT, 128)), ("values", (B, maxT, 128)), ("qkv", (B, 1, 512)),
            ("positions", (B,)),
        )
    }  # fmt: skip
    scalars = told.scalars(width)
    replay = _cuda.record(lambda: _cuda.attention_decode(*device.values(), told.H, *scalars))
    for positions in ([0, 5], [3, 2], [maxT - 1, 40], [1, maxT - 1], [0, 0]):
        cache, qkv = Cache(rng, positions, maxT, width, told), packed(rng, B, 1, width, told)
        exact, keys, values = np.empty((B, 1, 256)), cache.keys.copy(), cache.values.copy()
        reference.attention_decode(exact, keys, values, qkv, cache.positions, told.H, *scalars)
        for name, array in (
            ("keys", cache.keys), ("values", cache.values), ("qkv", qkv), ("positions", cache.positions),
        ):  # fmt: skip
            device[name][...] = array
        replay()
        compare("attention_decode", "out", np.asarray(device["out"]).astype(np.float32), exact, cache.bound(qkv, True))
        np.testing.assert_array_equal(np.asarray(device["keys"]).astype(np.float32), keys)
        np.testing.assert_array_equal(np.asarray(device["values"]).astype(np.float32), values)
    for wrong in ([0, maxT], [-1, 0]):
        device["positions"][...] = wrong
        with pytest.raises(ValueError, match=f"positions: 1 tokens from {max(wrong, key=abs)} at .* exceed"):
            replay()


# ---- which kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("width", [*FLASH, *OTHERS])
def test_the_kernels_that_are_meant(
    ops: Adapter, rng: Generator, launched: list[str], width: int, softcap: float
) -> None:
    from llmc._cuda import attention

    run(ops, numbers(rng, 1, 20, 4 * width), numbers(rng, 1, 20, 2 * width), Told(2, 1, softcap=softcap))
    assert len(launched) == (4 if width in FLASH and (width == 256 or softcap) else 3)
    kind = ("flash_softcap_" if softcap else "flash_") if width in FLASH else "attention_"
    assert {name.split("forward")[0].split("backward")[0] for name in launched} == {kind}
    assert attention.kind(width) == ("flash" if width in FLASH else "simple")


def test_float32_takes_the_simple_kernels(rng: Generator, launched: list[str]) -> None:
    from llmc._cuda import attention

    for ops in configured("fp32"):
        run(ops, floats(rng, 1, 20, 192), floats(rng, 1, 20, 64), Told(1, 1))
        assert {name.partition("_")[0] for name in launched} == {"attention"}
        assert attention.kind(64) == "simple"


def test_rows_that_are_not_aligned(either: Adapter, rng: Generator, launched: list[str]) -> None:
    """Flash kernels, and in float32 the others, read 16 bytes at a time; not so a view that begins between two."""
    ops, B, T, C, told = either, 1, 40, 128, Told(2, 2)
    dtype = "bfloat16" if ops.bf16 else "float32"

    def moved(values: Array) -> Any:
        array = ops.empty((values.size + 1,), dtype)[1:].reshape(values.shape)
        array[...] = values
        return array

    qkv, dout = numbers(rng, B, T, 3 * C), numbers(rng, B, T, C)
    out, lse = attended(qkv, told)
    found, statistics, gradient = moved(blank(B, T, C)), ops.empty((B, 2, T), "float32"), moved(blank(B, T, 3 * C))
    ops.attention_forward(found, statistics, moved(qkv), *told.scalars(64))
    statistics[...] = lse
    ops.attention_backward(gradient, moved(dout), moved(qkv), moved(out), statistics, *told.scalars(64))
    assert not any(name.startswith("flash") for name in launched)
    np.testing.assert_allclose(np.asarray(found).astype(np.float32), out, rtol=2 * BF16, atol=2 * BF16)
    exact = np.empty((B, T, 3 * C))
    reference.attention_backward(exact, dout, qkv, out, lse, *told.scalars(64))
    bound = gradient_bound(dout, qkv, out, lse, told)
    compare("attention_backward", "dqkv", np.asarray(gradient).astype(np.float32), exact, bound)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "attention_decode"])
def test_heads_that_are_too_wide(either: Adapter, op: str) -> None:
    C = 2 * 257
    out, lse, qkv, cache = blank(1, 3, C), blank(1, 2, 3), blank(1, 3, 3 * C), blank(1, 5, C)
    given: dict[str, tuple[Any, ...]] = {
        "attention_forward": (out, lse, qkv, 1.0, 0, 0.0),
        "attention_backward": (blank(1, 3, 3 * C), out.copy(), qkv, out, lse, 1.0, 0, 0.0),
        "attention_decode": (out, cache, cache.copy(), qkv, np.array([1], np.int32), 2, 1.0, 0, 0.0),
    }
    with pytest.raises(ValueError, match=r"(lse|H): a head of 257 channels; attention on a GPU takes at most 256"):
        getattr(either, op)(*given[op])


@pytest.mark.parametrize("channels", [6 * 8, 7 * 8, 8 * 8 + 1, 4 * 8 + 8, 4 * 8 + 6 * 8, 4 * 8, 2 * 8])
def test_heads_that_cannot_be_shared(either: Adapter, rng: Generator, channels: int) -> None:
    """4 heads of 8 share 1, 2 or 4; of `channels` for queries, keys and values 48, 64 and 96 are right."""
    out, lse, qkv = blank(1, 3, 32), blank(1, 4, 3), blank(1, 3, channels)
    if channels == 48:
        either.attention_forward(out, lse, qkv, 1.0, 0, 0.0)
        return
    with pytest.raises(ValueError, match=f"qkv: ({channels}|{(channels - 32) // 2}) channels"):
        either.attention_forward(out, lse, qkv, 1.0, 0, 0.0)


@pytest.mark.parametrize("scalars, name", [
    ((0.0, 0, 0.0), "scale"), ((-1.0, 0, 0.0), "scale"), ((np.nan, 0, 0.0), "scale"), ((np.inf, 0, 0.0), "scale"),
    ((1.0, 0, np.nan), "softcap"), ((1.0, 0, np.inf), "softcap"),
])  # fmt: skip
def test_scalars_that_mean_nothing(either: Adapter, scalars: tuple[Any, ...], name: str) -> None:
    out, lse, qkv, cache = blank(1, 3, 16), blank(1, 2, 3), blank(1, 3, 48), blank(1, 5, 16)
    for op, given in {
        "attention_forward": (out, lse, qkv), "attention_backward": (qkv.copy(), out.copy(), qkv, out, lse),
        "attention_decode": (out, cache, cache.copy(), qkv, np.array([1], np.int32), 2),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: must be"):
            getattr(either, op)(*given, *scalars)


@pytest.mark.parametrize("width", [64, 40])
def test_workspace(ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """As much is asked for as is written (the simulated GPU's memory ends there), and `reserve` makes no less."""
    from llmc._cuda import attention, device

    asked: list[Any] = []

    def workspace(nbytes: int) -> int:
        asked.append(ops.empty((nbytes,), "uint8"))
        return int(asked[-1].ptr)

    monkeypatch.setattr(device, "workspace", workspace)
    B, T, H = 2, 8, 3
    run(ops, numbers(rng, B, T, 3 * H * width), numbers(rng, B, T, H * width), Told(H, H))
    assert len(asked) == 1 and asked[0].nbytes == 4 * B * H * T  # delta
    assert np.asarray(asked[0]).view(np.float32).all()
    cache = Cache(rng, [640, 200], 700, width, Told(H, H))
    ops.attention_decode(*cache.given(numbers(rng, B, 1, 3 * H * width)))
    left = np.asarray(asked[1]).view(np.float32).reshape(B, H, -1, width + 2)  # sums, maximum, denominator
    assert left.shape[2] == 6 and (left[0, ..., -1] > 0.99).all()
    assert (left[1, :, :2, -1] > 0.99).all() and not left[1, :, 2:].any()  # 201 keys are no more than two blocks'
    for array, tokens in zip(asked, (B * T, B), strict=True):
        assert array.nbytes <= attention.scratch_nbytes(H * width, 1, 1, tokens, H, width)
    assert attention.scratch_nbytes(768, 50304, 1, 1, 12, 64) == 4 * attention.DECODE_BLOCKS * 66
    assert attention.scratch_nbytes(768, 50304, 1, 1 << 16, 12, 64) == 4 * 12 << 16


def test_cudnn_is_called_where_it_was_chosen(ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc._cuda import attention, cudnn, device

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(device, "attention", "cudnn")
    monkeypatch.setattr(cudnn, "forward", lambda *arrays: calls.append(("forward", *arrays)))
    monkeypatch.setattr(cudnn, "backward", lambda *arrays: calls.append(("backward", *arrays)))
    out, dout, qkv, dqkv = (ops.empty((1, 3, C), "bfloat16") for C in (64, 64, 128, 128))
    lse = ops.empty((1, 2, 3), "float32")
    for window, softcap in ((0, 0.0), (3, 0.0), (-1, 0.0)):
        attention.attention_forward(out, lse, qkv, 0.5, window, softcap)
        attention.attention_backward(dqkv, dout, qkv, out, lse, 0.5, window, softcap)
        assert calls == [("forward", out, lse, qkv, 1, 0.5), ("backward", dqkv, dout, qkv, out, lse, 1, 0.5)]
        calls.clear()
    for asked in (False, True):  # not even where it was asked for: it is not known to take these
        monkeypatch.setattr(device, "attention_asked", asked)
        for window, softcap in ((2, 0.0), (0, 5.0)):
            attention.attention_forward(out, lse, qkv, 0.5, window, softcap)
            attention.attention_backward(dqkv, dout, qkv, out, lse, 0.5, window, softcap)
    assert not calls
