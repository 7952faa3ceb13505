"""rope_forward, rope_backward."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from guard import TINY, UNIT, Array, check, floats
from numpy.random import Generator

# B, T, D, heads turned, channels beside them
SHAPES = [(2, 3, D, 2, 5) for D in (2, 4, 6, 8, 10, 14, 16, 18, 30, 32, 34, 40, 64, 80, 96, 128, 130, 256)]
SHAPES += [(1, T, 10, 3, 0) for T in (1, 2, 5, 33, 130)] + [(1, 5, 6, H, 1) for H in (0, 1, 7, 32)]
SHAPES += [(0, 3, 4, 1, 0), (2, 0, 4, 1, 0), (2, 3, 0, 2, 7)]


def angles(maxT: int, D: int) -> Array:
    """(maxT,D): cosines, then sines, of distinct angles."""
    turn = np.arange(maxT)[:, None] / 100.0 ** (2 * np.arange(D // 2) / max(D, 1))
    return np.concatenate([np.cos(turn), np.sin(turn)], axis=-1).astype(np.float32)


def bound(x: Array, table: Array, places: Array, heads: int) -> Array:
    """Two products and their sum, each rounded at most once; channels beside the heads stay as they are."""
    B, T, N = x.shape
    D = table.shape[1]
    half, width = D // 2, heads * D
    rows = np.abs(table.astype(np.float64))[places[:, None] + np.arange(T)][:, :, None]
    c, s = rows[..., :half], rows[..., half:]
    turned = np.abs(x[..., :width].astype(np.float64)).reshape(B, T, heads, D)
    one, two = turned[..., :half], turned[..., half:]
    sizes = np.concatenate([one * c + two * s, two * c + one * s], axis=-1).reshape(B, T, width)
    return np.concatenate([2 * UNIT * sizes + 3 * TINY, np.zeros((B, T, N - width))], axis=-1)


@pytest.mark.parametrize("B, T, D, heads, beside", SHAPES)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, D: int, heads: int, beside: int) -> None:
    """Every sequence has a place of its own; rows that are none of theirs are not read."""
    maxT = T + 5
    places = (np.arange(B, dtype=np.int32) * 3 + 2) % 6
    x, table = floats(rng, B, T, heads * D + beside), angles(maxT, D)
    unread = np.ones(maxT, bool)
    unread[places[:, None] + np.arange(T)] = False
    table[unread] = np.nan
    check(ops, "rope_forward", (x, places, table, heads), {"qkv": bound(x, table, places, heads)})


@pytest.mark.parametrize("B, T, D, heads, beside", SHAPES)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, D: int, heads: int, beside: int) -> None:
    """From position 0 on; the table may be longer, or as long as the sequences."""
    x, places = floats(rng, B, T, heads * D + beside), np.zeros(B, np.int32)
    for more in (0, 3):
        table = angles(T + more, D)
        table[T:] = np.nan
        check(ops, "rope_backward", (x, table, heads), {"dqkv": bound(x, table, places, heads)})


def test_last_position(ops: ModuleType, rng: Generator) -> None:
    """position + T = maxT: the last row of the table lies against the forbidden page."""
    x, places, table = floats(rng, 1, 4, 33), np.array([5], np.int32), angles(9, 10)
    check(ops, "rope_forward", (x, places, table, 3), {"qkv": bound(x, table, places, 3)})


def test_halves_are_paired(ops: ModuleType) -> None:
    """Channel i with channel i + D/2 of its head, as Hugging Face's files have it, not with its neighbour."""
    x, table = np.zeros((1, 1, 12), np.float32), np.array([[0, 1, 1, 1, 0, 0]], np.float32)
    x[0, 0, 6:] = np.arange(1, 7)  # the second head; its channels 0 and 3 are turned by a right angle
    ops.rope_forward(x, np.zeros(1, np.int32), table, 2)
    np.testing.assert_array_equal(x[0, 0], [0, 0, 0, 0, 0, 0, -4, 2, 3, 1, 5, 6])
    ops.rope_backward(x, table, 2)
    np.testing.assert_array_equal(x[0, 0], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("D", [2, 16, 38])
def test_nan_stays_with_its_pair(ops: ModuleType, rng: Generator, D: int, bad: float) -> None:
    for index in {0, D // 2, D - 1}:
        x = floats(rng, 1, 2, 3 * D)
        x[0, 1, D + index] = bad
        ops.rope_forward(x, np.zeros(1, np.int32), angles(2, D), 2)
        finite = np.isfinite(x[0, 1, D : 2 * D])
        pair = np.zeros(D, bool)
        pair[[index % (D // 2), index % (D // 2) + D // 2]] = True
        assert (finite == ~pair).all()
        assert np.isfinite(x[0, 0]).all() and np.isfinite(x[0, 1, :D]).all()
