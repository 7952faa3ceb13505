"""Ops of a GPU, or a simulated one, that store bfloat16: all but linear layers and attention.

Inputs are bf16 numbers, so the bounds of float32 hold (those of the op's own test file), and `stored` adds what it
costs to round a result once.  What is one operation is held to the bit.  Threads run in both orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import guard
import numpy as np
import on_device
import pytest
import reference
from guard import PLACES, UNIT, Arguments, Array, Sizes, blank, call, check, expect, floats, names, number, summed
from numpy.random import Generator
from on_device import Adapter
from test_activation import gate_bounds, gelu_backward_bound, gelu_forward_bound
from test_bf16 import BF16, hard_numbers, numbers, rounded
from test_embed import forward_bound, tokens_for
from test_head import bounds_of, capped_and_bound, logits_and_bound, padded, targets_for
from test_norm import EPS, backward_bounds, forward_bounds, rms_backward_bounds, rms_bounds
from test_optimizer import Spans, Update, adamw_bounds, state
from test_philox import bound as normal_bound
from test_rope import angles
from test_rope import bound as rope_bound

from llmc._cuda import device, embed, head, norm, optimizer

SMALLEST = 2.0**-134  # half the smallest denormal bf16
WORKSPACE = {
    "channels": 5000, "vocab_size": 512, "parameters": 1 << 20, "tokens": 1 << 14, "heads": 32, "head_size": 256,
}  # fmt: skip

# Beside each other: scalars' and packs' kernels; one warp, several, and a row too wide to be held.
WIDTHS = [1, 2, 7, 8, 9, 16, 17, 64, 65, 128, 136, 257, 264, 768, 776, 1024, 1536, 1544, 3080]
WIDE = [pytest.param(2, 3, C, marks=pytest.mark.heavy) for C in (4608, 4616, 4999)]
SHAPES = [(2, 3, C) for C in WIDTHS] + [(1, T, 24) for T in (1, 3, 4, 5, 15, 16, 17, 33, 131)] + [(0, 3, 8), (2, 0, 8)]
LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 257, 1031, 4095, 4096, 4097, 8200, 16383, 16391]


@pytest.fixture(params=["forward", "reverse"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Adapter]:
    """CUDA in bf16; a real GPU runs threads as it likes, once."""
    if on_device.require() == "device" and request.param != "forward":
        pytest.skip("only the simulated GPU can be told in which order threads run")
    monkeypatch.setenv("SIMULATION_ORDER", request.param)
    yield from on_device.configured("bf16", WORKSPACE)


def stored(bound: Array | float, exact: Array) -> Array:
    """The bound of a result that is rounded to bf16."""
    return bound + BF16 * (np.abs(exact) + bound) + SMALLEST


def check_stored(
    ops: Adapter, op: str, values: Sequence[Any], bounds: Mapping[str, Array | float],
    alias: dict[str, str] | None = None,
) -> dict[str, Array]:
    """`check` with the bounds of float32, widened for outputs of the storage type."""
    arguments = dict(zip(names(op), values, strict=True))
    exact = expect(op, arguments)
    narrow = {name for name in bounds if on_device.stored(op, name, arguments)}
    return check(ops, op, values, {
        name: stored(bound, exact[name]) if name in narrow else bound for name, bound in bounds.items()
    }, alias)  # fmt: skip


def device_array(ops: Adapter, values: Array, dtype: str) -> Any:
    """An array of the GPU, of a type that the adapter would not choose."""
    x = ops.empty(values.shape, dtype)
    x[...] = values.astype(dtype)
    return x


# ---- activation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_gelu(ops: Adapter, rng: Generator, n: int) -> None:
    x, dout = rounded(floats(rng, n, scale=3)), numbers(rng, n)
    for alias in ({}, {"out": "x"}):
        check_stored(ops, "gelu_forward", (blank(n), x), {"out": gelu_forward_bound(x)}, alias)
    for alias in ({}, {"dx": "dout"}):
        check_stored(ops, "gelu_backward", (blank(n), dout, x), {"dx": gelu_backward_bound(dout, x)}, alias)


def test_gelu_of_every_bf16(ops: Adapter) -> None:
    """All 65,536 of them but NaN and infinity."""
    x = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    x = x[np.isfinite(x)]
    ones = np.ones_like(x)
    check_stored(ops, "gelu_forward", (x, x), {"out": gelu_forward_bound(x)})
    moderate = np.abs(x) < 1e12  # the reference's x^3 and x^2
    check_stored(
        ops, "gelu_backward", (x[moderate], ones[moderate], x[moderate]),
        {"dx": gelu_backward_bound(ones[moderate], x[moderate])},
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_residual(ops: Adapter, rng: Generator, n: int) -> None:
    x, branch = numbers(rng, n), rounded(floats(rng, n, scale=0.1))
    for alias in ({}, {"out": "x"}, {"out": "branch"}):
        found = check_stored(ops, "residual_forward", (blank(n), x, branch), {"out": UNIT * np.abs(x + branch)}, alias)
        np.testing.assert_array_equal(found["out"], rounded(x + branch))


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize("B, T, F", [(2, 3, F) for F in (1, 7, 8, 9, 64, 4096, 4104, 4097)] + [(0, 3, 8), (2, 3, 0)])
def test_gates(ops: Adapter, rng: Generator, op: str, B: int, T: int, F: int) -> None:
    """A row in one block, in two and a few more, of packs and not."""
    x, dout = rounded(floats(rng, B, T, 2 * F, scale=3)), numbers(rng, B, T, F)
    out, dx = gate_bounds(op, x, dout)
    check_stored(ops, f"{op}_forward", (blank(B, T, F), x), {"out": out})
    for alias in ({}, {"dx": "x"}):
        check_stored(ops, f"{op}_backward", (blank(B, T, 2 * F), dout, x), {"dx": dx}, alias)


def test_copy_rounds(ops: Adapter, rng: Generator) -> None:
    """To nearest, ties to even; NaN stays NaN with any payload, and what is too large becomes infinite."""
    x = hard_numbers(rng)
    more = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF, 1, 0x8000, 0x8001], np.uint32)
    x = np.concatenate([x, more.view(np.float32)])
    for count in (len(x), 8, 7, 1, 0):
        arguments: Arguments = {"out": blank(count), "x": x[:count].copy()}
        for place in PLACES:
            found = call(ops, "copy", arguments, place, {})["out"]
            np.testing.assert_array_equal(found, rounded(x[:count]))


@pytest.mark.parametrize("n", LENGTHS)
def test_copy_and_zero_of_every_type(ops: Adapter, rng: Generator, n: int) -> None:
    x = numbers(rng, n + 1)
    for out, source in itertools.product(("bfloat16", "float32"), repeat=2):
        for begin in (0, 1):  # at a multiple of 16 bytes, and not
            a, b = device_array(ops, 0 * x, out), device_array(ops, x, source)
            ops.copy(a[begin : begin + n], b[1 - begin : 1 - begin + n])
            expected = 0 * x
            expected[begin : begin + n] = x[1 - begin : 1 - begin + n]
            np.testing.assert_array_equal(np.asarray(a, np.float32), expected)
            ops.zero(b[begin : begin + n])
            expected = x.copy()
            expected[begin : begin + n] = 0
            np.testing.assert_array_equal(np.asarray(b, np.float32), expected)


# ---- layernorm -------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, C", SHAPES + WIDE)
def test_layernorm_forward(ops: Adapter, rng: Generator, B: int, T: int, C: int) -> None:
    x, w, b = numbers(rng, B, T, C), numbers(rng, C), numbers(rng, C)
    bounds = forward_bounds(x, w, b, EPS)
    check_stored(ops, "layernorm_forward", (blank(B, T, C), blank(B, T), blank(B, T), x, w, b, EPS), bounds)


@pytest.mark.parametrize("B, T, C", SHAPES + WIDE)
def test_residual_layernorm_forward(ops: Adapter, rng: Generator, B: int, T: int, C: int) -> None:
    """The sum to the bit; and the norm is that of the sum as it is stored."""
    x, branch = numbers(rng, B, T, C), numbers(rng, B, T, C)
    w, b = numbers(rng, C), numbers(rng, C)
    total, out, mean, rstd = rounded(x + branch), np.empty(x.shape), np.empty((B, T)), np.empty((B, T))
    reference.layernorm_forward(out, mean, rstd, total, w, b, EPS)
    bounds = forward_bounds(total, w, b, EPS)
    given = (blank(B, T, C), blank(B, T, C), blank(B, T), blank(B, T), x, branch, w, b, EPS)
    for alias in ({}, {"total": "x"}, {"total": "branch"}):
        for place in PLACES:
            arguments = dict(zip(names("residual_layernorm_forward"), given, strict=True))
            found = call(ops, "residual_layernorm_forward", arguments, place, alias)
            np.testing.assert_array_equal(found["total"], total)
            assert (np.abs(found["out"] - out) <= stored(bounds["out"], out)).all()
            assert (np.abs(found["mean"] - mean) <= bounds["mean"]).all()
            assert (np.abs(found["rstd"] - rstd) <= bounds["rstd"]).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", [*SHAPES, (3, 67, 40), (3, 67, 9), (1, 70, 1040), *WIDE])
def test_layernorm_backward(ops: Adapter, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    x, w = numbers(rng, B, T, C), numbers(rng, C)
    mean, rstd = blank(B, T), blank(B, T)
    reference.layernorm_forward(np.empty(x.shape), mean, rstd, x, w, w, EPS)
    given = (numbers(rng, B, T, C), numbers(rng, C), numbers(rng, C), numbers(rng, B, T, C), x, mean, rstd, w)
    bounds = backward_bounds(*given, accumulate)
    check_stored(ops, "layernorm_backward", (*given, accumulate), bounds)
    without = (given[0], None, None, *given[3:], accumulate)
    check_stored(ops, "layernorm_backward", without, {"dx": bounds["dx"]})


# ---- rmsnorm ---------------------------------------------------------------------------------------

# Rows of one warp to twelve, and one that is too wide to be held.
RMS_SHAPES = [(2, 3, C) for C in (1, 7, 8, 17, 136, 264, 768, 776, 3080)] + [(1, T, 24) for T in (1, 5, 33, 131)]
RMS_SHAPES += [(0, 3, 8), (2, 0, 8)]
RMS_WIDE = [pytest.param(2, 3, C, marks=pytest.mark.heavy) for C in (4616, 9216, 9224)]


@pytest.mark.parametrize("B, T, C", RMS_SHAPES + RMS_WIDE)
def test_rmsnorm_forward(ops: Adapter, rng: Generator, B: int, T: int, C: int) -> None:
    """With a sum before it too, which is to the bit; and the norm is that of the sum as it is stored."""
    x, branch, w = numbers(rng, B, T, C), numbers(rng, B, T, C), numbers(rng, C)
    for offset in (0.0, 1.0):
        given = (blank(B, T, C), blank(B, T), x, w, EPS, offset)
        check_stored(ops, "rmsnorm_forward", given, rms_bounds(x, w, EPS, offset))
    total, out, rstd = rounded(x + branch), np.empty(x.shape), np.empty((B, T))
    reference.rmsnorm_forward(out, rstd, total, w, EPS, 1.0)
    bounds = rms_bounds(total, w, EPS, 1.0)
    for alias in ({}, {"total": "x"}, {"total": "branch"}):
        for place in PLACES:
            values = (blank(B, T, C), blank(B, T, C), blank(B, T), x, branch, w, EPS, 1.0)
            arguments = dict(zip(names("residual_rmsnorm_forward"), values, strict=True))
            found = call(ops, "residual_rmsnorm_forward", arguments, place, alias)
            np.testing.assert_array_equal(found["total"], total)
            assert (np.abs(found["out"] - out) <= stored(bounds["out"], out)).all()
            assert (np.abs(found["rstd"] - rstd) <= bounds["rstd"]).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", [*RMS_SHAPES, (3, 67, 40), (3, 67, 9), (1, 70, 1040), *RMS_WIDE])
def test_rmsnorm_backward(ops: Adapter, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    x, w, rstd = numbers(rng, B, T, C), numbers(rng, C), blank(B, T)
    reference.rmsnorm_forward(np.empty(x.shape), rstd, x, w, EPS, 1.0)
    given = (numbers(rng, B, T, C), numbers(rng, C), numbers(rng, B, T, C), x, rstd, w, 1.0)
    bounds = rms_backward_bounds(*given, accumulate)
    ops.reserve(**{**WORKSPACE, "channels": max(C, 5000)})
    check_stored(ops, "rmsnorm_backward", (*given, accumulate), bounds)
    check_stored(ops, "rmsnorm_backward", (given[0], None, *given[2:], accumulate), {"dx": bounds["dx"]})


@pytest.mark.parametrize("C", [8, 9])
def test_gradients_of_weights_on_a_large_gpu(
    ops: Adapter, rng: Generator, monkeypatch: pytest.MonkeyPatch, C: int
) -> None:
    """More chunks of rows than a column has threads to add them."""
    monkeypatch.setattr(device.handle(), "multiprocessors", 132)
    x, w, rstd = numbers(rng, 1, 530, C), numbers(rng, C), blank(1, 530)
    dx, dw, db, dout = numbers(rng, 1, 530, C), numbers(rng, C), numbers(rng, C), numbers(rng, 1, 530, C)
    assert norm._chunks(530)[0] == 67
    reference.rmsnorm_forward(np.empty(x.shape), rstd, x, w, EPS, 0.0)
    given = (dx, dw, dout, x, rstd, w, 0.0)
    check_stored(ops, "rmsnorm_backward", (*given, False), rms_backward_bounds(*given, False))
    layer = (dx, dw, db, dout, x, 0 * rstd, rstd, w)
    check_stored(ops, "layernorm_backward", (*layer, False), backward_bounds(*layer, False))


# ---- rotary embedding ------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, D, heads, beside", [
    (2, 3, 16, 3, 16), (2, 3, 32, 1, 8), (1, 5, 128, 40, 0), (2, 3, 16, 3, 7), (2, 3, 24, 3, 0), (1, 2, 2, 5, 1),
    (1, 2, 16, 0, 8), (0, 3, 16, 2, 0), (2, 0, 16, 2, 0),
])  # fmt: skip
def test_rope(ops: Adapter, rng: Generator, B: int, T: int, D: int, heads: int, beside: int) -> None:
    """Halves of whole packs and not, in one round and in two; channels beside the heads stay as they are."""
    x, table = numbers(rng, B, T, heads * D + beside), angles(T + 5, D)
    places = (np.arange(B, dtype=np.int32) * 3 + 2) % 6
    check_rope(ops, "rope_forward", (x, places, table, heads), rope_bound(x, table, places, heads))
    check_rope(ops, "rope_backward", (x, table, heads), rope_bound(x, table, 0 * places, heads))


def check_rope(ops: Adapter, op: str, values: Sequence[Any], bound: Array) -> None:
    x, name = values[0], names(op)[0]
    found = check_stored(ops, op, values, {name: bound})[name]
    beside = values[-1] * values[-2].shape[1]
    np.testing.assert_array_equal(found[..., beside:], x[..., beside:])


# ---- embedding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, C", [(2, 3, C) for C in WIDTHS[:13]] + [(1, 33, 24), (5, 7, 8), (0, 3, 8), (2, 0, 8)])
def test_embedding(ops: Adapter, rng: Generator, B: int, T: int, C: int) -> None:
    """Forward is one addition, and to the bit, or a product as well; backward sums in float32 and rounds once."""
    V, Vp = 7, 16
    tokens, wte, wpe = tokens_for(rng, B, T, V), numbers(rng, Vp, C), numbers(rng, T + 5, C)
    positions = (np.arange(B, dtype=np.int32) * 2 + 1) % 6
    for scale in (1.0, 1.3):
        for places in (wpe, None):
            given = (blank(B, T, C), tokens, positions, wte, places, V, scale)
            bound = forward_bound(tokens, positions, wte, places, scale)
            found = check_stored(ops, "embedding_forward", given, {"out": bound})["out"]
            if scale == 1 and places is not None:
                exact = wte[tokens] + wpe[positions[:, None] + np.arange(T)]
                np.testing.assert_array_equal(found, rounded(exact))
    dout = numbers(rng, B, T, C)
    for accumulate in (False, True):
        check_embedding_backward(ops, numbers(rng, Vp, C), numbers(rng, T + 3, C), dout, tokens, accumulate)
        check_embedding_backward(ops, numbers(rng, Vp, C), None, dout, tokens, accumulate, 1.3)


@pytest.mark.parametrize("V, B, T, C", [(5, 3, 700, 8), (300, 2, 1100, 7), (70000, 2, 600, 8), (1, 1, 2300, 9)])
def test_embedding_of_many_tokens(ops: Adapter, rng: Generator, V: int, B: int, T: int, C: int) -> None:
    """Several tiles of the sort, one, two and three of its passes; tokens whose sums are spread over many blocks."""
    tokens = np.minimum(rng.geometric(0.02 if V > 5 else 0.7, (B, T)) - 1, V - 1).astype(np.int32)
    tokens[:, ::3] = rng.integers(0, V, tokens[:, ::3].shape)
    dout = numbers(rng, B, T, C)
    check_embedding_backward(ops, numbers(rng, V, C), numbers(rng, T, C), dout, tokens, False, 1.7)


def check_embedding_backward(
    ops: Adapter, dwte: Array, dwpe: Array | None, dout: Array, tokens: Array, accumulate: bool, scale: float = 1.0
) -> None:
    T, magnitude = tokens.shape[1], np.abs(dout.astype(np.float64))
    by_token = np.abs(dwte.astype(np.float64))
    np.add.at(by_token, tokens, scale * magnitude)
    most = int(np.bincount(tokens.ravel(), minlength=1).max())
    bounds = {"dwte": UNIT * (summed(most) + (0 if scale == 1 else 2)) * by_token}
    if dwpe is not None:
        by_position = np.abs(dwpe.astype(np.float64)) if accumulate else np.zeros(dwpe.shape)
        by_position[:T] += magnitude.sum(axis=0)
        bounds["dwpe"] = UNIT * summed(len(tokens)) * by_position
    found = check_stored(ops, "embedding_backward", (dwte, dwpe, dout, tokens, scale, accumulate), bounds)
    unused = np.setdiff1d(np.arange(len(dwte)), tokens)
    np.testing.assert_array_equal(found["dwte"][unused], dwte[unused])


# ---- head ------------------------------------------------------------------------------------------

# The last: more tokens than a chunk holds, whose logits exist at a time.
HEADS = [(1, 5, 6, V) for V in (1, 2, 7, 8, 9, 63, 65, 257)] + [(2, 3, C, 19) for C in (1, 7, 8, 17, 64)]
HEADS += [(3, 11, 37, 101), (0, 3, 8, 5), (2, 0, 8, 5), (1, 4200, 8, 5)]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C, V, softcap", [(*HEADS[-1], 0.0), *((*s, cap) for s in HEADS[:-1] for cap in (0, 5))])
def test_head(
    ops: Adapter, rng: Generator, B: int, T: int, C: int, V: int, accumulate: bool, softcap: float
) -> None:
    """Logits and their gradients are rounded too; of capped ones the products, which moves a logit by no more than its
    own rounding would, since u / cosh^2 u <= tanh u.  dw is rounded once, whatever the number of chunks."""
    x, w, targets = numbers(rng, B, T, C), rounded(padded(rng, V, C)), targets_for(rng, B, T, V)
    dw, scale = numbers(rng, *w.shape), 1 / max(B * T, 1)
    bounds = bounds_of(dw, x, w, targets, V, scale, accumulate, BF16, softcap)
    last = (x, w, targets, V, scale, softcap, accumulate)
    for alias in ({}, {"dx": "x"}) if T < 100 else ({},):
        found = check_stored(ops, "head_loss", (blank(B, T), blank(B, T, C), dw, *last), bounds, alias)
        np.testing.assert_array_equal(found["dw"][V:], dw[V:] if accumulate else 0)
    if T > 100:
        return
    losses, dx = ({name: bounds[name]} for name in ("losses", "dx"))
    check_stored(ops, "head_loss", (blank(B, T), None, None, *last), losses)
    check_stored(ops, "head_loss", (blank(B, T), blank(B, T, C), None, *last), losses | dx)
    logits = capped_and_bound(*logits_and_bound(x, w, V), softcap)[1].reshape(B, T, V)
    check_stored(ops, "head_logits", (blank(B, T, V), x, w, V, softcap), {"logits": logits})


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_logits_of_many_tokens(ops: Adapter, rng: Generator, softcap: float) -> None:
    """Capped ones are taken in chunks, and rounded after they are capped: once."""
    x, w = numbers(rng, 1, 4200, 2), numbers(rng, 3, 2)
    bound = capped_and_bound(*logits_and_bound(x, w, 3), softcap)[1].reshape(1, 4200, 3)
    check_stored(ops, "head_logits", (blank(1, 4200, 3), x, w, 3, softcap), {"logits": bound})


def test_a_wide_vocabulary(ops: Adapter, rng: Generator) -> None:
    """More logits than a block looks at at a time, with Vp of whole packs and not."""
    for V in (16400, 16411):
        x, w, targets = numbers(rng, 1, 2, 4), rounded(padded(rng, V, 4)), targets_for(rng, 1, 2, V)
        dw = numbers(rng, *w.shape)
        ops.reserve(**{**WORKSPACE, "vocab_size": len(w) + 1})
        for rows in (len(w), V):
            given = (blank(1, 2), blank(1, 2, 4), dw[:rows], x, w[:rows].copy(), targets, V, 0.5, 0.0, False)
            check_stored(ops, "head_loss", given, bounds_of(dw[:rows], x, w[:rows], targets, V, 0.5, False, BF16))


# ---- optimizer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_norm(ops: Adapter, rng: Generator, n: int) -> None:
    """Squares are exact in double, whichever type they are of."""
    x = numbers(rng, n)
    exact = math.sqrt(math.fsum(value * value for value in x.tolist()))
    for place in PLACES:
        found = call(ops, "global_norm", {"norm": number(), "x": x}, place, {})["norm"][0]
        assert abs(found - exact) <= (n + 4) * 2.0**-53 * exact
    single, result = floats(rng, n), device_array(ops, number(), "float64")
    ops.global_norm(result, device_array(ops, single, "float32"))
    exact = math.sqrt(math.fsum(value * value for value in single.tolist()))
    assert abs(np.asarray(result)[0] - exact) <= (n + 4) * 2.0**-53 * exact


def arguments(
    w: Array, m: Array, v: Array, dw: Array, copy: Array | None, u: Update, spans: Spans, seed: int
) -> Arguments:
    values = (w, m, v, dw, copy, number(u.lr, u.step), number(u.scale), spans, u.beta1, u.beta2, u.eps, seed)
    return dict(zip(names("adamw_step"), values, strict=True))


@pytest.mark.parametrize("n", LENGTHS)
def test_adamw_with_masters(ops: Adapter, rng: Generator, n: int) -> None:
    """w, m and v are float32, whose bounds hold; the copy is w rounded to nearest, to the bit."""
    w, m, v, dw = state(rng, n)
    dw, u = rounded(dw), Update()
    spans = [(0, n, u.weight_decay)]
    bounds = adamw_bounds(w, m, v, dw, u)
    given = arguments(w, m, v, dw, np.full(n, np.nan, np.float32), u, spans, 0)
    found = check(
        ops, "adamw_step", tuple(given.values()), {**bounds, "copy": bounds["w"] + BF16 * (1 + np.abs(w))}
    )
    np.testing.assert_array_equal(found["copy"], rounded(found["w"]))


def random_halves(n: int, seed: int, t: int) -> Array:
    """The 16 bits that are added to each element."""
    i = np.arange(n, dtype=np.uint64)
    g, j, h = i // 8, i // 2 % 4, i % 2
    ones = np.ones_like(g)
    words = np.stack(reference.philox((g % 2**32, g // 2**32, t * ones, ones), (seed % 2**32, seed // 2**32)))
    return (words[j.astype(int), i.astype(int)] >> (16 * h) & np.uint64(0xFFFF)).astype(np.uint32)


def decayed(ops: Adapter, w: Array, spans: Spans, seed: int, t: int, place: str = "end") -> Array:
    """w after an update without gradients, moments and masters: w (1 - lr decay) rounded stochastically."""
    n = len(w)
    u = Update(lr=2.0**-11, step=t)
    return call(ops, "adamw_step", arguments(w, blank(n), blank(n), blank(n), None, u, spans, seed), place, {})["w"]


@pytest.mark.parametrize("seed, t", [(0, 1), (1, 1), (2**32 - 1, 2), (0x299F31D0A4093822, 70000), (2**64 - 1, 2**31)])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1031, 5000])
def test_stochastic_rounding(ops: Adapter, rng: Generator, n: int, seed: int, t: int) -> None:
    """To the bit: with decay alone w - w / 2^11 is exact in float32, on every device."""
    w = numbers(rng, n)
    exact = w - w * np.float32(2.0**-11)
    expected = ((exact.view(np.uint32) + random_halves(n, seed, t)) & np.uint32(0xFFFF0000)).view(np.float32)
    for place in PLACES:
        np.testing.assert_array_equal(decayed(ops, w, [(0, n, 1.0)], seed, t, place), expected)
    # An element's bits are those of its place, wherever its span begins; what lies in no span stays.
    spans, inside = [(3, 5, 1.0), (6, 21, 1.0), (23, 24, 1.0), (40, 900, 1.0)], np.zeros(n, bool)
    spans = [(min(start, n), min(stop, n), decay) for start, stop, decay in spans]
    for start, stop, _ in spans:
        inside[start:stop] = True
    for place in PLACES:
        np.testing.assert_array_equal(decayed(ops, w, spans, seed, t, place), np.where(inside, expected, w))


def test_stochastic_rounding_is_unbiased(ops: Adapter, rng: Generator) -> None:
    """The mean of many roundings of a number is the number, within 5 standard errors, at every distance from its
    neighbours."""
    base = rounded(1 + rng.random(16).astype(np.float32))
    w = np.repeat(base, 512)
    exact = (w - w * np.float32(2.0**-11)).astype(np.float64)
    found = np.stack([decayed(ops, w, [(0, len(w), 1.0)], 5, t) for t in (1, 2, 3)]).astype(np.float64)
    place = 2.0 ** (np.floor(np.log2(exact)) - 7)  # of the last bit
    share = exact / place % 1  # how often it should be rounded up
    assert (np.abs(found - exact) < place).all()
    up = (found > exact).reshape(3, 16, 512).mean(axis=(0, 2))
    p = share.reshape(16, 512)[:, 0]
    assert (np.abs(up - p) < 5 * np.sqrt(p * (1 - p) / (3 * 512)) + 1e-12).all()
    assert ((0.02 < p) & (p < 0.98)).sum() > 8, "and there was something to decide"


@pytest.mark.parametrize("n", [1, 8, 37, 1031])
def test_adamw_without_masters(ops: Adapter, rng: Generator, n: int) -> None:
    """Moments as ever; w within its bound and one place of bf16, on either side."""
    w, m, v, dw = state(rng, n)
    w, dw, u = rounded(w), rounded(dw), Update()
    bounds = adamw_bounds(w, m, v, dw, u)
    given = arguments(w, m, v, dw, None, u, [(0, n, u.weight_decay)], 9)
    exact = expect("adamw_step", given)["w"]
    bounds["w"] = bounds["w"] + 2 * BF16 * (np.abs(exact) + bounds["w"])
    check(ops, "adamw_step", tuple(given.values()), bounds)


@pytest.mark.parametrize("masters", [True, False])
def test_adamw_keeps_nan(ops: Adapter, rng: Generator, masters: bool) -> None:
    """With every payload, whatever random bits are added to it: a GPU's own has all bits of the fraction set."""
    w, m, v, dw = state(rng, 64)
    w, dw, m, v = rounded(w), rounded(dw), np.abs(m), v + 1
    w[:16] = np.array([0x7FFF0000, 0xFFFF0000, 0x7FC00000, 0x7F810000], np.uint32).view(np.float32).repeat(4)
    m[16:32] = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32).repeat(8)
    copy = blank(64) if masters else None
    given = arguments(w, m, v, dw, copy, Update(weight_decay=0.0), [(0, 64, 0.0)], 3)
    found = call(ops, "adamw_step", given, "end", {})
    for name in ("w", "copy") if masters else ("w",):
        assert np.isnan(found[name][:32]).all() and np.isfinite(found[name][32:]).all()


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_adamw_that_must_not_be(ops: Adapter, rng: Generator, scale: float) -> None:
    w, m, v, dw = state(rng, 37)
    w, dw = rounded(w), rounded(dw)
    for copy in (None, numbers(rng, 37)):
        found = call(ops, "adamw_step", arguments(w, m, v, dw, copy, Update(scale=scale), [(0, 37, 0.5)], 1), "end", {})
        for before, name in ((w, "w"), (m, "m"), (v, "v"), (copy, "copy")):
            if before is not None:
                np.testing.assert_array_equal(found[name], before)


