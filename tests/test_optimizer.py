"""global_norm, clip_scale, adamw_step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
from guard import PLACES, TINY, UNIT, Array, call, check, floats, names, number
from numpy.random import Generator

LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 257, 1031]
LARGE = [pytest.param(n, marks=pytest.mark.heavy) for n in (4095, 4096, 4097, 8192, 16385, 65537, 300007)]

# ---- the norm, and clipping ------------------------------------------------------------------------


def norm(ops: ModuleType, x: Array, place: str) -> float:
    given = {"norm": number(), "x": x}
    return float(call(ops, "global_norm", given, place, {})["norm"][0])


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("n", LENGTHS + LARGE)
def test_norm(ops: ModuleType, rng: Generator, n: int, scale: float) -> None:
    """Squares of float32 are exact in double, so that n additions and a root are all that rounds."""
    x = floats(rng, n, scale=scale)
    exact = math.sqrt(math.fsum(value * value for value in x.tolist()))
    for place in PLACES:
        assert abs(norm(ops, x, place) - exact) <= (n + 4) * 2.0**-53 * exact


def test_norm_of_any_shape(ops: ModuleType, rng: Generator) -> None:
    x = floats(rng, 2, 3, 5, 7)
    assert norm(ops, x, "end") == norm(ops, x.reshape(-1), "end") == norm(ops, x.reshape(30, 7), "end")
    assert norm(ops, np.zeros((3, 0, 2), np.float32), "end") == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 67, 4096, 4097, 4133])
def test_norm_shows_what_is_not_finite(ops: ModuleType, rng: Generator, n: int, bad: float) -> None:
    """At any place: among whole vectors, in the tail, on both sides of a chunk's edge."""
    places = set(range(n)) if n < 100 else {0, 1, 15, 16, 2048, 4080, 4094, 4095, n - 1, n - 2}
    for index in places:
        x, found = floats(rng, n), number()
        x[index] = bad
        ops.global_norm(found, x)
        assert math.isnan(found[0]) if math.isnan(bad) else found[0] == math.inf


def clipped(ops: ModuleType, norm: float, loss: float, limit: float) -> float:
    given = {"scale": number(), "norm": number(norm), "loss": number(loss), "limit": limit}
    found = {float(call(ops, "clip_scale", given, place, {})["scale"][0]) for place in PLACES}
    (scale,) = found if not any(map(math.isnan, found)) else [math.nan]
    return scale


@pytest.mark.parametrize("norm, limit, scale", [
    (4.0, 1.0, 0.25), (0.3, 0.1, 0.1 / 0.3), (1e300, 1e-3, 1e-303), (1.0 + 2.0**-52, 1.0, 1.0 / (1.0 + 2.0**-52)),
    (1.0, 1.0, 1.0), (0.999, 1.0, 1.0), (0.0, 1.0, 1.0), (5e-324, 1.0, 1.0),
    (4.0, 0.0, 1.0), (4.0, -1.0, 1.0), (0.0, 0.0, 1.0), (1e308, math.inf, 1.0),
])
def test_clip_scale(ops: ModuleType, norm: float, limit: float, scale: float) -> None:
    """One division in double; no limit where it is not positive.  The loss decides nothing by its size."""
    for loss in (0.0, -3.0, 1e308):
        assert abs(clipped(ops, norm, loss, limit) - scale) <= 2.0**-52 * scale


