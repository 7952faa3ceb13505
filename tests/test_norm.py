"""layernorm and rmsnorm, forward and backward, and with the residual sum."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import reference
from guard import PLACES, TINY, UNIT, Array, blank, call, check, compare, floats, names, summed
from numpy.random import Generator

EPS = 1e-5

WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128, 129]
WIDTHS += [257, 385, 513, 768]
SHAPES = (
    [(2, 3, C) for C in WIDTHS]
    + [(1, T, 20) for T in (1, 31, 32, 33, 63, 64, 65, 127, 129, 257)]
    + [(5, 3, 4), (0, 3, 4), (2, 0, 4)]
)


def forward_bounds(x: Array, w: Array, b: Array, eps: float) -> dict[str, Array]:
    """Errors of the two-pass form: sum, subtract, sum of squares, root, scale.

    The mean is off by at most `dm`.  Because the exact deviations sum to zero, this moves the variance by
    no more than dm^2, beside its own relative rounding; and every deviation by dm.
    """
    x, w, b = (array.astype(np.float64) for array in (x, w, b))
    C = x.shape[-1]
    dm = UNIT * summed(C) * np.abs(x).mean(axis=-1)
    deviation = x - x.mean(axis=-1, keepdims=True)
    variance = (deviation**2).mean(axis=-1)
    dv = UNIT * (summed(C) + 4) * variance + dm**2
    rstd = 1 / np.sqrt(variance + eps)
    high = 1 / np.sqrt(np.maximum(variance - dv, 0) + eps) - rstd
    low = rstd - 1 / np.sqrt(variance + dv + eps)
    dr = np.maximum(high, low) + 4 * UNIT * rstd
    off = dm[..., None] + 2 * UNIT * np.abs(deviation)
    normed = np.abs(deviation) * rstd[..., None]
    dn = off * (rstd + dr)[..., None] + np.abs(deviation) * dr[..., None] + UNIT * normed
    return {"out": np.abs(w) * dn + 3 * UNIT * (np.abs(w) * normed + np.abs(b)), "mean": dm, "rstd": dr}


def check_forward(ops: ModuleType, x: Array, w: Array, b: Array, eps: float = EPS) -> dict[str, Array]:
    B, T, C = x.shape
    values = (blank(B, T, C), blank(B, T), blank(B, T), x, w, b, eps)
    return check(ops, "layernorm_forward", values, forward_bounds(x, w, b, eps))


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    check_forward(ops, floats(rng, B, T, C), floats(rng, C), floats(rng, C))


@pytest.mark.parametrize("C", [5, 64, 129, 768])
def test_large_mean(ops: ModuleType, rng: Generator, C: int) -> None:
    """A mean a thousand times the deviation: E[x^2] - E[x]^2 would lose every digit of the variance."""
    x = floats(rng, 2, 3, C) + np.float32(1000)
    bounds = forward_bounds(x, np.ones(C), np.zeros(C), EPS)
    assert bounds["rstd"].max() < 1e-3, "the bound itself must stay useful"
    check_forward(ops, x, floats(rng, C), floats(rng, C))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1000.1, 1e4])
@pytest.mark.parametrize("C", [1, 7, 64, 129])
def test_constant_rows(ops: ModuleType, rng: Generator, C: int, value: float) -> None:
    """No variance: rstd is 1/sqrt(eps), and what is left of x after its mean is rounding alone."""
    check_forward(ops, np.full((2, 3, C), value, np.float32), floats(rng, C), floats(rng, C))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_scales(ops: ModuleType, rng: Generator, scale: float) -> None:
    check_forward(ops, floats(rng, 2, 5, 96, scale=scale), floats(rng, 96), floats(rng, 96))


def test_eps_is_the_one_given(ops: ModuleType, rng: Generator) -> None:
    """1e-6 for 1e-5 must show: on rows whose variance is small it moves the result far beyond the bound."""
    x, w, b = floats(rng, 2, 3, 48, scale=3e-3), floats(rng, 48), floats(rng, 48)
    found = check_forward(ops, x, w, b, 1e-5)
    wrong = {name: np.zeros(array.shape) for name, array in found.items()}
    reference.layernorm_forward(wrong["out"], wrong["mean"], wrong["rstd"], x, w, b, 1e-6)
    bound = forward_bounds(x, w, b, 1e-5)
    for name in ("out", "rstd"):
        assert np.median(np.abs(found[name] - wrong[name]) / bound[name]) > 1000


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("C", [1, 8, 19, 64])
def test_nan_is_kept(ops: ModuleType, rng: Generator, C: int, bad: float) -> None:
    for index in {0, C // 2, C - 1}:
        x, out, stat = floats(rng, 1, 3, C), blank(1, 3, C), blank(1, 3)
        x[0, 1, index] = bad
        ops.layernorm_forward(out, stat, stat.copy(), x, np.ones(C, np.float32), blank(C), EPS)
        assert np.isnan(out[0, 1]).all()
        assert np.isfinite(out[0, [0, 2]]).all()


# ---- with the residual sum -------------------------------------------------------------------------


def check_residual(
    ops: ModuleType, x: Array, branch: Array, w: Array, b: Array, alias: dict[str, str] | None = None
) -> dict[str, Array]:
    """total is the sum as float32 rounds it, and the rest `layernorm_forward` of that."""
    op, stat = "residual_layernorm_forward", blank(*x.shape[:2])
    values = (blank(*x.shape), blank(*x.shape), stat, stat, x, branch, w, b, EPS)
    total = x + branch
    exact = {"out": np.empty(x.shape), "mean": np.empty(stat.shape), "rstd": np.empty(stat.shape)}
    reference.layernorm_forward(*exact.values(), total, w, b, EPS)
    bounds = forward_bounds(total, w, b, EPS)
    found: dict[str, Array] = {}
    for place in PLACES:
        found = call(ops, op, dict(zip(names(op), values, strict=True)), place, alias or {})
        assert found["total"].tobytes() == total.tobytes()
        for name, expected in exact.items():
            compare(f"{op}, flush at the {place}", name, found[name], expected, bounds[name])
    return found


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_residual_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    """total may be x, or branch."""
    x, branch, w, b = floats(rng, B, T, C), floats(rng, B, T, C, scale=0.3), floats(rng, C), floats(rng, C)
    for alias in ({}, {"total": "x"}, {"total": "branch"}):
        check_residual(ops, x, branch, w, b, alias)


@pytest.mark.parametrize("C", [5, 64, 129, 768])
def test_residual_forward_of_a_rounded_sum(ops: ModuleType, rng: Generator, C: int) -> None:
    """Branches of half a unit of x: what is normed is the sum as it is stored, not as it would be exactly.

    Rows are compared without their means: the rounding of a mean of 4096 is as large as what is looked for.
    """
    x = 4096 + np.float32(2.0**-11) * rng.integers(0, 4, (2, 3, C)).astype(np.float32)
    branch = np.where(rng.integers(0, 2, x.shape) == 1, 2.0**-12, -(2.0**-12)).astype(np.float32)
    total = x + branch
    right, wrong = np.empty(x.shape), np.empty(x.shape)
    stat, ones, zeros = np.empty((2, 3)), np.ones(C, np.float32), blank(C)
    reference.layernorm_forward(right, stat, stat.copy(), total, ones, zeros, EPS)
    reference.layernorm_forward(wrong, stat, stat.copy(), x.astype(np.float64) + branch, ones, zeros, EPS)
    found = check_residual(ops, x, branch, ones, zeros)

    def spread(error: Array) -> float:
        return float(np.abs(error - error.mean(axis=-1, keepdims=True)).max())

    assert spread(found["out"] - wrong) > 3 * spread(found["out"] - right)


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_residual_forward_is_its_two_halves(cpu: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    """To the bit, with any instruction set."""
    x, branch, w, b = floats(rng, B, T, C), floats(rng, B, T, C), floats(rng, C), floats(rng, C)
    for isa in cpu.isas():
        cpu.configure(isa=isa, threads=2)
        one, two = ([blank(B, T, C), blank(B, T, C), blank(B, T), blank(B, T)] for _ in range(2))
        cpu.residual_layernorm_forward(*one, x, branch, w, b, EPS)
        cpu.residual_forward(two[0], x, branch)
        cpu.layernorm_forward(*two[1:], two[0], w, b, EPS)
        for fused, apart in zip(one, two, strict=True):
            assert fused.tobytes() == apart.tobytes(), isa


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_residual_forward_keeps_nan(ops: ModuleType, rng: Generator, bad: float) -> None:
    for which in (0, 1):
        given, outputs = [floats(rng, 1, 3, 19), floats(rng, 1, 3, 19)], [blank(1, 3, 19), blank(1, 3, 19)]
        given[which][0, 1, 7] = bad
        ops.residual_layernorm_forward(
            *outputs, blank(1, 3), blank(1, 3), *given, np.ones(19, np.float32), blank(19), EPS
        )
        assert not np.isfinite(outputs[0][0, 1, 7]) and np.isnan(outputs[1][0, 1]).all()
        assert np.isfinite(outputs[1][0, [0, 2]]).all()


# ---- backward --------------------------------------------------------------------------------------


def backward_bounds(
    dx: Array, dw: Array, db: Array, dout: Array, x: Array, mean: Array, rstd: Array, w: Array,
    accumulate: bool,
) -> dict[str, Array]:
    """mean and rstd are given, so x - mean is one rounding; then come two means along the row."""
    dout, x, mean, rstd, w = (array.astype(np.float64) for array in (dout, x, mean, rstd, w))
    B, T, C = x.shape
    r = rstd[..., None]
    normed = np.abs(x - mean[..., None]) * r
    signed = (x - mean[..., None]) * r
    dnormed = np.abs(dout * w)
    first, second = dnormed.mean(axis=-1, keepdims=True), (dnormed * normed).mean(axis=-1, keepdims=True)
    mean1 = np.abs((dout * w).mean(axis=-1, keepdims=True))
    mean2 = np.abs((dout * w * signed).mean(axis=-1, keepdims=True))
    row = (summed(C) + 2) * first + normed * (summed(C) + 6) * second
    elsewhere = 6 * (dnormed + mean1 + normed * mean2)
    before = np.abs(dx) + r * (dnormed + mean1 + normed * mean2)
    bound_w = (np.abs(dout) * normed).sum(axis=(0, 1)) + (np.abs(dw) if accumulate else 0)
    bound_b = np.abs(dout).sum(axis=(0, 1)) + (np.abs(db) if accumulate else 0)
    return {
        "dx": UNIT * (r * (row + elsewhere) + before),
        "dw": UNIT * (summed(B * T) + 4) * bound_w + TINY,
        "db": UNIT * summed(B * T) * bound_b,
    }


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_backward(ops: ModuleType, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    x, w = floats(rng, B, T, C), floats(rng, C)
    mean, rstd = blank(B, T), blank(B, T)
    reference.layernorm_forward(np.empty(x.shape), mean, rstd, x, w, w, EPS)
    given = (floats(rng, B, T, C), floats(rng, C), floats(rng, C), floats(rng, B, T, C), x, mean, rstd, w)
    check(ops, "layernorm_backward", (*given, accumulate), backward_bounds(*given, accumulate))
    bounds = backward_bounds(*given, accumulate)
    without = (given[0], None, None, *given[3:], accumulate)
    check(ops, "layernorm_backward", without, {"dx": bounds["dx"]})


def test_backward_uses_what_was_saved(ops: ModuleType, rng: Generator) -> None:
    """mean and rstd are taken as given, whatever x says."""
    C = 33
    x, w, mean = floats(rng, 2, 3, C), floats(rng, C), floats(rng, 2, 3)
    outputs = floats(rng, 2, 3, C), floats(rng, C), floats(rng, C)
    given = (*outputs, floats(rng, 2, 3, C), x, mean, 1 + mean**2, w)
    check(ops, "layernorm_backward", (*given, True), backward_bounds(*given, True))


# ---- rmsnorm ---------------------------------------------------------------------------------------

OFFSETS = [0.0, 1.0]


def rms_bounds(x: Array, w: Array, eps: float, offset: float) -> dict[str, Array]:
    """Errors of a sum of squares and a root; then of offset + w and two products."""
    x, factor = x.astype(np.float64), np.abs(offset + w.astype(np.float64))
    C = x.shape[-1]
    square = (x**2).mean(axis=-1)
    rstd = 1 / np.sqrt(square + eps)
    dr = rstd * UNIT * ((summed(C) + 2) / 2 * square / (square + eps) + 4)
    size = np.abs(x) * factor
    return {"out": size * dr[..., None] + 3 * UNIT * size * (rstd + dr)[..., None] + TINY, "rstd": dr}


def check_rms(
    ops: ModuleType, x: Array, w: Array, eps: float = EPS, offset: float = 0.0
) -> dict[str, Array]:
    values = (blank(*x.shape), blank(*x.shape[:2]), x, w, eps, offset)
    return check(ops, "rmsnorm_forward", values, rms_bounds(x, w, eps, offset))


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_rms_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    for offset in OFFSETS:
        check_rms(ops, floats(rng, B, T, C), floats(rng, C), EPS, offset)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e-6, 1e-3, 1e3, 1e6, 1e15])
def test_rms_scales(ops: ModuleType, rng: Generator, scale: float) -> None:
    check_rms(ops, floats(rng, 2, 5, 97, scale=scale), floats(rng, 97))


@pytest.mark.parametrize("scale", [1e-30, 1e25, 1e37])
def test_rms_beyond_float32(each_isa: ModuleType, rng: Generator, scale: float) -> None:
    """On a CPU squares neither overflow nor vanish."""
    check_rms(each_isa, floats(rng, 1, 3, 97, scale=scale), floats(rng, 97), 1e-38 if scale < 1 else EPS)


def test_rms_of_gemma(ops: ModuleType, rng: Generator) -> None:
    """1 + w, not w; and eps within the root, and the one that is given."""
    x, w = floats(rng, 2, 3, 48, scale=3e-3), floats(rng, 48, scale=0.1)
    found = check_rms(ops, x, w, 1e-5, 1.0)
    bound = rms_bounds(x, w, 1e-5, 1.0)
    for eps, offset in ((1e-5, 0.0), (1e-6, 1.0)):
        wrong = {name: np.zeros(array.shape) for name, array in found.items()}
        reference.rmsnorm_forward(wrong["out"], wrong["rstd"], x, w, eps, offset)
        assert np.median(np.abs(found["out"] - wrong["out"]) / bound["out"]) > 1000


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("C", [1, 8, 19, 64])
def test_rms_keeps_nan(ops: ModuleType, rng: Generator, C: int, bad: float) -> None:
    """Infinity is one over infinity times itself: no number either."""
    for index in {0, C // 2, C - 1}:
        x, out = floats(rng, 1, 3, C), blank(1, 3, C)
        x[0, 1, index] = bad
        ops.rmsnorm_forward(out, blank(1, 3), x, np.ones(C, np.float32), EPS, 0.0)
        assert np.isnan(out[0, 1, index]) and (np.isnan(bad) <= np.isnan(out[0, 1]).all())
        assert np.isfinite(out[0, [0, 2]]).all()


@pytest.mark.parametrize("B, T, C", SHAPES)
def test_rms_residual_forward(ops: ModuleType, rng: Generator, B: int, T: int, C: int) -> None:
    """total, which may be x or branch, is the sum as float32 rounds it; what is normed is that."""
    x, branch, w = floats(rng, B, T, C), floats(rng, B, T, C, scale=0.3), floats(rng, C)
    op, total = "residual_rmsnorm_forward", x + branch
    exact = {"out": np.empty(x.shape), "rstd": np.empty((B, T))}
    reference.rmsnorm_forward(exact["out"], exact["rstd"], total, w, EPS, 1.0)
    bounds = rms_bounds(total, w, EPS, 1.0)
    values = (blank(B, T, C), blank(B, T, C), blank(B, T), x, branch, w, EPS, 1.0)
    for alias in ({}, {"total": "x"}, {"total": "branch"}):
        for place in PLACES:
            found = call(ops, op, dict(zip(names(op), values, strict=True)), place, alias)
            assert found["total"].tobytes() == total.tobytes()
            for name, expected in exact.items():
                compare(f"{op}, flush at the {place}", name, found[name], expected, bounds[name])


def rms_backward_bounds(
    dx: Array, dw: Array, dout: Array, x: Array, rstd: Array, w: Array, offset: float, accumulate: bool
) -> dict[str, Array]:
    """n = x rstd is off by a unit, g = dout (offset + w) by two, their product by four; then the mean of the row."""
    dout, x, rstd, w = (array.astype(np.float64) for array in (dout, x, rstd, w))
    B, T, C = x.shape
    r = rstd[..., None]
    normed, g = x * r, dout * (offset + w)
    high = np.abs(g * normed).mean(axis=-1, keepdims=True)
    mean = np.abs((g * normed).mean(axis=-1, keepdims=True))
    row = np.abs(normed) * ((summed(C) + 5) * high + 3 * mean) + 4 * np.abs(g)
    before = np.abs(dx) + r * (np.abs(g) + np.abs(normed) * mean)
    bound_w = (np.abs(dout) * np.abs(normed)).sum(axis=(0, 1)) + (np.abs(dw) if accumulate else 0)
    return {"dx": UNIT * (r * row + 2 * before) + TINY, "dw": UNIT * (summed(B * T) + 3) * bound_w + TINY}


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_rms_backward(ops: ModuleType, rng: Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    x, w, rstd = floats(rng, B, T, C), floats(rng, C), blank(B, T)
    reference.rmsnorm_forward(np.empty(x.shape), rstd, x, w, EPS, 0.0)
    given = (floats(rng, B, T, C), floats(rng, C), floats(rng, B, T, C), x, rstd, w)
    for offset in OFFSETS:
        bounds = rms_backward_bounds(*given, offset, accumulate)
        check(ops, "rmsnorm_backward", (*given, offset, accumulate), bounds)
        without = (given[0], None, *given[2:], offset, accumulate)
        check(ops, "rmsnorm_backward", without, {"dx": bounds["dx"]})


def test_rms_backward_uses_what_was_saved(ops: ModuleType, rng: Generator) -> None:
    """rstd is taken as given, whatever x says."""
    outputs = floats(rng, 2, 3, 33), floats(rng, 33)
    given = (*outputs, floats(rng, 2, 3, 33), floats(rng, 2, 3, 33), 1 + floats(rng, 2, 3) ** 2, floats(rng, 33))
    check(ops, "rmsnorm_backward", (*given, 1.0, True), rms_backward_bounds(*given, 1.0, True))