# ---- random numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_normal(ops: Adapter, n: int) -> None:
    check_stored(ops, "normal", (blank(n), 1234, 56, 0.02), {"out": normal_bound(1234, 56, 0.02, n)})
    single, narrow = device_array(ops, blank(n), "float32"), device_array(ops, blank(n), "bfloat16")
    for out in (single, narrow):
        ops.normal(out, 2**63 + 5, 2**40 + 7, 0.3)
    np.testing.assert_array_equal(np.asarray(narrow, np.float32), rounded(np.asarray(single)))


# ---- addresses and scratch -------------------------------------------------------------------------


def on_gpu(ops: Adapter, given: Arguments, op: str, shift: int) -> Arguments:
    """The same arguments in arrays of the GPU, which begin `shift` elements after a multiple of 16 bytes."""
    passed = dict(given)
    for name, value in given.items():
        if isinstance(value, np.ndarray):
            dtype = "bfloat16" if on_device.stored(op, name, given) else value.dtype.name
            passed[name] = ops.empty((value.size + shift,), dtype)[shift:].reshape(value.shape)
            passed[name][...] = value
    return passed


@pytest.mark.parametrize("op", [
    "layernorm_forward", "residual_layernorm_forward", "layernorm_backward", "embedding_forward", "embedding_backward",
    "rmsnorm_forward", "residual_rmsnorm_forward", "rmsnorm_backward", "rope_forward", "rope_backward",
    "swiglu_forward", "swiglu_backward", "geglu_forward", "geglu_backward", "head_logits",
    "head_loss", "gelu_forward", "gelu_backward", "residual_forward", "adamw_step", "global_norm", "normal", "copy",
])  # fmt: skip
def test_odd_addresses(ops: Adapter, rng: Generator, op: str) -> None:
    """Rows of whole packs that do not begin at multiples of 16 bytes: as where they do, but for the order of sums."""
    given = guard.example(op, rng, Sizes(C=16, N=16, V=24, Vp=32))
    results = []
    for shift in (0, 1):
        passed = on_gpu(ops, given, op, shift)
        getattr(ops, op)(*(passed[name] for name in names(op)))
        written = [name for name in guard.OUTPUTS[op] if passed[name] is not None]
        results.append({name: np.asarray(passed[name], np.float64) for name in written})
    for name, found in results[1].items():
        np.testing.assert_allclose(found, results[0][name], rtol=2 * BF16, atol=1e-3)


