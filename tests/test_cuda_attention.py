"""Attention on a GPU, or a simulated one, beyond test_attention.py: bfloat16 on tensor cores, and decoding that is
split over keys.

Inputs are bf16 numbers, so the bounds of float32 hold, and what rounding adds to them: of P and dS, once each, before
they are multiplied, and of what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import on_device
import pytest
import reference
from guard import UNIT, Array, blank, check, compare, floats, summed
from numpy.random import Generator
from on_device import Adapter
from test_attention import backward_bound, forward_bounds, join, large_scores, split, weights

BF16 = 2.0**-8  # relative error of a number rounded to bf16, which has eight significant bits
FLASH = (16, 32, 64, 128, 256)
OTHERS = (1, 5, 17, 24, 40, 80, 96, 200)
ORDERS = ("forward", "reverse", "shuffle")
WORKSPACE = {"channels": 1024, "vocab_size": 1024, "parameters": 1024, "tokens": 2048, "heads": 8}

# B, T, H, width of a head: ragged about tiles of 16, 32, 64 and 128
SHAPES = (
    [(1, T, 1, 64) for T in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 128, 129, 130, 193)]
    + [(1, T, 2, width) for width in (16, 32, 128, 256) for T in (1, 17, 65, 130)]
    + [(2, 70, 3, 64), (3, 33, 2, 16), (0, 5, 2, 64), (2, 0, 2, 64)]
    + [(1, 37, 2, width) for width in OTHERS]
    + [pytest.param(2, 300, 2, 64, marks=pytest.mark.heavy), pytest.param(1, 261, 1, 256, marks=pytest.mark.heavy)]
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


def check_forward(ops: Adapter, qkv: Array, H: int) -> dict[str, Array]:
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (split(part, H) for part in np.split(qkv, 3, axis=-1))
    out, lse = forward_bounds(q, k, v, 0)
    p = weights(q, k, 0)[2]
    bound = stored(1.01 * out + BF16 * join(p @ np.abs(v)), join(p @ v))
    return check(ops, "attention_forward", (blank(B, T, C), blank(B, H, T), qkv), {"out": bound, "lse": lse})


def gradient_bound(dout: Array, qkv: Array, out: Array, lse: Array) -> Array:
    """Of dqkv, given bf16 numbers but for lse."""
    H = lse.shape[1]
    q, k, v, do, o = (split(part, H) for part in (*np.split(qkv, 3, axis=-1), dout, out))
    scale, past = 1 / math.sqrt(max(1, q.shape[-1])), np.tri(q.shape[2], dtype=bool)
    p = np.where(past, np.exp(np.where(past, q @ k.swapaxes(-1, -2) * scale - lse.astype(np.float64)[..., None], 0)), 0)
    delta = (do * o).sum(axis=-1, keepdims=True)
    ds = p * (do @ v.swapaxes(-1, -2) - delta) * scale
    # sums of dP may begin with -delta
    off = BF16 * np.abs(ds) + UNIT * summed(q.shape[-1]) * p * np.abs(delta) * scale
    rounding = off @ np.abs(k), off.swapaxes(-1, -2) @ np.abs(q), BF16 * p.swapaxes(-1, -2) @ np.abs(do)
    exact = ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ do
    bound = 1.01 * backward_bound(dout, qkv, out, lse) + np.concatenate([join(part) for part in rounding], axis=-1)
    return stored(bound, np.concatenate([join(part) for part in exact], axis=-1))


def forward(qkv: Array, H: int) -> tuple[Array, Array]:
    """out, rounded to bf16, and lse."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out, lse = blank(B, T, C), blank(B, H, T)
    reference.attention_forward(out, lse, qkv)
    return rounded(out), lse


def check_backward(ops: Adapter, dout: Array, qkv: Array, H: int) -> dict[str, Array]:
    out, lse = forward(qkv, H)
    given = (blank(*qkv.shape), dout, qkv, out, lse)
    return check(ops, "attention_backward", given, {"dqkv": gradient_bound(dout, qkv, out, lse)})


