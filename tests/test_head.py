"""head_loss, head_logits, sum_losses."""

from __future__ import annotations

import math
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from guard import FLUSHED, TINY, UNIT, Array, blank, check, floats, number, summed
from numpy.random import Generator

VOCABULARIES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33, 47, 48, 49, 64, 65, 127, 128, 129, 257, 513]
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 31, 33, 48, 64, 65, 127, 129]
TOKENS = [1, 2, 4, 5, 7, 8, 11, 12, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]
# B, T, C, V
SHAPES = (
    [(1, 5, 6, V) for V in VOCABULARIES]
    + [(2, 3, C, 19) for C in WIDTHS]
    + [(1, T, 5, 21) for T in TOKENS]
    + [(7, 1, 3, 5), (3, 11, 37, 101), (0, 3, 4, 5), (2, 0, 4, 5)]
)
HEAVY = [
    pytest.param(*shape, marks=pytest.mark.heavy)
    for shape in [(1, 300, 33, 401), (3, 211, 20, 67), (1, 37, 64, 2053), (2, 60, 129, 1000), (1, 4200, 8, 5)]
]


def padded(rng: Generator, V: int, C: int) -> Array:
    """A table of V rows and a few more, which must not matter: were one of them read as a word, nothing else would
    count.  They are finite: a device may multiply them by 0."""
    w = floats(rng, -(-V // 8) * 8 + 8, C)
    w[V:] = 1e30
    return w


def targets_for(rng: Generator, B: int, T: int, V: int) -> Array:
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    if targets.size > 1:
        targets.flat[0], targets.flat[-1] = V - 1, 0
    return targets


def logits_and_bound(x: Array, w: Array, V: int) -> tuple[Array, Array]:
    """Exact logits (B*T,V), and the bound of a float32 product."""
    rows = x.astype(np.float64).reshape(x.shape[0] * x.shape[1], x.shape[2])
    table = w[:V].astype(np.float64)
    return rows @ table.T, UNIT * summed(x.shape[-1]) * (np.abs(rows) @ np.abs(table).T)


def capped_and_bound(logits: Array, off: Array, softcap: float) -> tuple[Array, Array]:
    """softcap tanh(logits / softcap), whose slope is at most 1; the quotient brings a unit or two, tanh 7, and the
    product one."""
    if not softcap:
        return logits, off
    capped = softcap * np.tanh(logits / softcap)
    return capped, off + 10 * UNIT * (np.abs(capped) + off)


def bounds_of(
    dw: Array | None, x: Array, w: Array, targets: Array, V: int, scale: float, accumulate: bool, stored: float = 0.0,
    softcap: float = 0.0, into_dx: bool = False,
) -> dict[str, Array]:
    """An error of a logit is a relative error of its exponential; the largest logit cancels.  `stored` is the relative
    error of logits, and of their gradients, that are rounded to lie in memory.  `into_dx`: dx is wanted without dw."""
    logits, off = capped_and_bound(*logits_and_bound(x, w, V), softcap)
    off = off + stored * (np.abs(logits) + off)
    rows, table = (np.abs(array.astype(np.float64)) for array in (x.reshape(len(logits), x.shape[2]), w[:V]))
    tokens, chosen = np.arange(len(logits)), targets.reshape(-1)
    largest = logits.max(axis=-1, keepdims=True)
    raised = np.exp(logits - largest)
    total = raised.sum(axis=-1, keepdims=True)
    p, lse = raised / total, largest + np.log(total)
    relative = off + UNIT * (3 * (np.abs(logits) + np.abs(largest)) + 8 + V / 16)
    lse_off = (p * relative).sum(axis=-1, keepdims=True) + UNIT * (summed(V) + 4)
    lse_off = lse_off + 3 * UNIT * (np.abs(lse) + np.abs(largest))
    target = logits[tokens, chosen]
    losses = lse_off[:, 0] + off[tokens, chosen] + 2 * UNIT * (np.abs(lse[:, 0]) + np.abs(target))
    bounds = {"losses": losses.reshape(targets.shape)}
    if dw is None and not into_dx:
        return bounds
    dlogits = p.copy()
    dlogits[tokens, chosen] -= 1
    dlogits = np.abs(scale * dlogits)
    ones = np.zeros(p.shape)
    ones[tokens, chosen] = 1
    dlogits_off = abs(scale) * (p * (relative + lse_off + 4 * UNIT) + 2 * UNIT * ones + FLUSHED)
    if softcap:  # dlogits * (1 - t^2), t = logits / softcap
        t = np.abs(logits / softcap)
        slope_off = 2 * t * (off / softcap + 2 * UNIT * t) + 4 * UNIT
        dlogits, dlogits_off = (1 - t**2) * dlogits, (1 - t**2 + slope_off) * dlogits_off + slope_off * dlogits
    dlogits_off += 2 * UNIT * dlogits + stored * (dlogits + dlogits_off)
    if dw is not None:
        before = np.abs(dw.astype(np.float64)) if accumulate else np.zeros(dw.shape)
        sums = UNIT * summed(len(logits))
        weights = sums * before
        weights[:V] += sums * (dlogits.T @ rows) + dlogits_off.T @ rows
        bounds["dw"] = weights + TINY
    bounds["dx"] = (UNIT * summed(V) * (dlogits @ table) + dlogits_off @ table).reshape(x.shape) + TINY
    return bounds


@pytest.mark.parametrize("B, T, C, V", SHAPES + HEAVY)
def test_loss(ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int) -> None:
    """Evaluation: no gradients."""
    x, w, targets = floats(rng, B, T, C), padded(rng, V, C), targets_for(rng, B, T, V)
    bounds = bounds_of(None, x, w, targets, V, 1.0, False)
    check(ops, "head_loss", (blank(B, T), None, None, x, w, targets, V, 1.0, 0.0, False), bounds)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C, V", SHAPES + HEAVY)
def test_gradients(ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int, accumulate: bool) -> None:
    """Padded rows of dw become 0, or stay as they are when accumulating."""
    x, w, targets = floats(rng, B, T, C), padded(rng, V, C), targets_for(rng, B, T, V)
    dw, scale = floats(rng, *w.shape), 1 / max(B * T, 1)
    bounds = bounds_of(dw, x, w, targets, V, scale, accumulate)
    given = (blank(B, T), blank(B, T, C), dw, x, w, targets, V, scale, 0.0, accumulate)
    found = check(ops, "head_loss", given, bounds)
    np.testing.assert_array_equal(found["dw"][V:], dw[V:] if accumulate else 0)


@pytest.mark.parametrize("B, T, C, V", [(1, 1, 1, 2), (2, 13, 17, 33), (1, 70, 9, 65), (3, 47, 20, 129)])
def test_gradient_over_its_input(ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int) -> None:
    """dx may be x, whose last use is the gradient of w."""
    x, w, targets = floats(rng, B, T, C), padded(rng, V, C), targets_for(rng, B, T, V)
    dw = floats(rng, *w.shape)
    for accumulate in (False, True):
        bounds = bounds_of(dw, x, w, targets, V, -0.7, accumulate)
        given = (blank(B, T), blank(B, T, C), dw, x, w, targets, V, -0.7, 0.0, accumulate)
        check(ops, "head_loss", given, bounds, {"dx": "x"})


@pytest.mark.parametrize("V", [1, 5, 16, 129])
def test_table_without_padding(ops: ModuleType, rng: Generator, V: int) -> None:
    """Vp = V: the last row of w lies against the forbidden page."""
    x, w, targets = floats(rng, 2, 3, 7), floats(rng, V, 7), targets_for(rng, 2, 3, V)
    dw = floats(rng, V, 7)
    given = (blank(2, 3), blank(2, 3, 7), dw, x, w, targets, V, 0.5, 0.0, False)
    check(ops, "head_loss", given, bounds_of(dw, x, w, targets, V, 0.5, False))
    _, off = logits_and_bound(x, w, V)
    check(ops, "head_logits", (blank(2, 3, V), x, w, V, 0.0), {"logits": off.reshape(2, 3, V)})


@pytest.mark.parametrize("size", [88.0, 120.0, 1e4])
def test_huge_logits(ops: ModuleType, rng: Generator, size: float) -> None:
    """exp of the bare logit overflows from 89 on, either way."""
    B, T, C, V = 2, 9, 4, 37
    x, w = floats(rng, B, T, C), floats(rng, 40, C)
    targets = targets_for(rng, B, T, V)
    x *= np.float32(size / np.abs(logits_and_bound(x, w, V)[0]).max())
    dw = blank(40, C)
    given = (blank(B, T), blank(B, T, C), dw, x, w, targets, V, 0.1, 0.0, False)
    found = check(ops, "head_loss", given, bounds_of(dw, x, w, targets, V, 0.1, False))
    assert found["losses"].max() > size / 4


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e4])
@pytest.mark.parametrize("V", [1, 4, 17, 130])
def test_equal_logits(ops: ModuleType, V: int, value: float) -> None:
    """All logits alike: the loss is log V, whatever their size."""
    x, w, losses = np.full((1, 3, 1), value, np.float32), np.ones((V + 3, 1), np.float32), blank(1, 3)
    targets = np.zeros((1, 3), np.int32)
    check(
        ops, "head_loss", (losses, None, None, x, w, targets, V, 1.0, 0.0, False),
        bounds_of(None, x, w, targets, V, 1.0, False),
    )
    ops.head_loss(losses, None, None, x, w, targets, V, 1.0, 0.0, False)
    np.testing.assert_allclose(losses, math.log(V), atol=UNIT * (abs(value) * 4 + 16))


