"""gelu, swiglu and geglu, forward and backward, residual_forward, zero, copy."""

from __future__ import annotations

import math
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import reference
from guard import PLACES, TINY, UNIT, Array, Guarded, blank, check, floats
from numpy.random import Generator

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 127, 129, 257, 1031]
SHAPES: list[tuple[int, ...]] = [(n,) for n in LENGTHS] + [(0,), (2, 0, 3), (1, 1, 1), (2, 3, 5), (3, 1, 17)]
LARGE = [pytest.param((n,), marks=pytest.mark.heavy) for n in (4095, 4096, 4097, 16383, 70001)]

SCALE, CUBIC = reference.GELU_SCALE, reference.GELU_CUBIC


def gelu_forward_bound(x: Array) -> Array:
    """For x/2 * (1 + tanh(y)), or the same as x / (1 + exp(-2y)), in float32.

    y is off by at most 4 units of relative error, which moves tanh by less than 4 * max(y sech^2 y) < 1.8
    units; tanh or its equivalent adds 3, the sum and the two products 3 more.  All are relative to |x|.
    Measured for the second form: 2.5.
    """
    return UNIT * 8 * np.abs(np.asarray(x, np.float64)) + TINY


def gelu_backward_bound(dout: Array, x: Array) -> Array:
    """For dout * (s + x s (1 - s) 2y'), s = 1 / (1 + e), 1 - s = s e, e = exp(-2y), in float32.

    2y is off by 4 units of relative error and e by 2 of its own, so s and s e are off by (8y + 2) s (1 - s)
    units, at most 3, and 3 more from the quotient; x s (1 - s) 2y' stays below 0.65 and takes 4 roundings.
    That is less than 10 units of |dout|.  Measured: 3.5.
    """
    return UNIT * 10 * np.abs(np.asarray(dout, np.float64)) + TINY


def whole_range() -> Array:
    """Every binade of float32 up to 1e4, the denormals, both zeros, and a fine grid where gelu bends."""
    powers = 2.0 ** np.arange(-149, 14)
    edges = np.array([0.0, 1e4, 88.0, 88.8, 100.0, 10.0, 9.0, 5.0, 1e-38, 1.2e-38, 1e-45])
    half = np.concatenate([powers, powers * 1.37, edges, np.linspace(0, 14, 2801)]).astype(np.float32)
    return np.concatenate([half, -half])


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_gelu_forward(ops: ModuleType, rng: Generator, shape: tuple[int, ...]) -> None:
    x = floats(rng, *shape, scale=3)
    check(ops, "gelu_forward", (blank(*shape), x), {"out": gelu_forward_bound(x)})
    check(ops, "gelu_forward", (blank(*shape), x), {"out": gelu_forward_bound(x)}, {"out": "x"})


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_gelu_backward(ops: ModuleType, rng: Generator, shape: tuple[int, ...]) -> None:
    x, dout = floats(rng, *shape, scale=3), floats(rng, *shape)
    bounds = {"dx": gelu_backward_bound(dout, x)}
    check(ops, "gelu_backward", (blank(*shape), dout, x), bounds)
    check(ops, "gelu_backward", (blank(*shape), dout, x), bounds, {"dx": "dout"})


def test_gelu_whole_range(ops: ModuleType) -> None:
    x = whole_range()
    dout = np.full(x.shape, 2, np.float32)
    check(ops, "gelu_forward", (x, x), {"out": gelu_forward_bound(x)})
    check(ops, "gelu_backward", (x, dout, x), {"dx": gelu_backward_bound(dout, x)})


def test_gelu_far_out(ops: ModuleType) -> None:
    """It is x on one side, and on the other 0 as nearly as x times the smallest normal number is.

    Up to where x^3 and x^2 overflow, and further.
    """
    x = np.array([12, 15, 88, 100, 1e4, 7e12, 1e13, 1e19, 2e19, 1e30, 3.4e38], np.float32)
    ones, out, dx = np.ones_like(x), np.empty_like(x), np.empty_like(x)
    ops.gelu_forward(out, x)
    ops.gelu_backward(dx, ones, x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(dx, ones)
    ops.gelu_forward(out, -x)
    ops.gelu_backward(dx, ones, -x)
    assert (np.abs(out) <= 2.0**-126 * x).all() and (np.abs(dx) < 1e-30).all()


@pytest.mark.parametrize("n", [1, 8, 17, 64, 100])
def test_gelu_keeps_nan(ops: ModuleType, n: int) -> None:
    for index in {0, n // 2, n - 1}:
        x, ones, out = np.ones(n, np.float32), np.ones(n, np.float32), blank(n)
        x[index] = np.nan
        ops.gelu_forward(out, x)
        assert np.isnan(out[index]) and np.isfinite(np.delete(out, index)).all()
        ops.gelu_backward(out, ones, x)
        assert np.isnan(out[index]) and np.isfinite(np.delete(out, index)).all()


def test_gelu_is_the_tanh_form(ops: ModuleType) -> None:
    """The erf form differs by up to 5e-4, a thousand times what rounding may do."""
    x = np.linspace(-4, 4, 1601, dtype=np.float32)
    found = check(ops, "gelu_forward", (x, x), {"out": gelu_forward_bound(x)})["out"]
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    apart = np.abs(found - erf) / gelu_forward_bound(x)
    assert apart.max() > 100 and np.median(apart) > 10


# ---- gates -----------------------------------------------------------------------------------------

GATES = [(2, 3, F) for F in (1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 65, 257)]
GATES += [(1, 1, 1031), (0, 3, 4), (2, 0, 4), (2, 3, 0)]
NOTHING = 88 * math.exp(-87)  # what silu may lose below -87, where e^x is hardly a normal number


def logistic(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -700, 700))))


