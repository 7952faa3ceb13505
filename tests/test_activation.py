"""gelu_forward, gelu_backward, residual_forward, zero, copy."""

from __future__ import annotations

import math
from types import ModuleType

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