@pytest.mark.parametrize("op, sizes", [
    ("layernorm_backward", Sizes(B=3, T=700, C=24)), ("rmsnorm_backward", Sizes(B=3, T=700, C=24)),
    ("head_logits", Sizes(B=1, T=4100, C=8, V=11, Vp=16)), ("head_logits", Sizes(B=1, T=1, C=8, V=300, Vp=304)),
    ("embedding_backward", Sizes(B=3, T=700, C=24, V=300, Vp=320, maxT=700)),
    ("head_loss", Sizes(B=1, T=4100, C=8, V=11, Vp=16)), ("head_loss", Sizes(B=1, T=70, C=8, V=300, Vp=320)),
    ("global_norm", Sizes(B=3, T=700, C=24)),
])  # fmt: skip
def test_scratch_suffices(ops: Adapter, rng: Generator, op: str, sizes: Sizes) -> None:
    """A workspace for these sizes and no more, which on the simulated GPU ends at a forbidden page."""
    modules = {
        "layernorm_backward": norm, "rmsnorm_backward": norm, "embedding_backward": embed, "head_loss": head,
        "head_logits": head, "global_norm": optimizer,
    }  # fmt: skip
    tokens = sizes.B * sizes.T
    nbytes = modules[op].scratch_nbytes(sizes.C, sizes.Vp, tokens * sizes.C, tokens, sizes.H, sizes.C // sizes.H)
    given = guard.example(op, rng, sizes)
    results = []
    try:
        for size in (1 << 24, nbytes):
            device.handle().workspace = None
            device.enlarge(size)
            results.append(on_gpu(ops, given, op, 0))
            getattr(ops, op)(*(results[-1][name] for name in names(op)))
            device.synchronize()
    finally:
        device.handle().workspace = None
        ops.reserve(**WORKSPACE)
    for name in guard.OUTPUTS[op]:
        assert np.asarray(results[0][name]).tobytes() == np.asarray(results[1][name]).tobytes(), name