# ---- against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, H, width", SHAPES)
def test_forward(ops: Adapter, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    check_forward(ops, numbers(rng, B, T, 3 * H * width), H)


@pytest.mark.parametrize("B, T, H, width", SHAPES)
def test_backward(ops: Adapter, rng: Generator, B: int, T: int, H: int, width: int) -> None:
    check_backward(ops, numbers(rng, B, T, H * width), numbers(rng, B, T, 3 * H * width), H)


@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("T, width", [(5, 64), (97, 16), (150, 64), (70, 24)])
def test_large_scores(ops: Adapter, rng: Generator, T: int, width: int, size: float) -> None:
    """exp of the bare score overflows from 89 on."""
    qkv = rounded(large_scores(rng, 1, T, 2, width, size))
    found = check_forward(ops, qkv, 2)
    assert np.abs(found["lse"]).max() > size / 3
    check_backward(ops, numbers(rng, 1, T, 2 * width), qkv, 2)


@pytest.mark.parametrize("T, width", [(1, 64), (17, 32), (130, 64), (70, 128), (40, 12)])
def test_equal_scores(ops: Adapter, rng: Generator, T: int, width: int) -> None:
    """No query: every key weighs the same, so out is a running mean and lse log(t + 1)."""
    qkv = numbers(rng, 1, T, 3 * width)
    qkv[..., :width] = 0
    found = check_forward(ops, qkv, 1)
    count = np.arange(1, T + 1)
    mean = np.cumsum(qkv[0, :, 2 * width :].astype(np.float64), axis=0) / count[:, None]
    np.testing.assert_allclose(found["out"][0], mean, atol=3 * BF16 * np.abs(qkv).max())
    np.testing.assert_allclose(found["lse"][0, 0], np.log(count), atol=1e-6)
    check_backward(ops, numbers(rng, 1, T, width), qkv, 1)


# ---- what must not matter --------------------------------------------------------------------------


def run(ops: Adapter, qkv: Array, dout: Array, H: int) -> tuple[Array, Array, Array]:
    """out, lse and dqkv, the latter from the former."""
    B, T, C = dout.shape
    out, lse, dqkv = blank(B, T, C), blank(B, H, T), blank(B, T, 3 * C)
    ops.attention_forward(out, lse, qkv)
    ops.attention_backward(dqkv, dout, qkv, out, lse)
    return out, lse, dqkv


@pytest.mark.parametrize("width", [16, 64, 128, 24])
def test_the_future_does_not_exist(ops: Adapter, rng: Generator, width: int) -> None:
    """Whatever numbers stand in later tokens change no bit of an earlier one's out, lse and query's gradient."""
    T, C = 150, 2 * width
    qkv, dout = numbers(rng, 1, T, 3 * C), numbers(rng, 1, T, C)
    out, lse, dqkv = run(ops, qkv, dout, 2)
    for t in (1, 17, 63, 64, 100, 128, 149):
        for later in (0.0, 1e15):
            changed, dchanged = qkv.copy(), dout.copy()
            changed[:, t:], dchanged[:, t:] = later, later
            again = run(ops, changed, dchanged, 2)
            np.testing.assert_array_equal(again[0][:, :t], out[:, :t])
            np.testing.assert_array_equal(again[1][:, :, :t], lse[:, :, :t])
            np.testing.assert_array_equal(again[2][:, :t, :C], dqkv[:, :t, :C])


@pytest.mark.parametrize("width", [16, 64, 128, 24])
def test_the_past_asks_for_nothing(ops: Adapter, rng: Generator, width: int) -> None:
    """Whatever numbers stand in earlier queries and their gradients change no bit of a later key's and value's."""
    T, C = 150, 2 * width
    qkv, dout = numbers(rng, 1, T, 3 * C), numbers(rng, 1, T, C)
    out, lse = forward(qkv, 2)
    results = {}
    for t in (1, 17, 64, 100, 128):
        for earlier in (0.0, 3.0):
            changed, dchanged, dqkv = qkv.copy(), dout.copy(), blank(1, T, 3 * C)
            changed[:, :t, :C], dchanged[:, :t] = earlier, earlier
            ops.attention_backward(dqkv, dchanged, changed, out, lse)
            results[t, earlier] = dqkv[:, t:, C:]
        np.testing.assert_array_equal(results[t, 0.0], results[t, 3.0])
    assert (results[1, 0.0] != 0).mean() > 0.99


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("width", [*FLASH, 24])
def test_tiles_of_the_future_are_not_read(ops: Adapter, rng: Generator, width: int, bad: float) -> None:
    """Not even NaN matters in tokens of a later tile (in the same one, 0 times NaN is NaN)."""
    T, t, C = 200, 128, width
    qkv, dout = numbers(rng, 1, T, 3 * C), numbers(rng, 1, T, C)
    out, lse, dqkv = run(ops, qkv, dout, 1)
    changed, dchanged = qkv.copy(), dout.copy()
    changed[:, t:], dchanged[:, t:] = bad, bad
    again = run(ops, changed, dchanged, 1)
    np.testing.assert_array_equal(again[0][:, :t], out[:, :t])
    np.testing.assert_array_equal(again[1][:, :, :t], lse[:, :, :t])
    np.testing.assert_array_equal(again[2][:, :t, :C], dqkv[:, :t, :C])
    assert np.isnan(again[0][:, t:]).all()
    # and of queries of an earlier tile, for the gradients of keys and values
    changed, dchanged = qkv.copy(), dout.copy()
    changed[:, :t, :C], dchanged[:, :t] = bad, bad
    dagain = blank(1, T, 3 * C)
    ops.attention_backward(dagain, dchanged, changed, out, lse)
    np.testing.assert_array_equal(dagain[:, t:, C:], dqkv[:, t:, C:])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("t", [0, 40, 99])
def test_nan_is_kept(ops: Adapter, rng: Generator, part: int, t: int) -> None:
    """A NaN in a query, a key or a value reaches the rows that use it, and lse where it is a score."""
    T, C = 100, 128
    qkv, out, lse = numbers(rng, 1, T, 3 * C), blank(1, T, C), blank(1, 2, T)
    qkv[0, t, part * C + 3] = np.nan  # in the first of two heads
    ops.attention_forward(out, lse, qkv)
    reached = [t] if part == 0 else list(range(t, T))
    if part == 2:
        assert np.isnan(out[0, reached, 3]).all()
    else:
        assert np.isnan(out[0, reached, :64]).all() and np.isnan(lse[0, 0, reached]).all()
    assert np.isfinite(out[0, :, 64:]).all() and np.isfinite(lse[0, 1]).all()


@pytest.mark.parametrize("width", [16, 64, 128, 256, 40])
def test_same_bits_every_time(
    either: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """In whatever order threads and blocks run."""
    qkv, dout = numbers(rng, 1, 150, 6 * width), numbers(rng, 1, 150, 2 * width)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SIMULATION_ORDER", order)
        results.append([x.tobytes() for x in run(either, qkv, dout, 2)])
    assert results[0] == results[1] == results[2]
    assert np.isfinite(np.frombuffer(results[0][2], np.float32)).all()


@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_order_of_the_blocks(ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Heads are worked on in groups, the last of which may be smaller; it shows in no bit."""
    from llmc._cuda import attention

    B, T, H, width = 2, 150, 3, 64
    qkv, dout = numbers(rng, B, T, 3 * H * width), numbers(rng, B, T, H * width)
    whole = run(ops, qkv, dout, H)
    monkeypatch.setattr(attention, "L2_NBYTES", group * 4 * T * width)
    for one, other in zip(whole, run(ops, qkv, dout, H), strict=True):
        np.testing.assert_array_equal(one, other)


# ---- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[1] * 20, [20], [1, 3, 16], [150, 1]])
@pytest.mark.parametrize("width", [5, 64, 80, 256])
def test_decode(ops: Adapter, rng: Generator, width: int, chunks: list[int]) -> None:
    """A cache filled by chunks gives what attention_forward gives for the whole."""
    B, H, T = 2, 2, sum(chunks)
    C, maxT = H * width, T + 2
    qkv = numbers(rng, B, T, 3 * C)
    whole = np.empty((B, T, C))
    reference.attention_forward(whole, np.empty((B, H, T)), qkv)
    keys, values = np.full((B, maxT, C), np.nan, np.float32), np.full((B, maxT, C), np.nan, np.float32)
    position = 0
    for size in chunks:
        end = position + size
        part = np.ascontiguousarray(qkv[:, position:end])
        k, v = (split(np.ascontiguousarray(qkv[:, :end, i * C : (i + 1) * C]), H) for i in (1, 2))
        bound = stored(forward_bounds(split(part[..., :C], H), k, v, position)[0], whole[:, position:end])
        given = (blank(B, size, C), keys, values, part, H, position)
        found = check(ops, "attention_decode", given, {"out": bound, "keys": 0, "values": 0})
        compare("attention_decode", "out", found["out"], whole[:, position:end], bound)
        keys, values, position = found["keys"].copy(), found["values"].copy(), end


@pytest.mark.parametrize("width", [3, 64, 80, 256])
@pytest.mark.parametrize("position, T", [(254, 1), (255, 1), (300, 2), (700, 1), (100, 160)])
def test_decode_split_over_keys(
    either: Adapter, rng: Generator, launched: list[str], position: int, T: int, width: int
) -> None:
    """From 256 tokens on several blocks share a query; of (100, 160) some have no key at all."""
    B, H, maxT = 1, 2, position + T + 1
    C = H * width
    keys, values, qkv = numbers(rng, B, maxT, C), numbers(rng, B, maxT, C), numbers(rng, B, T, 3 * C)
    keys[:, position:], values[:, position:] = np.nan, np.nan
    k, v = (
        split(np.concatenate([cache[:, :position], qkv[..., i * C : (i + 1) * C]], axis=1), H)
        for i, cache in ((1, keys), (2, values))
    )
    q = split(qkv[..., :C], H)
    bound, _ = forward_bounds(q, k, v, position)
    if either.bf16:
        bound = stored(bound, join(weights(q, k, position)[2] @ v))
    given = (blank(B, T, C), keys, values, qkv, H, position)
    check(either, "attention_decode", given, {"out": bound, "keys": 0, "values": 0})
    assert ("attention_decode_combine" in launched) == (position + T >= 256)


# ---- which kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [*FLASH, *OTHERS])
def test_the_kernels_that_are_meant(ops: Adapter, rng: Generator, launched: list[str], width: int) -> None:
    from llmc._cuda import attention

    run(ops, numbers(rng, 1, 20, 6 * width), numbers(rng, 1, 20, 2 * width), 2)
    assert len(launched) == (4 if width == 256 else 3)
    assert all(name.startswith("flash_") == (width in FLASH) for name in launched), launched
    assert attention.kind(width) == ("flash" if width in FLASH else "simple")


def test_float32_takes_the_simple_kernels(rng: Generator, launched: list[str]) -> None:
    from llmc._cuda import attention

    for ops in configured("fp32"):
        run(ops, floats(rng, 1, 20, 192), floats(rng, 1, 20, 64), 1)
        assert {name.partition("_")[0] for name in launched} == {"attention"}
        assert attention.kind(64) == "simple"


def test_rows_that_are_not_aligned(either: Adapter, rng: Generator, launched: list[str]) -> None:
    """Flash kernels, and in float32 the others, read 16 bytes at a time; not so a view that begins between two."""
    ops, B, T, C = either, 1, 40, 128
    dtype = "bfloat16" if ops.bf16 else "float32"

    def moved(values: Array) -> Any:
        array = ops.empty((values.size + 1,), dtype)[1:].reshape(values.shape)
        array[...] = values
        return array

    qkv, dout = numbers(rng, B, T, 3 * C), numbers(rng, B, T, C)
    out, lse = forward(qkv, 2)
    found, statistics, gradient = moved(blank(B, T, C)), ops.empty((B, 2, T), "float32"), moved(blank(B, T, 3 * C))
    ops.attention_forward(found, statistics, moved(qkv))
    statistics[...] = lse
    ops.attention_backward(gradient, moved(dout), moved(qkv), moved(out), statistics)
    assert not any(name.startswith("flash") for name in launched)
    np.testing.assert_allclose(np.asarray(found).astype(np.float32), out, rtol=2 * BF16, atol=2 * BF16)
    exact = np.empty((B, T, 3 * C))
    reference.attention_backward(exact, dout, qkv, out, lse)
    bound = gradient_bound(dout, qkv, out, lse)
    compare("attention_backward", "dqkv", np.asarray(gradient).astype(np.float32), exact, bound)


@pytest.mark.parametrize("op", ["attention_forward", "attention_backward", "attention_decode"])
def test_heads_that_are_too_wide(either: Adapter, op: str) -> None:
    C = 2 * 257
    out, lse, qkv, cache = blank(1, 3, C), blank(1, 2, 3), blank(1, 3, 3 * C), blank(1, 5, C)
    given: dict[str, tuple[Any, ...]] = {
        "attention_forward": (out, lse, qkv),
        "attention_backward": (blank(1, 3, 3 * C), out.copy(), qkv, out, lse),
        "attention_decode": (out, cache, cache.copy(), qkv, 2, 1),
    }
    with pytest.raises(ValueError, match=r"(lse|H): a head of 257 channels; attention on a GPU takes at most 256"):
        getattr(either, op)(*given[op])


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
    run(ops, numbers(rng, B, T, 3 * H * width), numbers(rng, B, T, H * width), H)
    assert len(asked) == 1 and asked[0].nbytes == 4 * B * H * T  # delta
    assert np.asarray(asked[0]).view(np.float32).all()
    cache, qkv = numbers(rng, B, 700, H * width), numbers(rng, B, 1, 3 * H * width)
    ops.attention_decode(blank(B, 1, H * width), cache, cache.copy(), qkv, H, 640)
    left = np.asarray(asked[1]).view(np.float32).reshape(B * H, -1, width + 2)  # sums, maximum, denominator
    assert left.shape[1] == 641 // attention.DECODE_KEYS and (left[..., -1] > 1).all()
    for array, tokens in zip(asked, (B * T, B), strict=True):
        assert array.nbytes <= attention.scratch_nbytes(H * width, 1, 1, tokens, H)
    most = attention.DECODE_BLOCKS * (attention.WIDEST[-1] + 2)
    assert attention.scratch_nbytes(768, 50304, 1, 1, 12) == 4 * most
    assert attention.scratch_nbytes(768, 50304, 1, 1 << 16, 12) == 4 * 12 << 16


def test_cudnn_is_called_where_it_was_chosen(ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmc._cuda import attention, cudnn, device

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(device, "attention", "cudnn")
    monkeypatch.setattr(cudnn, "forward", lambda *arrays: calls.append(("forward", *arrays)))
    monkeypatch.setattr(cudnn, "backward", lambda *arrays: calls.append(("backward", *arrays)))
    out, dout, qkv, dqkv = (ops.empty((1, 3, C), "bfloat16") for C in (64, 64, 192, 192))
    lse = ops.empty((1, 1, 3), "float32")
    attention.attention_forward(out, lse, qkv)
    attention.attention_backward(dqkv, dout, qkv, out, lse)
    assert calls == [("forward", out, lse, qkv), ("backward", dqkv, dout, qkv, out, lse)]