@pytest.mark.parametrize("limit", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("norm, loss", [
    (norm, loss) for norm, loss in itertools.product((2.0, math.nan, math.inf), (3.0, math.nan, math.inf, -math.inf))
    if not math.isfinite(norm) or not math.isfinite(loss)
])
def test_clip_scale_of_what_is_not_finite(ops: ModuleType, norm: float, loss: float, limit: float) -> None:
    """With a limit or without one."""
    assert math.isnan(clipped(ops, norm, loss, limit))


# ---- the update ------------------------------------------------------------------------------------

Spans = Sequence[tuple[int, int, float]]


class Update(NamedTuple):
    """The scalars of one AdamW update, and where decay applies: all over, if not told otherwise."""

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.5
    step: int = 3
    scale: float = 1.0


def state(rng: Generator, n: int) -> tuple[Array, Array, Array, Array]:
    """w, m, v, dw with gradients from 1e-6 to 1 and moments to match."""
    size = np.float32(10) ** rng.uniform(-6, 0, n).astype(np.float32)
    return floats(rng, n), size * floats(rng, n), (size * floats(rng, n)) ** 2, size * floats(rng, n)


def arguments(
    w: Array, m: Array, v: Array, dw: Array, u: Update, copy: Array | None = None, spans: Spans | None = None
) -> tuple[Any, ...]:
    """Those of adamw_step, in order."""
    spans = [(0, len(w), u.weight_decay)] if spans is None else spans
    return w, m, v, dw, copy, number(u.lr, u.step), number(u.scale), spans, u.beta1, u.beta2, u.eps, 0


def adamw_bounds(w: Array, m: Array, v: Array, dw: Array, u: Update) -> dict[str, Array]:
    """Four roundings per moment; then quotient, root, sum and product, ten in all.

    The factors 1 - beta and the corrections are taken in double: rounding beta to float32 first would
    cost 1 - beta2 a relative error of 3e-5.
    """
    w, m, v, dw = (array.astype(np.float64) for array in (w, m, v, dw))
    g = np.abs(u.scale * dw)
    correction1, correction2 = 1 - u.beta1**u.step, 1 - u.beta2**u.step
    m_off = UNIT * 5 * (np.abs(m) + (1 - u.beta1) * g) + TINY
    v_new = u.beta2 * v + (1 - u.beta2) * g**2
    v_off = UNIT * 5 * (v + (1 - u.beta2) * g**2) + TINY
    m_hat = np.abs(u.beta1 * m + (1 - u.beta1) * u.scale * dw) / correction1
    root = np.sqrt(v_new / correction2)
    below = np.sqrt(np.maximum(v_new - v_off, 0) / correction2)
    above = np.sqrt((v_new + v_off) / correction2)
    step_off = m_off / correction1 / (below + u.eps) + m_hat * (1 / (below + u.eps) - 1 / (root + u.eps))
    step_off = np.maximum(step_off, m_hat * (1 / (root + u.eps) - 1 / (above + u.eps)))
    step = m_hat / (root + u.eps)
    w_off = u.lr * (step_off + UNIT * (10 * step + 6 * u.weight_decay * np.abs(w)))
    return {"w": w_off + UNIT * 3 * (np.abs(w) + u.lr * step) + TINY, "m": m_off, "v": v_off}


def check_adamw(ops: ModuleType, given: tuple[Array, Array, Array, Array], u: Update) -> dict[str, Array]:
    return check(ops, "adamw_step", arguments(*given, u), adamw_bounds(*given, u))


@pytest.mark.parametrize("update", [
    Update(), Update(step=1), Update(step=100000), Update(scale=-0.125), Update(weight_decay=0.0),
    Update(beta2=0.95, eps=1e-3, lr=6e-4), Update(beta1=0.0), Update(lr=0.0), Update(scale=0.0, step=2),
    Update(scale=1 / 3), Update(scale=1e-30),
])
def test_adamw(ops: ModuleType, rng: Generator, update: Update) -> None:
    check_adamw(ops, state(rng, 517), update)


@pytest.mark.parametrize("n", LENGTHS + LARGE)
def test_adamw_lengths(ops: ModuleType, rng: Generator, n: int) -> None:
    check_adamw(ops, state(rng, n), Update())


@pytest.mark.parametrize("spans", [
    [(0, 1, 0.5)], [(516, 517, 0.5)], [(3, 20, 0.0), (20, 31, 0.5), (31, 95, 0.0), (100, 517, 0.1)],
    [(0, 0, 0.5), (7, 7, 0.5), (8, 9, 0.5), (517, 517, 0.5)], [(64, 128, 0.3), (192, 256, 0.7)], [],
    [(i, i + 1, 0.01 * i) for i in range(0, 517, 3)],
])  # fmt: skip
@pytest.mark.parametrize("copied", [False, True])
def test_adamw_of_spans(ops: ModuleType, rng: Generator, spans: Spans, copied: bool) -> None:
    """Each with its own decay; what lies between them stays as it is, to the bit, in the copy too."""
    given, n = state(rng, 517), 517
    copy = floats(rng, n) if copied else None
    inside, decays = np.zeros(n, bool), np.zeros(n)
    for start, stop, decay in spans:
        inside[start:stop], decays[start:stop] = True, decay
    bounds = {name: np.where(inside, bound, 0.0) for name, bound in adamw_bounds(*given, Update()).items()}
    bounds["w"] = bounds["w"] + inside * UNIT * 6 * 0.01 * decays.max(initial=0.5) * np.abs(given[0])
    if copy is not None:
        bounds["copy"] = bounds["w"]
    found = check(ops, "adamw_step", arguments(*given, Update(), copy, tuple(spans)), bounds)
    if copy is not None:
        np.testing.assert_array_equal(found["copy"][inside], found["w"][inside])
        np.testing.assert_array_equal(found["copy"][~inside], copy[~inside])


@pytest.mark.parametrize("n", LENGTHS + LARGE)
def test_adamw_copies(ops: ModuleType, rng: Generator, n: int) -> None:
    """The copy is w as it was written, whatever was in it before."""
    given, copy = state(rng, n), np.full(n, np.nan, np.float32)
    bounds = adamw_bounds(*given, Update())
    found = check(ops, "adamw_step", arguments(*given, Update(), copy), {**bounds, "copy": bounds["w"]})
    assert found["copy"].tobytes() == found["w"].tobytes()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [0, 1, 16, 37, 1031])
