"""Layers whose matrices are kept in bfloat16 on a CPU: a row or a few, as in decoding, and enough to widen blocks.

The reference sees the same numbers, so the bounds are those of float32.
"""

from __future__ import annotations

from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
import reference
from guard import Array, blank, check, floats
from numpy.random import Generator
from test_activation import gelu_backward_bound, gelu_forward_bound
from test_bf16 import hard_numbers, numbers
from test_linear import backward_bounds, product_bound

# tokens, K, N: all numbers of rows that are few, and some more; K past a step of every vector, and a widened block
FEW = [(M, K, N) for M in (1, 2, 3, 4) for K, N in ((1, 1), (7, 5), (33, 17), (40, 3), (64, 30), (97, 16))]
MANY = [(5, 1, 1), (5, 33, 97), (9, 40, 30), (21, 530, 101), (6, 0, 3), (0, 5, 3), (5, 5, 0)]
HEAVY = [pytest.param(*shape, marks=pytest.mark.heavy) for shape in ((3, 1031, 129), (70, 1100, 200))]


def matrix(rng: Generator, N: int, K: int) -> Array:
    return floats(rng, N, K).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("M, K, N", FEW + MANY + HEAVY)
def test_forward(each_isa: ModuleType, rng: Generator, M: int, K: int, N: int, bias: bool) -> None:
    x, w, b = floats(rng, 1, M, K), matrix(rng, N, K), floats(rng, N) if bias else None
    bound = product_bound(x, w.astype(np.float32), b)
    check(each_isa, "linear_forward", (blank(1, M, N), x, w, b), {"out": bound})


@pytest.mark.parametrize("M, K, N", [(1, 40, 30), (4, 33, 17), (21, 530, 101), (7, 64, 96)])
def test_forward_in_bf16(each_isa_bf16: ModuleType, rng: Generator, M: int, K: int, N: int) -> None:
    x, w = numbers(rng, 1, M, K), matrix(rng, N, K)
    bound = product_bound(x, w.astype(np.float32), None)
    check(each_isa_bf16, "linear_forward", (blank(1, M, N), x, w, None), {"out": bound})


@pytest.mark.parametrize("M, K, N", [(1, 40, 30), (21, 30, 101)])
def test_gelu_forward(each_isa: ModuleType, rng: Generator, M: int, K: int, N: int) -> None:
    x, w, b, pre = floats(rng, 1, M, K), matrix(rng, N, K), floats(rng, N), np.empty((1, M, N))
    off = product_bound(x, w.astype(np.float32), b)
    reference.linear_forward(pre, x, w, b)
    bounds = {"pre": off, "out": 1.13 * off + gelu_forward_bound(np.abs(pre) + off)}
    check(each_isa, "linear_gelu_forward", (blank(1, M, N), blank(1, M, N), x, w, b), bounds)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (3, 33, 17), (21, 101, 530), *MANY, *HEAVY])
def test_backward(each_isa: ModuleType, rng: Generator, M: int, K: int, N: int, alone: bool) -> None:
    """dx alone, which may be x; with no gradient a matrix of float32 takes the same path as with one."""
    x, w, dout = floats(rng, 1, M, K), matrix(rng, N, K), floats(rng, 1, M, N)
    for table in (w, w.astype(np.float32)):
        bounds = {"dx": backward_bounds(blank(N, K), None, dout, x, w.astype(np.float32), False)["dx"]}
        values = (blank(1, M, K), None, None, dout, x, table, False)
        check(each_isa, "linear_backward", values, bounds, {} if alone else {"dx": "x"})


@pytest.mark.parametrize("M, K, N", [(2, 33, 17), (21, 101, 530)])
def test_gelu_backward(each_isa: ModuleType, rng: Generator, M: int, K: int, N: int) -> None:
    pre, w, dout = floats(rng, 1, M, K, scale=2), matrix(rng, N, K), floats(rng, 1, M, N)
    x, dx = blank(1, M, K), np.empty((1, M, K))
    off = backward_bounds(blank(N, K), None, dout, x, w.astype(np.float32), False)["dx"]
    reference.linear_backward(dx, None, None, dout, x, w, False)
    bounds = {"dpre": 1.13 * off + gelu_backward_bound(np.abs(dx) + off, pre)}
    check(each_isa, "gelu_linear_backward", (blank(1, M, K), None, None, dout, pre, x, w, False), bounds)


@pytest.mark.parametrize("M", [1, 3, 9])
def test_each_number_counts_as_what_it_is(each_isa: ModuleType, rng: Generator, M: int) -> None:
    """Products with a one and zeros give every bit back, of the smallest denormal number and of the largest."""
    values = hard_numbers(rng).astype(ml_dtypes.bfloat16)
    values = np.concatenate([values, np.arange(1, 128, dtype=np.uint16).view(ml_dtypes.bfloat16)])
    values = values[np.isfinite(values)]
    K = 43
    table = values[: len(values) // K * K].reshape(-1, K)
    for start in range(0, K, M):
        rows = min(M, K - start)
        x, out = np.eye(K, dtype=np.float32)[None, start : start + rows].copy(), blank(1, rows, len(table))
        each_isa.linear_forward(out, x, table, None)
        np.testing.assert_array_equal(out[0].T, table[:, start : start + rows].astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("M", [1, 4, 9])
def test_what_is_not_finite_stays_so(each_isa: ModuleType, rng: Generator, M: int, bad: float) -> None:
    w, out = matrix(rng, 13, 37), blank(1, M, 13)
    w[4, 36] = bad
    each_isa.linear_forward(out, floats(rng, 1, M, 37), w, None)
    assert not np.isfinite(out[0, :, 4]).any()
    assert np.isfinite(np.delete(out[0], 4, axis=1)).all()


def test_a_row_is_the_same_among_others(each_isa: ModuleType, rng: Generator) -> None:
    """A prompt has the same bits in a batch of a few as alone, in matrices of either type."""
    x, w = floats(rng, 1, 4, 150), matrix(rng, 37, 150)
    for table in (w, w.astype(np.float32)):
        results = []
        for M in (1, 2, 3, 4):
            out = blank(1, M, 37)
            each_isa.linear_forward(out, np.ascontiguousarray(x[:, :M]), table, None)
            results.append(out[0, 0].tobytes())
        assert len(set(results)) == 1


def test_refusals(cpu: ModuleType, rng: Generator) -> None:
    """Such a matrix is not trained, and without a matrix's gradient there is none of its bias."""
    x, w, dout = floats(rng, 1, 2, 3), matrix(rng, 4, 3), floats(rng, 1, 2, 4)
    with pytest.raises(ValueError, match="dw: must be None, a bfloat16 matrix is not trained"):
        cpu.linear_backward(x, blank(4, 3), None, dout, x, w, False)
    for table in (w, w.astype(np.float32)):
        with pytest.raises(ValueError, match="db: must be None where dw is"):
            cpu.linear_backward(x, None, blank(4), dout, x, table, False)
    with pytest.raises(ValueError, match="w: expected dtype float32 or bfloat16, got float16"):
        cpu.linear_forward(dout, x, w.astype(np.float16), None)
