"""linear_forward, linear_backward, linear_gelu_forward, gelu_linear_backward.

Each of the three sizes of a product is swept alone, past every tile, panel and block edge, with the others
small and ragged; then come shapes where all are odd at once, and some that cross the cache blocks.
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import reference
from guard import TINY, UNIT, Array, blank, check, floats, summed
from numpy.random import Generator
from test_activation import gelu_backward_bound, gelu_forward_bound

EDGES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65]
LONG = [95, 96, 97, 127, 128, 129, 257, 385, 513]
# B, T, K, N: x is (B,T,K), w is (N,K)
SHAPES = (
    [(1, M, 5, 7) for M in EDGES + LONG]
    + [(1, 3, K, 7) for K in EDGES + LONG]
    + [(1, 3, 5, N) for N in EDGES + LONG]
    + [(1, 1, 1, 1), (2, 3, 17, 33), (3, 5, 31, 29), (5, 13, 67, 61), (2, 48, 64, 96), (7, 1, 1, 1)]
    + [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)]
)
HEAVY = [
    pytest.param(*shape, marks=pytest.mark.heavy)
    for shape in [(1, 259, 300, 97), (2, 131, 67, 770), (1, 37, 1031, 129), (4, 64, 96, 288)]
]


def magnitude(x: Array) -> Array:
    """|x| as a float64 matrix of rows."""
    return np.abs(x.astype(np.float64)).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def product_bound(x: Array, w: Array, b: Array | None) -> Array:
    """Bound of x @ w.T + b, from the product of absolute values."""
    total = magnitude(x) @ magnitude(w).T + (0 if b is None else np.abs(b.astype(np.float64)))
    return (UNIT * summed(x.shape[-1]) * total).reshape(*x.shape[:-1], len(w))


def backward_bounds(
    dw: Array, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool, ddout: Array | float = 0.0
) -> dict[str, Array]:
    """Bounds of the three gradients, `ddout` being the error with which dout itself is known."""
    g, rows, table = magnitude(dout), magnitude(x), magnitude(w)
    off = np.broadcast_to(np.asarray(ddout, np.float64), dout.shape).reshape(g.shape)
    tokens, N = g.shape
    before = np.abs(dw.astype(np.float64)) if accumulate else 0
    bounds = {
        "dx": (UNIT * summed(N) * (g @ table) + off @ table).reshape(x.shape) + TINY,
        "dw": UNIT * summed(tokens) * (g.T @ rows + before) + off.T @ rows + TINY,
    }
    if db is not None:
        before = np.abs(db.astype(np.float64)) if accumulate else 0
        bounds["db"] = UNIT * summed(tokens) * (g.sum(axis=0) + before) + off.sum(axis=0) + TINY
    return bounds


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B, T, K, N", SHAPES + HEAVY)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, bias: bool) -> None:
    x, w, b = floats(rng, B, T, K), floats(rng, N, K), floats(rng, N) if bias else None
    check(ops, "linear_forward", (blank(B, T, N), x, w, b), {"out": product_bound(x, w, b)})


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", SHAPES + HEAVY)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, accumulate: bool) -> None:
    x, w, dout = floats(rng, B, T, K), floats(rng, N, K), floats(rng, B, T, N)
    dw, db = floats(rng, N, K), floats(rng, N)
    bounds = backward_bounds(dw, db, dout, x, w, accumulate)
    check(ops, "linear_backward", (blank(B, T, K), dw, db, dout, x, w, accumulate), bounds)


@pytest.mark.parametrize("B, T, K, N", [(1, 1, 1, 1), (2, 3, 17, 33), (3, 5, 31, 29), (1, 65, 40, 129)])
def test_backward_over_its_input(ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int) -> None:
    """dx may be x; and there may be no bias."""
    x, w, dout, dw = floats(rng, B, T, K), floats(rng, N, K), floats(rng, B, T, N), floats(rng, N, K)
    for db in (None, floats(rng, N)):
        bounds = backward_bounds(dw, db, dout, x, w, True)
        check(ops, "linear_backward", (blank(B, T, K), dw, db, dout, x, w, True), bounds, {"dx": "x"})


@pytest.mark.heavy
@pytest.mark.parametrize("accumulate", [False, True])
def test_many_tokens(ops: ModuleType, rng: Generator, accumulate: bool) -> None:
    """dw and db sum over the tokens of a batch: more of them than any block."""
    x, w, dout = floats(rng, 3, 701, 20), floats(rng, 18, 20), floats(rng, 3, 701, 18)
    dw, db = floats(rng, 18, 20), floats(rng, 18)
    bounds = backward_bounds(dw, db, dout, x, w, accumulate)
    check(ops, "linear_backward", (blank(3, 701, 20), dw, db, dout, x, w, accumulate), bounds)


def test_wide_range(ops: ModuleType, rng: Generator) -> None:
    """Rows and columns from 1e-9 to 1e9: the elementwise bound is relative to what each sum holds."""
    x, w = floats(rng, 2, 9, 70), floats(rng, 45, 70)
    x *= np.float32(10) ** rng.integers(-9, 9, (2, 9, 1)).astype(np.float32)
    w *= np.float32(10) ** rng.integers(-9, 9, (45, 1)).astype(np.float32)
    check(ops, "linear_forward", (blank(2, 9, 45), x, w, None), {"out": product_bound(x, w, None)})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("K", [1, 8, 19, 64])
def test_nan_is_kept(ops: ModuleType, rng: Generator, K: int, bad: float) -> None:
    """One bad input spoils its own row of the result, and no other."""
    x, w = floats(rng, 1, 9, K), floats(rng, 13, K)
    for index in {0, K // 2, K - 1}:
        spoiled, out = x.copy(), blank(1, 9, 13)
        spoiled[0, 4, index] = bad
        ops.linear_forward(out, spoiled, w, None)
        assert not np.isfinite(out[0, 4]).any()
        assert np.isfinite(np.delete(out[0], 4, axis=0)).all()


GELU_SHAPES = [
    (1, 1, 1, 1), (2, 3, 17, 33), (3, 5, 31, 29), (1, 13, 5, 65), (2, 12, 64, 64), (5, 1, 9, 127),
    (1, 33, 3, 16), (0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0),
    pytest.param(1, 130, 97, 513, marks=pytest.mark.heavy),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("B, T, K, N", GELU_SHAPES)
def test_gelu_forward(ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, bias: bool) -> None:
    x, w, b = floats(rng, B, T, K), floats(rng, N, K), floats(rng, N) if bias else None
    off = product_bound(x, w, b)
    pre = np.empty((B, T, N))
    reference.linear_forward(pre, x, w, b)
    # gelu' lies within [-0.13, 1.13], so that it passes at most 1.13 times the error of its argument
    bounds = {"pre": off, "out": 1.13 * off + gelu_forward_bound(np.abs(pre) + off)}
    found = check(ops, "linear_gelu_forward", (blank(B, T, N), blank(B, T, N), x, w, b), bounds)
    again = np.empty(pre.shape)
    reference.gelu_forward(again, found["pre"])
    own = np.abs(found["out"] - again) <= gelu_forward_bound(found["pre"])
    assert own.all(), "out is the gelu of the pre that is kept"


def gelu_linear_bounds(
    dw: Array, db: Array | None, dout: Array, pre: Array, x: Array, w: Array, accumulate: bool
) -> dict[str, Array]:
    """Those of the layer; and dpre, which takes what dout @ w is off by times a slope of at most 1.13."""
    bounds = backward_bounds(dw, db, dout, x, w, accumulate)
    dx, off = np.empty(x.shape), bounds.pop("dx")
    reference.linear_backward(dx, np.empty(w.shape), None, dout, x, w, False)
    return {**bounds, "dpre": 1.13 * off + gelu_backward_bound(np.abs(dx) + off, pre)}


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("B, T, K, N", GELU_SHAPES)
def test_gelu_backward(
    ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, shared: bool, accumulate: bool
) -> None:
    """dpre may be x; and there may be no bias."""
    pre, w, dout = floats(rng, B, T, K, scale=2), floats(rng, N, K), floats(rng, B, T, N)
    dw, db, x = floats(rng, N, K), None if shared else floats(rng, N), blank(B, T, K)
    reference.gelu_forward(x, pre)
    bounds = gelu_linear_bounds(dw, db, dout, pre, x, w, accumulate)
    values = (blank(B, T, K), dw, db, dout, pre, x, w, accumulate)
    check(ops, "gelu_linear_backward", values, bounds, {"dpre": "x"} if shared else {})


@pytest.mark.parametrize("B, T, K, N", SHAPES + HEAVY)
def test_gelu_backward_shapes(ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int) -> None:
    pre, w, dout = floats(rng, B, T, K, scale=2), floats(rng, N, K), floats(rng, B, T, N)
    dw, db, x = floats(rng, N, K), floats(rng, N), blank(B, T, K)
    reference.gelu_forward(x, pre)
    bounds = gelu_linear_bounds(dw, db, dout, pre, x, w, True)
    check(ops, "gelu_linear_backward", (blank(B, T, K), dw, db, dout, pre, x, w, True), bounds)


def test_gelu_backward_takes_x_as_it_is(ops: ModuleType, rng: Generator) -> None:
    """dw is from the x that is given, whatever gelu(pre) would be."""
    pre, x, w, dout = floats(rng, 2, 5, 17), floats(rng, 2, 5, 17), floats(rng, 33, 17), floats(rng, 2, 5, 33)
    dw, db = floats(rng, 33, 17), floats(rng, 33)
    bounds = gelu_linear_bounds(dw, db, dout, pre, x, w, False)
    check(ops, "gelu_linear_backward", (blank(2, 5, 17), dw, db, dout, pre, x, w, False), bounds)