def test_adamw_that_must_not_be(ops: ModuleType, rng: Generator, n: int, scale: float) -> None:
    """Where scale is not finite nothing changes, to the bit, whatever the gradient is."""
    w, m, v, dw = state(rng, n)
    dw[: n // 2] = np.nan
    for copy in (None, floats(rng, n)):
        given = arguments(w, m, v, dw, Update(scale=scale), copy)
        for place in PLACES:
            found = call(ops, "adamw_step", dict(zip(names("adamw_step"), given, strict=True)), place, {})
            for before, name in ((w, "w"), (m, "m"), (v, "v"), (copy, "copy")):
                if before is not None:
                    assert found[name].tobytes() == before.tobytes(), name


def test_adamw_counts_from_one(cpu: ModuleType, rng: Generator) -> None:
    """At t = 0 the corrections would divide by 0.  A GPU would have to wait to know."""
    for t in (0.0, -1.0, 0.5, math.nan):
        w, m, v, dw = state(rng, 5)
        with pytest.raises(ValueError, match="hyper: t counts from 1"):
            cpu.adamw_step(w, m, v, dw, None, number(0.1, t), number(1.0), [(0, 5, 0.0)], 0.9, 0.999, 1e-8, 0)


def test_adamw_has_float32_masters(cpu: ModuleType, rng: Generator) -> None:
    """Weights of bfloat16 are a GPU's."""
    import ml_dtypes

    w, m, v, dw = state(rng, 5)
    for name in ("w", "copy"):
        given = dict(zip(names("adamw_step"), arguments(w, m, v, dw, Update(), w.copy()), strict=True))
        given[name] = w.astype(ml_dtypes.bfloat16)
        with pytest.raises(ValueError, match=f"{name}: expected dtype float32, got bfloat16"):
            cpu.adamw_step(**given)


def test_adamw_without_gradient(ops: ModuleType, rng: Generator) -> None:
    """Nothing but decay: m = v = 0 stay so, and 0 / (0 + eps) is 0."""
    w = floats(rng, 67)
    zeros = np.zeros(67, np.float32)
    found = check_adamw(ops, (w, zeros, zeros, zeros), Update())
    np.testing.assert_array_equal(found["m"], 0)
    np.testing.assert_array_equal(found["v"], 0)
    np.testing.assert_allclose(found["w"], w * (1 - 0.01 * 0.5), rtol=4 * UNIT)


def test_adamw_tiny_gradients(ops: ModuleType, rng: Generator) -> None:
    """Gradients whose squares are denormal or 0: eps alone divides."""
    w, m, v, _ = state(rng, 67)
    check_adamw(ops, (w, 1e-22 * m, 0 * v, floats(rng, 67, scale=1e-21)), Update())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_adamw_keeps_nan(ops: ModuleType, rng: Generator, bad: float) -> None:
    for index in (0, 20, 36):
        w, m, v, dw = state(rng, 37)
        dw[index] = bad
        ops.adamw_step(*arguments(w, m, v, dw, Update()))
        assert not np.isfinite(v[index]) and np.isnan(w[index])
        assert np.isfinite(np.delete(w, index)).all()


WRONG = {
    "decay off": Update(weight_decay=0.0),
    "eps x 10": Update(eps=1e-7),
    "beta2 0.99": Update(beta2=0.99),
    "beta1 0.95": Update(beta1=0.95),
    "one step on": Update(step=4),
    "no correction": Update(step=10**7),
}


@pytest.mark.parametrize("name", WRONG)
def test_adamw_faults_show(ops: ModuleType, rng: Generator, name: str) -> None:
    """Each of these faults moves the typical weight at least a hundred bounds away."""
    n, right = 600, Update()
    w, m, v, dw = state(rng, n)
    if name == "eps x 10":  # which matters where gradients are not far above it
        m, v, dw = 1e-3 * m, 1e-6 * v, 1e-3 * dw
    given = tuple(array.astype(np.float32) for array in (w, m, v, dw))
    bound = adamw_bounds(*given, right)["w"]
    found = check_adamw(ops, given, right)["w"]
    wrong = [array.astype(np.float64) for array in given]
    reference.adamw_step(*arguments(*wrong, WRONG[name]))
    assert np.median(np.abs(found - wrong[0]) / bound) > 100


def test_adamw_ten_steps(ops: ModuleType, rng: Generator) -> None:
    """Ten updates in float32 beside ten in float64: what rounding adds up to, and no more."""
    w, _, _, _ = state(rng, 1031)
    found = [w, np.zeros_like(w), np.zeros_like(w)]
    exact = [array.astype(np.float64) for array in found]
    found = [array.copy() for array in found]
    for step in range(1, 11):
        dw = floats(rng, 1031, scale=0.01)
        update = Update(lr=1e-3, step=step)
        ops.adamw_step(*arguments(*found, dw, update))
        reference.adamw_step(*arguments(*exact, dw, update))
    # each step moves a weight by 1e-3 at most (times 1/(1-beta1)), with 30 units of relative error or so
    assert np.abs(found[0] - exact[0]).max() < UNIT * 10 * (3 * np.abs(w).max() + 1e-2 * 30)
