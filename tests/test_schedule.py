"""Learning-rate schedules: their formulas, their ends, and how warm-up joins them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from llmc.errors import ConfigError
from llmc.schedule import KINDS, learning_rate


def run(kind: str, steps: int = 100, warmup: int = 10, final: float = 0.1, lr: float = 2.0) -> list[float]:
    """Every rate of a run, and the one that would follow its last."""
    return [
        learning_rate(step, kind=kind, lr=lr, warmup=warmup, steps=steps, final_fraction=final)
        for step in range(steps + 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up(kind: str) -> None:
    """lr / warmup at first, lr at its last update, never zero."""
    rates = run(kind)
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)], rel=1e-15)
    assert rates[10] == pytest.approx(2.0, rel=1e-15)  # and the schedule itself begins at lr


@pytest.mark.parametrize("kind", KINDS)
def test_no_warm_up(kind: str) -> None:
    assert run(kind, warmup=0)[0] == 2.0


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_the_end(kind: str) -> None:
    """The final fraction belongs to the first step after the run, and is held from there on."""
    rates = run(kind)
    assert rates[100] == pytest.approx(0.2, rel=1e-12)
    assert rates[99] > rates[100]
    assert learning_rate(10**6, kind=kind, lr=2.0, warmup=10, steps=100, final_fraction=0.1) == rates[100]
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_constant() -> None:
    assert run("constant")[10:] == [2.0] * 91


def test_cosine() -> None:
    """Half-way after warm-up lies half-way between lr and its end."""
    rates = run("cosine")
    assert rates[55] == pytest.approx((2.0 + 0.2) / 2, rel=1e-12)
    assert rates[40] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 3)) / 2, rel=1e-12)


def test_linear() -> None:
    rates = run("linear")
    assert rates[40] == pytest.approx(2.0 - 1.8 / 3, rel=1e-12)


def test_wsd() -> None:
    """Stable for 0.8 of all steps, warm-up included, then 1 - sqrt."""
    rates = run("wsd")
    assert rates[10:81] == [2.0] * 71
    assert rates[85] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(0.25)), rel=1e-12)
    assert rates[81] == pytest.approx(0.2 + 1.8 * (1 - math.sqrt(0.05)), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_shorter_than_their_warm_up(kind: str) -> None:
    rates = run(kind, steps=5, warmup=10)
    assert rates == pytest.approx([2.0 * (step + 1) / 10 for step in range(6)])
    assert all(math.isfinite(rate) for rate in run(kind, steps=0, warmup=0) + run(kind, steps=1, warmup=0))


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"schedule: 'cosin' is unknown; choose from constant, cosine, linear, wsd"):
        learning_rate(0, kind="cosin", lr=1.0)
