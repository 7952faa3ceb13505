"""lora_forward, lora_backward, lora_backward_input: adapters on all of a layer's columns, or on some of them."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import reference
from guard import TINY, UNIT, Array, blank, check, floats, summed
from numpy.random import Generator
from test_linear import magnitude

# B, T, K, N, rank, columns of the adapter, the first of them
SHAPES = [
    (1, 1, 1, 1, 1, 1, 0), (2, 3, 17, 33, 3, 11, 5), (1, 37, 64, 96, 8, 32, 64), (3, 5, 31, 20, 16, 1, 19),
    (1, 4, 40, 24, 1, 24, 0), (0, 3, 4, 5, 2, 3, 1), (2, 0, 4, 5, 2, 3, 1), (2, 3, 4, 5, 0, 3, 1),
    pytest.param(1, 259, 130, 300, 16, 97, 101, marks=pytest.mark.heavy),
]  # fmt: skip
SCALE = 0.7


@pytest.mark.parametrize("B, T, K, N, r, n, column", SHAPES)
def test_forward(
    ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int
) -> None:
    """What is beside the adapter's columns stays as it was, to the bit."""
    x, a, b, out = floats(rng, B, T, K), floats(rng, r, K), floats(rng, n, r), floats(rng, B, T, N)
    narrow = SCALE * magnitude(x) @ magnitude(a).T
    off = UNIT * (summed(K) + 2) * narrow
    bound, part = np.zeros((B * T, N)), slice(column, column + n)
    products = narrow @ magnitude(b).T
    bound[:, part] = UNIT * summed(r + 1) * (magnitude(out)[:, part] + products) + off @ magnitude(b).T
    bounds = {"hidden": off.reshape(B, T, r) + TINY, "out": bound.reshape(out.shape)}
    check(ops, "lora_forward", (out, blank(B, T, r), x, a, b, SCALE, column), bounds)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N, r, n, column", SHAPES)
def test_backward(
    ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int, accumulate: bool
) -> None:
    x, b, dout, hidden = floats(rng, B, T, K), floats(rng, n, r), floats(rng, B, T, N), floats(rng, B, T, r)
    da, db = floats(rng, r, K), floats(rng, n, r)

    def gradient(before: Array, left: Array, right: Array) -> Array:
        return UNIT * summed(B * T + 1) * (left.T @ right + accumulate * magnitude(before)) + TINY

    part = magnitude(dout)[:, column : column + n]
    narrow = SCALE * part @ magnitude(b)
    off = UNIT * (summed(n) + 2) * narrow
    bounds = {
        "db": gradient(db, part, magnitude(hidden)),
        "dhidden": off.reshape(hidden.shape) + TINY,
        "da": gradient(da, narrow, magnitude(x)) + off.T @ magnitude(x),
    }
    check(
        ops, "lora_backward", (da, db, blank(B, T, r), dout, hidden, x, b, SCALE, column, accumulate), bounds
    )


@pytest.mark.parametrize("B, T, K, N, r, n, column", SHAPES)
def test_backward_input(
    ops: ModuleType, rng: Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int
) -> None:
    dx, dhidden, a = floats(rng, B, T, K), floats(rng, B, T, r), floats(rng, r, K)
    bound = UNIT * summed(r + 1) * (magnitude(dx) + magnitude(dhidden) @ magnitude(a)) + TINY
    check(ops, "lora_backward_input", (dx, dhidden, a), {"dx": bound.reshape(dx.shape)})


def test_it_is_the_merged_matrix(ops: ModuleType, rng: Generator) -> None:
    """x (w + scale b a)^T, with nothing of the adapter in the other rows of w."""
    x, w, a, b = floats(rng, 2, 9, 24), floats(rng, 30, 24), floats(rng, 4, 24), floats(rng, 10, 4)
    out, merged = blank(2, 9, 30), w.astype(np.float64)
    ops.linear_forward(out, x, w, None)
    ops.lora_forward(out, blank(2, 9, 4), x, a, b, SCALE, 12)
    merged[12:22] += SCALE * b.astype(np.float64) @ a
    expected = np.empty(out.shape)
    reference.linear_forward(expected, x, merged, None)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("column", [-1, 4])
def test_columns_that_are_not_there(each_device: ModuleType, column: int) -> None:
    x, a, b, out, hidden = blank(1, 2, 3), blank(2, 3), blank(5, 2), blank(1, 2, 8), blank(1, 2, 2)
    with pytest.raises(ValueError, match="column"):
        each_device.lora_forward(out, hidden, x, a, b, 1.0, column)
    with pytest.raises(ValueError, match="column"):
        each_device.lora_backward(a, b, hidden, out, hidden, x, b, 1.0, column, False)
