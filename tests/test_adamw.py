"""AdamW over an arena: which rows decay, counted steps, clipping; and that the usual mistakes would show."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from llmc.adamw import AdamW
from llmc.arena import Arena, Array, Row

ROWS = [
    Row("matrix", (33, 17), decay=True),
    Row("vector", (45,)),
    Row("stacked_matrix", (5, 7), layers=3, decay=True),
    Row("stacked_vector", (11,), layers=3),
]
LR, STEPS = 1e-2, 5
RIGHT = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.5}


def updates(seed: int = 3) -> list[dict[str, Array]]:
    """A gradient for each row and step; some are of the size of eps, where eps matters."""
    random = np.random.default_rng(seed)
    return [
        {
            row.name: (random.standard_normal(row.full_shape) * 10.0 ** random.integers(-7, 1, row.full_shape)).astype(
                np.float32
            )
            for row in ROWS
        }
        for _ in range(STEPS)
    ]


def start() -> dict[str, Array]:
    random = np.random.default_rng(5)
    return {row.name: random.standard_normal(row.full_shape).astype(np.float32) for row in ROWS}


def norm_of(step: dict[str, Array]) -> float:
    return float(np.sqrt(sum(np.square(g.astype(np.float64)).sum() for g in step.values())))


def expected(
    beta1: float, beta2: float, eps: float, weight_decay: float, decay_on: str = "2d", grad_clip: float = 0.0
) -> dict[str, Array]:
    """The update of Loshchilov & Hutter (2019) in float64, written out."""
    out = {}
    for row in ROWS:
        w = start()[row.name].astype(np.float64)
        m, v = np.zeros_like(w), np.zeros_like(w)
        decay = weight_decay if decay_on == "all" or (decay_on == "2d" and len(row.shape) == 2) else 0.0
        for t, step in enumerate(updates(), start=1):
            scale = min(1.0, grad_clip / norm_of(step)) if grad_clip else 1.0
            g = scale * step[row.name].astype(np.float64)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g * g
            w -= LR * (m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps) + decay * w)
        out[row.name] = w
    return out


def actual(ops: ModuleType, grad_clip: float = 0.0) -> dict[str, Array]:
    params, grads = Arena(ROWS, ops.empty), Arena(ROWS, ops.empty)
    for name, value in start().items():
        params[name][...] = value
    optimizer = AdamW(ROWS, params, grads, ops, grad_clip=grad_clip, **RIGHT)
    for step in updates():
        for name, value in step.items():
            grads[name][...] = value
        optimizer.step(LR)
        assert float(np.asarray(optimizer.norm)[0]) == pytest.approx(norm_of(step), rel=1e-6)
    assert optimizer.t == STEPS
    return {row.name: np.asarray(tensor) for row, tensor in params}


def distance(a: dict[str, Array], b: dict[str, Array]) -> float:
    return max(float(np.abs(a[row.name] - b[row.name]).max()) for row in ROWS)


# |w| < 4.5; each step rounds w once (2^-24 relative) and computes its change, at most about LR, to a few ulp.
TOLERANCE = STEPS * (4.5 * 2.0**-24 + 8 * LR * 2.0**-24)


def test_against_float64(each_isa: ModuleType) -> None:
    assert distance(actual(each_isa), expected(**RIGHT)) < TOLERANCE


@pytest.mark.parametrize(("grad_clip", "clips"), [(0.01, True), (1e9, False)])
def test_clipping(each_isa: ModuleType, grad_clip: float, clips: bool) -> None:
    found = actual(each_isa, grad_clip)
    assert distance(found, expected(**RIGHT, grad_clip=grad_clip)) < TOLERANCE
    assert (distance(found, expected(**RIGHT)) > 100 * TOLERANCE) == clips


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["norm", "loss"])
def test_nothing_is_applied_that_is_not_finite(each_isa: ModuleType, where: str, bad: float) -> None:
    params, grads, loss = Arena(ROWS, each_isa.empty), Arena(ROWS, each_isa.empty), each_isa.empty((1,), "float64")
    for name, value in start().items():
        params[name][...] = value
    optimizer = AdamW(ROWS, params, grads, each_isa, loss=loss, grad_clip=1.0, **RIGHT)
    for name, value in updates()[0].items():
        grads[name][...] = value
    target = loss if where == "loss" else grads.vector
    target[:1] = bad
    optimizer.step(LR)
    for name, value in start().items():
        np.testing.assert_array_equal(params[name], value)
    target[:1] = 1.0
    optimizer.step(LR)
    assert distance({row.name: np.asarray(tensor) for row, tensor in params}, start()) > LR / 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_decay": 0.0},
        {"decay_on": "all"},
        {"decay_on": "none"},
        {"eps": 10 * RIGHT["eps"]},
        {"beta2": 0.99},
        {"beta1": 0.95},
    ],
    ids=str,
)
def test_mistakes_would_show(cpu: ModuleType, wrong: dict[str, float]) -> None:
    assert distance(actual(cpu), expected(**{**RIGHT, **wrong})) > 100 * TOLERANCE


def test_against_pytorch(cpu: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    leaves = {name: torch.tensor(value.astype(np.float64), requires_grad=True) for name, value in start().items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaves[row.name] for row in ROWS if row.decay], "weight_decay": RIGHT["weight_decay"]},
            {"params": [leaves[row.name] for row in ROWS if not row.decay], "weight_decay": 0.0},
        ],
        lr=LR,
        betas=(RIGHT["beta1"], RIGHT["beta2"]),
        eps=RIGHT["eps"],
    )
    for step in updates():
        for name, value in step.items():
            leaves[name].grad = torch.tensor(value.astype(np.float64))
        optimizer.step()
    assert distance(actual(cpu), {name: leaf.detach().numpy() for name, leaf in leaves.items()}) < TOLERANCE