def test_certain_prediction(ops: ModuleType) -> None:
    """A target that outweighs all others by 200: loss and gradients are 0, not -0.0 and not NaN."""
    x, w = np.full((1, 2, 1), 200, np.float32), blank(9, 1)
    w[4] = 1
    losses, dx, dw = blank(1, 2), blank(1, 2, 1), blank(9, 1)
    ops.head_loss(losses, dx, dw, x, w, np.full((1, 2), 4, np.int32), 9, 1.0, 0.0, False)
    for array in (losses, dx, dw):
        np.testing.assert_array_equal(array, 0)


def test_exponential(ops: ModuleType) -> None:
    """The exponential itself, alone: two logits 0 and -d, whose difference is exact, and dx = -p(second).

    4 units for e^-d (2 ulp), 1 for the sum, 2 to divide and scale, 1 to store: relative, all the way down.
    """
    d = np.arange(0, 87 * 64, 7, dtype=np.float32) / 64
    x, w = d.reshape(1, -1, 1), np.array([[0], [-1]], np.float32)
    dx, losses = np.empty_like(x), np.empty_like(x[..., 0])
    ops.head_loss(losses, dx, np.empty_like(w), x, w, np.zeros(losses.shape, np.int32), 2, 1.0, 0.0, False)
    exact = np.exp(-x.astype(np.float64))
    exact /= 1 + exact
    assert (np.abs(dx + exact) / exact).max() <= 8 * UNIT


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("V", [1, 8, 19, 64])
def test_nan_is_kept(ops: ModuleType, rng: Generator, V: int, bad: float) -> None:
    """One bad logit anywhere gives its token a loss that is not finite: training must notice."""
    for index in {0, V // 2, V - 1}:
        for target in {0, V - 1}:
            w, losses = floats(rng, V, 3), blank(1, 5)
            x = floats(rng, 1, 5, 3)
            w[:, 2], x[0, :, 2] = 0, 0
            w[index, 2], x[0, 3, 2] = 1, bad
            targets = np.full((1, 5), target, np.int32)
            ops.head_loss(losses, None, None, x, w, targets, V, 1.0, 0.0, False)
            # 0 * inf is NaN too, so all logits of this token are bad, and none of the others'
            assert not np.isfinite(losses[0, 3])
            assert np.isfinite(np.delete(losses[0], 3)).all()


def test_nan_in_one_logit(ops: ModuleType, rng: Generator) -> None:
    """The same with a bad row of w, so that one logit of each token is NaN and it is not the target's."""
    for V in (3, 16, 37, 130):
        for index in {1, V // 2, V - 1}:
            x, w, losses, logits = floats(rng, 1, 5, 3), floats(rng, V, 3), blank(1, 5), blank(1, 5, V)
            w[index] = np.nan
            ops.head_loss(losses, None, None, x, w, np.zeros((1, 5), np.int32), V, 1.0, 0.0, False)
            assert np.isnan(losses).all()
            ops.head_logits(logits, x, w, V, 0.0)
            assert np.isnan(logits[..., index]).all()
            assert np.isfinite(np.delete(logits, index, axis=-1)).all()


@pytest.mark.parametrize("B, T, C, V", SHAPES + HEAVY)
def test_logits(ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int) -> None:
    x, w = floats(rng, B, T, C), padded(rng, V, C)
    _, off = logits_and_bound(x, w, V)
    check(ops, "head_logits", (blank(B, T, V), x, w, V, 0.0), {"logits": off.reshape(B, T, V)})


# ---- soft-caps, and what is not trained ------------------------------------------------------------

CAPPED = [(2, 3, 7, 19), (1, 5, 16, 129), (3, 11, 37, 101), (1, 33, 5, 8), (0, 3, 4, 5), (1, 3, 0, 4)]


@pytest.mark.parametrize("softcap", [0.5, 5.0, 30.0])
@pytest.mark.parametrize("B, T, C, V", CAPPED)
def test_softcap(ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int, softcap: float) -> None:
    """Far below the largest logit, about it, and above: logits, losses and gradients."""
    x, w, targets = floats(rng, B, T, C), padded(rng, V, C), targets_for(rng, B, T, V)
    dw, tokens = floats(rng, *w.shape), (x, w, targets, V, 0.3, softcap)
    _, off = capped_and_bound(*logits_and_bound(x, w, V), softcap)
    check(ops, "head_logits", (blank(B, T, V), x, w, V, softcap), {"logits": off.reshape(B, T, V) + TINY})
    bounds = bounds_of(None, x, w, targets, V, 0.3, False, softcap=softcap)
    check(ops, "head_loss", (blank(B, T), None, None, *tokens, False), bounds)
    for accumulate in (False, True):
        bounds = bounds_of(dw, x, w, targets, V, 0.3, accumulate, softcap=softcap)
        for alias in ({}, {"dx": "x"}):
            check(ops, "head_loss", (blank(B, T), blank(B, T, C), dw, *tokens, accumulate), bounds, alias)


def test_softcap_matters(ops: ModuleType, rng: Generator) -> None:
    """Without it loss and gradient are far off."""
    x, w, targets = floats(rng, 1, 5, 16), floats(rng, 33, 16), targets_for(rng, 1, 5, 33)
    results = []
    for softcap in (0.0, 5.0):
        losses, dx, dw = blank(1, 5), blank(1, 5, 16), blank(33, 16)
        ops.head_loss(losses, dx, dw, x, w, targets, 33, 1.0, softcap, False)
        results.append((losses, dx, dw))
    for off, on in zip(*results, strict=True):
        assert np.linalg.norm(off - on) > 0.05 * np.linalg.norm(off)


def test_softcap_alone(ops: ModuleType) -> None:
    """One logit, x itself: relative to its own size from 2^-126 on, and the cap beyond; the sign is kept.

    One or two units for the quotient, 7 for tanh, one for the product.
    """
    powers = 2.0 ** np.arange(-126, 127, dtype=np.float64)
    half = np.concatenate([powers, powers * 1.37, np.linspace(1e-3, 400, 4001)]).astype(np.float32)
    x, w = np.concatenate([half, -half]).reshape(1, -1, 1), np.ones((1, 1), np.float32)
    logits = np.empty_like(x)
    for cap in (1.0, 30.0, 50.0):
        ops.head_logits(logits, x, w, 1, cap)
        exact = cap * np.tanh(x.astype(np.float64) / cap)
        assert (np.abs(logits - exact) <= 10 * UNIT * np.abs(exact) + 4 * TINY + cap * FLUSHED).all()
        assert (np.abs(logits[np.abs(x) > 20 * cap]) == cap).all()


@pytest.mark.parametrize("V", [1, 8, 19, 64])
def test_softcap_keeps_nan(ops: ModuleType, rng: Generator, V: int) -> None:
    for index in {0, V // 2, V - 1}:
        x, w, losses, logits = floats(rng, 1, 5, 3), floats(rng, V, 3), blank(1, 5), blank(1, 5, V)
        w[index] = np.nan
        ops.head_loss(losses, None, None, x, w, np.zeros((1, 5), np.int32), V, 1.0, 30.0, False)
        assert np.isnan(losses).all()
        ops.head_logits(logits, x, w, V, 30.0)
        assert np.isnan(logits[..., index]).all() and np.isfinite(np.delete(logits, index, axis=-1)).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("B, T, C, V", [*CAPPED, (1, 300, 8, 21)])
def test_gradient_of_the_input_alone(
    ops: ModuleType, rng: Generator, B: int, T: int, C: int, V: int, softcap: float
) -> None:
    """A head that is not trained."""
    x, w, targets = floats(rng, B, T, C), padded(rng, V, C), targets_for(rng, B, T, V)
    bounds = bounds_of(None, x, w, targets, V, -0.7, False, softcap=softcap, into_dx=True)
    for alias in ({}, {"dx": "x"}):
        given = (blank(B, T), blank(B, T, C), None, x, w, targets, V, -0.7, softcap, False)
        check(ops, "head_loss", given, bounds, alias)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("B, T, C, V", [
    (1, 1, 7, 19), (1, 2, 33, 130), (2, 3, 16, 65), (3, 11, 37, 101), (1, 300, 8, 21), (1, 5, 530, 197), (0, 3, 4, 5),
])
def test_bfloat16_table(
    each_isa: ModuleType, rng: Generator, B: int, T: int, C: int, V: int, softcap: float
) -> None:
    """A row, a few, and enough to widen the table in blocks; what it holds counts as it is."""
    x, targets = floats(rng, B, T, C), targets_for(rng, B, T, V)
    table = padded(rng, V, C).astype(ml_dtypes.bfloat16)
    w = table.astype(np.float32)
    _, off = capped_and_bound(*logits_and_bound(x, w, V), softcap)
    check(each_isa, "head_logits", (blank(B, T, V), x, table, V, softcap), {"logits": off.reshape(B, T, V)})
    for into_dx in (False, True):
        dx = blank(B, T, C) if into_dx else None
        bounds = bounds_of(None, x, w, targets, V, 0.3, False, softcap=softcap, into_dx=into_dx)
        check(each_isa, "head_loss", (blank(B, T), dx, None, x, table, targets, V, 0.3, softcap, False), bounds)


DOUBLE = 2.0**-53


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, -1e-4])
@pytest.mark.parametrize("B, T", [
    (1, 1), (1, 2), (3, 1), (2, 3), (5, 7), (1, 255), (1, 256), (1, 257), (4, 64), (31, 33), (3, 1365), (0, 3), (2, 0),
])
def test_sum_losses(ops: ModuleType, rng: Generator, B: int, T: int, scale: float, accumulate: bool) -> None:
    """In double: n terms, a product and a sum are all that rounds."""
    total, losses = number(-3.25), np.abs(floats(rng, B, T, scale=3))
    before = 3.25 if accumulate else 0.0
    bound = DOUBLE * ((B * T + 2) * abs(scale) * float(losses.sum(dtype=np.float64)) + 2 * before)
    check(ops, "sum_losses", (total, losses, scale, accumulate), {"total": bound})


def test_sum_losses_is_not_float32(ops: ModuleType) -> None:
    """A thousandth beside thousands: in float32 each would be rounded by up to 6 %."""
    losses, total = np.full((4, 1024), 1e-3, np.float32), number()
    losses[0, 0] = 4096
    ops.sum_losses(total, losses, 1.0, False)
    exact = math.fsum(losses.ravel().tolist())
    assert abs(total[0] - exact) <= 4096 * DOUBLE * exact


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [1, 2, 31, 257, 1030])
def test_sum_losses_shows_what_is_not_finite(ops: ModuleType, rng: Generator, n: int, bad: float) -> None:
    for index in {0, n // 2, n - 1}:
        losses, total = np.abs(floats(rng, 1, n)), number()
        losses[0, index] = bad
        ops.sum_losses(total, losses, 0.5, False)
        assert np.isnan(total[0]) if np.isnan(bad) else total[0] == np.inf
