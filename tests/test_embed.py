"""embedding_forward, embedding_backward."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from guard import UNIT, Array, blank, check, floats, summed
from numpy.random import Generator

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 127, 128, 129, 257]
SHAPES = (
    [(2, 3, C) for C in WIDTHS]
    + [(1, T, 5) for T in (1, 2, 7, 16, 63, 64, 65, 129)]
    + [(B, 3, 4) for B in (1, 3, 5, 17)]
    + [(0, 3, 4), (2, 0, 4), (2, 3, 0)]
)


def tokens_for(rng: Generator, B: int, T: int, V: int) -> Array:
    """Random tokens, both ends of the range among them."""
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    if tokens.size > 1:
        tokens.flat[0], tokens.flat[-1] = V - 1, 0
    return tokens


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    V, Vp, position = 11, 16, 2
    tokens, wte, wpe = tokens_for(rng, B, T, V), floats(rng, Vp, C), floats(rng, T + position + 3, C)
    wte[V:] = np.nan
    wpe[:position] = np.nan
    wpe[position + T :] = np.nan
    values = (blank(B, T, C), tokens, wte, wpe, V, position)
    exact = np.abs(wte[tokens].astype(np.float64) + wpe[position : position + T])
    check(ops, "embedding_forward", values, {"out": UNIT * exact})


@pytest.mark.parametrize("position", [0, 5])
def test_last_position(ops: ModuleType, rng: Generator, position: int) -> None:
    """position + T = maxT: the last row of wpe lies against the forbidden page."""
    tokens, wte, wpe = tokens_for(rng, 1, 4, 3), floats(rng, 3, 19), floats(rng, position + 4, 19)
    exact = np.abs(wte[tokens].astype(np.float64) + wpe[position:])
    check(ops, "embedding_forward", (blank(1, 4, 19), tokens, wte, wpe, 3, position), {"out": UNIT * exact})


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    V, Vp = 7, 9  # few tokens: each occurs many times
    tokens, dout = tokens_for(rng, B, T, V), floats(rng, B, T, C)
    dwte, dwpe = floats(rng, Vp, C), floats(rng, T + 3, C)
    magnitude = np.abs(dout.astype(np.float64))
    by_token = np.abs(dwte.astype(np.float64))
    np.add.at(by_token, tokens, magnitude)
    by_position = np.abs(dwpe.astype(np.float64)) if accumulate else np.zeros(dwpe.shape)
    by_position[:T] += magnitude.sum(axis=0)
    most = int(np.bincount(tokens.ravel(), minlength=1).max())
    values = (dwte, dwpe, dout, tokens, accumulate)
    found = check(
        ops, "embedding_backward", values,
        {"dwte": UNIT * summed(most) * by_token, "dwpe": UNIT * summed(B) * by_position},
    )
    unused = np.setdiff1d(np.arange(Vp), tokens)
    np.testing.assert_array_equal(found["dwte"][unused], dwte[unused])


def test_backward_one_token(ops: ModuleType, rng: Generator) -> None:
    """Every row the same token: one row of dwte takes them all."""
    B, T, C = 4, 65, 33
    dout = floats(rng, B, T, C)
    magnitude = np.abs(dout.astype(np.float64))
    total = magnitude.sum(axis=(0, 1))
    check(
        ops, "embedding_backward", (blank(3, C), blank(T, C), dout, np.full((B, T), 2, np.int32), False),
        {
            "dwte": UNIT * summed(B * T) * np.stack([0 * total, 0 * total, total]),
            "dwpe": UNIT * summed(B) * magnitude.sum(axis=0),
        },
    )