def gate_bounds(op: str, x: Array, dout: Array) -> tuple[Array, Array]:
    """Bounds of out and of dx, for numbers of float32.

    silu(x) = x s, s = 1 / (1 + e), e = exp(-x): e is off by 2 ulp, 4 units, the sum, the quotient and the product by
    one each: 7.  Its slope s + x s (s e): 6 units of s; 6 + 6 + 4 and four products of the second term, and the sum.
    gelu's are above.  Then come the products with up and with dout.
    """
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    d, s = np.abs(dout.astype(np.float64)), logistic(gate)
    rest = np.abs(gate) * s * logistic(-gate)
    if op == "swiglu":
        value, slope = UNIT * 7 * np.abs(gate) * s + NOTHING, UNIT * (6 * s + 20 * rest + s + rest) + NOTHING
        high = np.abs(gate) * s
    else:
        value, slope = gelu_forward_bound(gate), gelu_backward_bound(np.ones(gate.shape), gate)
        high = np.abs(gate)
    out = np.abs(up) * (value + UNIT * high) + TINY
    back = d * np.abs(up) * (slope + 3 * UNIT)  # a slope is at most 1.13
    return out, np.concatenate([back, d * (value + UNIT * high)], axis=-1) + TINY


def check_gate(ops: ModuleType, op: str, x: Array, dout: Array) -> None:
    out, dx = gate_bounds(op, x, dout)
    check(ops, f"{op}_forward", (blank(*dout.shape), x), {"out": out})
    for alias in ({}, {"dx": "x"}):
        check(ops, f"{op}_backward", (blank(*x.shape), dout, x), {"dx": dx}, alias)


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize("B, T, F", GATES)
def test_gates(ops: ModuleType, rng: Generator, op: str, B: int, T: int, F: int) -> None:
    check_gate(ops, op, floats(rng, B, T, 2 * F, scale=3), floats(rng, B, T, F))


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gates_whole_range(ops: ModuleType, rng: Generator, op: str) -> None:
    gate = whole_range()
    x = np.concatenate([gate, floats(rng, len(gate))])[None, None]
    check_gate(ops, op, x, np.full((1, 1, len(gate)), 2, np.float32))


