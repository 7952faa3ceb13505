"""embedding_forward, embedding_backward."""

from __future__ import annotations

from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from guard import TINY, UNIT, Array, blank, check, floats, summed
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


SCALES = [1.0, float(np.float32(33**0.5))]  # none, and one that rounds


def forward_bound(tokens: Array, positions: Array, wte: Array, wpe: Array | None, scale: float) -> Array:
    """One rounding of the sum, and one of the product where it is not exact."""
    product = scale * wte[tokens].astype(np.float64)
    exact = product if wpe is None else product + wpe[positions[:, None] + np.arange(tokens.shape[1])]
    return UNIT * (np.abs(exact) + (np.abs(product) if scale != 1 else 0)) + TINY


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    """Every sequence has a place of its own; rows that are none of theirs are not read."""
    V, Vp, maxT = 11, 16, T + 5
    tokens, wte, wpe = tokens_for(rng, B, T, V), floats(rng, Vp, C), floats(rng, maxT, C)
    positions = (np.arange(B, dtype=np.int32) * 2 + 1) % 6
    unread = np.ones(maxT, bool)
    unread[positions[:, None] + np.arange(T)] = False
    wte[V:], wpe[unread] = np.nan, np.nan
    for scale in SCALES:
        for places in (wpe, None):
            bound = forward_bound(tokens, positions, wte, places, scale)
            values = (blank(B, T, C), tokens, positions, wte, places, V, scale)
            check(ops, "embedding_forward", values, {"out": bound})


@pytest.mark.parametrize("position", [0, 5])
def test_last_position(ops: ModuleType, rng: Generator, position: int) -> None:
    """position + T = maxT: the last row of wpe lies against the forbidden page."""
    tokens, wte, wpe = tokens_for(rng, 1, 4, 3), floats(rng, 3, 19), floats(rng, position + 4, 19)
    positions = np.array([position], np.int32)
    bound = forward_bound(tokens, positions, wte, wpe, 1.0)
    check(ops, "embedding_forward", (blank(1, 4, 19), tokens, positions, wte, wpe, 3, 1.0), {"out": bound})


def test_positions_without_a_table(ops: ModuleType, rng: Generator) -> None:
    """Without wpe there is no last position."""
    tokens, wte, out = tokens_for(rng, 2, 3, 5), floats(rng, 5, 7), blank(2, 3, 7)
    ops.embedding_forward(out, tokens, np.array([2**31 - 1, 0], np.int32), wte, None, 5, 1.0)
    np.testing.assert_array_equal(out, wte[tokens])


@pytest.mark.parametrize("C", [1, 7, 16, 33, 129])
@pytest.mark.parametrize("which", [("wte",), ("wpe",), ("wte", "wpe")])
def test_forward_of_bfloat16(each_isa: ModuleType, rng: Generator, C: int, which: tuple[str, ...]) -> None:
    """Tables that are not trained: what they hold counts as it is."""
    tokens, positions = tokens_for(rng, 2, 3, 11), np.array([4, 1], np.int32)
    tables = {"wte": floats(rng, 16, C), "wpe": floats(rng, 9, C)}
    for name in which:
        tables[name] = tables[name].astype(ml_dtypes.bfloat16)
    for scale in SCALES:
        wide = {name: table.astype(np.float32) for name, table in tables.items()}
        bound = forward_bound(tokens, positions, wide["wte"], wide["wpe"], scale)
        given = (blank(2, 3, C), tokens, positions, tables["wte"], tables["wpe"], 11, scale)
        check(each_isa, "embedding_forward", given, {"out": bound})


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    V, Vp = 7, 9  # few tokens: each occurs many times
    tokens, dout = tokens_for(rng, B, T, V), floats(rng, B, T, C)
    dwte, dwpe = floats(rng, Vp, C), floats(rng, T + 3, C)
    magnitude = np.abs(dout.astype(np.float64))
    by_position = np.abs(dwpe.astype(np.float64)) if accumulate else np.zeros(dwpe.shape)
    by_position[:T] += magnitude.sum(axis=0)
    most = int(np.bincount(tokens.ravel(), minlength=1).max())
    unused = np.setdiff1d(np.arange(Vp), tokens)
    for scale in SCALES:
        by_token = np.abs(dwte.astype(np.float64))
        np.add.at(by_token, tokens, scale * magnitude)
        bounds = {"dwte": UNIT * (summed(most) + (scale != 1)) * by_token, "dwpe": UNIT * summed(B) * by_position}
        for places in (dwpe, None):
            if places is None:
                del bounds["dwpe"]
            found = check(ops, "embedding_backward", (dwte, places, dout, tokens, scale, accumulate), bounds)
            np.testing.assert_array_equal(found["dwte"][unused], dwte[unused])


def test_backward_one_token(ops: ModuleType, rng: Generator) -> None:
    """Every row the same token: one row of dwte takes them all."""
    B, T, C = 4, 65, 33
    dout = floats(rng, B, T, C)
    magnitude = np.abs(dout.astype(np.float64))
    total = magnitude.sum(axis=(0, 1))
    check(
        ops, "embedding_backward", (blank(3, C), blank(T, C), dout, np.full((B, T), 2, np.int32), 1.0, False),
        {
            "dwte": UNIT * summed(B * T) * np.stack([0 * total, 0 * total, total]),
            "dwpe": UNIT * summed(B) * magnitude.sum(axis=0),
        },
    )