def test_swiglu_slope_is_relative(ops: ModuleType) -> None:
    """Down to e^-80 the gradient keeps its digits: nothing is subtracted from 1."""
    gate = np.linspace(-80, -2, 157, dtype=np.float32)
    x, ones = np.concatenate([gate, np.ones_like(gate)])[None, None], np.ones((1, 1, len(gate)), np.float32)
    dx = np.empty_like(x)
    ops.swiglu_backward(dx, ones, x)
    exact = np.empty(x.shape)
    reference.swiglu_backward(exact, ones, x)
    assert (np.abs(dx - exact) <= 2e-6 * np.abs(exact)).all()


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gates_far_out(ops: ModuleType, op: str) -> None:
    """up times the gate on one side, nothing on the other, and slopes of 1 and 0."""
    far = np.array([100, 1e4, 1e13, 2e19, 1e30, 3.4e38], np.float32)
    forward, backward = getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward")
    half, ones, out, dx = np.full(6, 0.5, np.float32), np.ones((1, 1, 6), np.float32), blank(1, 1, 6), blank(1, 1, 12)
    for sign in (1, -1):
        x = np.concatenate([sign * far, half])[None, None]
        forward(out, x)
        backward(dx, ones, x)
        if sign > 0:
            np.testing.assert_array_equal(out[0, 0], far / 2)
            np.testing.assert_array_equal(dx[0, 0], np.concatenate([half, far]))
        else:
            assert (np.abs(out[0, 0]) <= 2.0**-125 * far).all() and (np.abs(dx[0, 0, :6]) < 1e-30).all()
            assert (np.abs(dx[0, 0, 6:]) <= 2.0**-125 * far).all()


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize("F", [1, 8, 19, 64])
def test_gates_keep_nan(ops: ModuleType, op: str, F: int) -> None:
    for place in {0, F // 2, F - 1, F, 2 * F - 1}:
        x, ones, out, dx = np.ones((1, 1, 2 * F), np.float32), np.ones((1, 1, F), np.float32), blank(1, 1, F), None
        x[0, 0, place] = np.nan
        getattr(ops, f"{op}_forward")(out, x)
        assert np.isnan(out[0, 0, place % F]) and np.isfinite(np.delete(out, place % F)).all()
        dx = np.zeros_like(x)
        getattr(ops, f"{op}_backward")(dx, ones, x)
        assert np.isnan(dx[0, 0, place % F])  # by its slope, or by up
        kept = np.ones(2 * F, bool)
        kept[[place % F, place % F + F]] = False
        assert np.isfinite(dx[0, 0, kept]).all()
        assert np.isnan(dx[0, 0, place % F + F]) == (place < F)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_residual(ops: ModuleType, rng: Generator, shape: tuple[int, ...]) -> None:
    """One addition, correctly rounded: float32 gives the same bits."""
    x, branch = floats(rng, *shape), floats(rng, *shape, scale=0.1)
    bounds = {"out": UNIT * np.abs(x.astype(np.float64) + branch)}
    for alias in ({}, {"out": "x"}, {"out": "branch"}):
        found = check(ops, "residual_forward", (blank(*shape), x, branch), bounds, alias)
        np.testing.assert_array_equal(found["out"], x + branch)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_zero(ops: ModuleType, shape: tuple[int, ...]) -> None:
    for place in PLACES:
        guard = Guarded(np.full(shape, np.nan, np.float32), place)
        ops.zero(guard.array)
        assert guard.array.tobytes() == bytes(guard.array.nbytes)
        assert guard.intact()


@pytest.mark.parametrize("shape", SHAPES + LARGE)
def test_copy(ops: ModuleType, rng: Generator, shape: tuple[int, ...]) -> None:
    """The same bits, signed zeros, denormals and infinities among them."""
    x = floats(rng, *shape)
    special = np.array([-0.0, np.inf, -np.inf, 1e-45, -1.2e-38, 3.4028235e38, 0.0], np.float32)
    x.reshape(-1)[: len(special)] = special[: x.size]
    for place in PLACES:
        out, source = Guarded(np.full(shape, np.nan, np.float32), place), Guarded(x, place)
        ops.copy(out.array, source.array)
        assert out.array.tobytes() == source.array.tobytes() == x.tobytes()
        assert out.intact() and source.intact()


@pytest.mark.parametrize("n", [1, 8, 17, 64, 100])
def test_copy_keeps_nan(ops: ModuleType, n: int) -> None:
    for index in {0, n // 2, n - 1}:
        x, out = np.ones(n, np.float32), blank(n)
        x[index] = np.nan
        ops.copy(out, x)
        assert np.isnan(out[index]) and (np.delete(out, index) == 1).all()


# ---- to bfloat16 and back --------------------------------------------------------------------------


def bf16_values() -> Array:
    """All of them, NaN among them."""
    return np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)


def test_copy_widens(each_isa: ModuleType) -> None:
    """Exactly, to the bit."""
    x = bf16_values()
    for place in PLACES:
        for n in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, len(x)):
            out, source = Guarded(blank(n), place), Guarded(x[-n:], place)
            each_isa.copy(out.array, source.array)
            np.testing.assert_array_equal(out.array.view(np.uint32), x[-n:].view(np.uint16).astype(np.uint32) << 16)
            assert out.intact() and source.intact()


def test_copy_rounds(each_isa: ModuleType, rng: Generator) -> None:
    """To nearest, ties to even: midpoints of neighbours, and what lies next to them; NaN stays NaN."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (bits[:, None] | low).reshape(-1).view(np.float32)
    nan = np.isnan(x)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16)
    for place in PLACES:
        for n in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, len(x)):
            out, source = Guarded(np.zeros(n, ml_dtypes.bfloat16), place), Guarded(x[:n], place)
            each_isa.copy(out.array, source.array)
            found = out.array.view(np.uint16)
            np.testing.assert_array_equal(found[~nan[:n]], expected[:n].view(np.uint16)[~nan[:n]])
            assert np.isnan(out.array.astype(np.float32)[nan[:n]]).all()
            assert out.intact() and source.intact()


def test_copy_within_bfloat16(each_isa: ModuleType) -> None:
    x = bf16_values().reshape(2, -1)
    out = np.zeros_like(x)
    each_isa.copy(out, x)
    assert out.tobytes() == x.tobytes()
