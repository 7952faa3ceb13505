"""The reference against finite differences, and against formulas written down another way.

Every backward is compared with central differences of its forward, in float64: for a random direction u
and upstream gradient g, `sum(g * (f(x + h u) - f(x - h u))) / 2h` must equal `sum(u * dx)`, elementwise
where the arrays are small enough to move one element at a time, which here they all are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference

Array = np.ndarray[Any, Any]

STEP = 1e-5  # truncation error of a central difference ~STEP^2, rounding ~1e-16/STEP: both near 1e-10
TOLERANCE = 2e-8  # relative to the largest element of the gradient


def differences(loss: Callable[[], float], x: Array) -> Array:
    """d loss / d x by central differences, moving each element of `x` in place."""
    gradient = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        kept = x[index]
        step = STEP * max(1.0, abs(kept))
        x[index] = kept + step
        above = loss()
        x[index] = kept - step
        below = loss()
        x[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


def agree(found: Array, expected: Array) -> None:
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-3)
    worst = float(np.abs(found - expected).max(initial=0.0))
    assert worst <= TOLERANCE * scale, f"{worst:.2e} against {scale:.2e}"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240520)


SHAPES = [(1, 1, 1), (1, 1, 2), (2, 3, 5), (1, 7, 4), (3, 2, 7)]  # B, T, C


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_embedding(rng: np.random.Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    V, Vp, maxT = 4, 6, T + 2
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    wte, wpe, g = rng.normal(size=(Vp, C)), rng.normal(size=(maxT, C)), rng.normal(size=(B, T, C))

    def loss() -> float:
        out = np.empty((B, T, C))
        reference.embedding_forward(out, tokens, wte, wpe, V, 0)
        return float((out * g).sum())

    before_wte, before_wpe = rng.normal(size=wte.shape), rng.normal(size=wpe.shape)
    dwte, dwpe = before_wte.copy(), before_wpe.copy()
    reference.embedding_backward(dwte, dwpe, g, tokens, accumulate)
    agree(dwte - before_wte, differences(loss, wte))
    agree(dwpe - before_wpe if accumulate else dwpe, differences(loss, wpe))


def test_embedding_position(rng: np.random.Generator) -> None:
    wte, wpe = rng.normal(size=(3, 2)), rng.normal(size=(9, 2))
    tokens = np.array([[2, 0, 2]], np.int32)
    out = np.empty((1, 3, 2))
    reference.embedding_forward(out, tokens, wte, wpe, 3, 5)
    for t, token in enumerate([2, 0, 2]):
        np.testing.assert_array_equal(out[0, t], wte[token] + wpe[5 + t])


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C", [(1, 1, 2), (2, 3, 5), (1, 7, 4), (3, 2, 7)])
def test_layernorm(rng: np.random.Generator, B: int, T: int, C: int, accumulate: bool) -> None:
    x, g = rng.normal(0.5, 2.0, (B, T, C)), rng.normal(size=(B, T, C))
    w, b = rng.normal(1.0, 0.5, C), rng.normal(size=C)
    out, mean, rstd = np.empty((B, T, C)), np.empty((B, T)), np.empty((B, T))

    def loss() -> float:
        reference.layernorm_forward(out, mean, rstd, x, w, b, 1e-3)
        return float((out * g).sum())

    loss()
    # Once more by its plainest definition, a row at a time.
    for i in range(B):
        for t in range(T):
            row = x[i, t]
            m = sum(row) / C
            s = math.sqrt(sum((value - m) ** 2 for value in row) / C + 1e-3)
            np.testing.assert_allclose(out[i, t], (row - m) / s * w + b, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose([mean[i, t], rstd[i, t]], [m, 1 / s], rtol=1e-12)
    before = rng.normal(size=x.shape), rng.normal(size=C), rng.normal(size=C)
    dx, dw, db = (array.copy() for array in before)
    reference.layernorm_backward(dx, dw, db, g, x, mean.copy(), rstd.copy(), w, accumulate)
    agree(dx - before[0], differences(loss, x))
    agree(dw - before[1] if accumulate else dw, differences(loss, w))
    agree(db - before[2] if accumulate else db, differences(loss, b))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 4, 2, 7), (3, 1, 6, 1)])
def test_linear(
    rng: np.random.Generator, B: int, T: int, K: int, N: int, accumulate: bool, bias: bool, gelu: bool
) -> None:
    x, g = rng.normal(size=(B, T, K)), rng.normal(size=(B, T, N))
    w, b = rng.normal(size=(N, K)), rng.normal(size=N) if bias else None
    out, pre = np.empty((B, T, N)), np.empty((B, T, N))

    def loss() -> float:
        if gelu:
            reference.linear_gelu_forward(out, pre, x, w, b)
        else:
            reference.linear_forward(out, x, w, b)
        return float((out * g).sum())

    loss()
    plain = np.einsum("btk,nk->btn", x, w) + (0.0 if b is None else b)
    if gelu:
        np.testing.assert_allclose(pre, plain, rtol=1e-12, atol=1e-12)
    else:
        np.testing.assert_allclose(out, plain, rtol=1e-12, atol=1e-12)
    before_w, before_b = rng.normal(size=w.shape), rng.normal(size=N)
    dw, db = before_w.copy(), before_b.copy() if bias else None
    dout = g.copy()
    if gelu:
        reference.gelu_backward(dout, g, pre)
    dx = x.copy()  # the contract lets dx be x
    reference.linear_backward(dx, dw, db, dout, dx, w, accumulate)
    agree(dx, differences(loss, x))
    agree(dw - before_w if accumulate else dw, differences(loss, w))
    if b is not None and db is not None:
        agree(db - before_b if accumulate else db, differences(loss, b))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, K, N", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 4, 2, 7), (3, 1, 6, 1)])
def test_gelu_linear(
    rng: np.random.Generator, B: int, T: int, K: int, N: int, accumulate: bool, bias: bool
) -> None:
    """A layer that reads gelu(pre), back to pre."""
    pre, g = rng.normal(size=(B, T, K)), rng.normal(size=(B, T, N))
    w, b = rng.normal(size=(N, K)), rng.normal(size=N) if bias else None
    x, out = np.empty((B, T, K)), np.empty((B, T, N))

    def loss() -> float:
        reference.gelu_forward(x, pre)
        reference.linear_forward(out, x, w, b)
        return float((out * g).sum())

    loss()
    before_w, before_b = rng.normal(size=w.shape), rng.normal(size=N)
    dw, db = before_w.copy(), before_b.copy() if bias else None
    dpre = x.copy()  # the contract lets dpre be x
    reference.gelu_linear_backward(dpre, dw, db, g, pre, dpre, w, accumulate)
    agree(dpre, differences(loss, pre))
    agree(dw - before_w if accumulate else dw, differences(loss, w))
    if b is not None and db is not None:
        agree(db - before_b if accumulate else db, differences(loss, b))


def test_gelu_is_the_tanh_form() -> None:
    """The tanh form written another way, x * sigmoid(2 y); and visibly not the erf form."""
    x = np.linspace(-12, 12, 4801)
    out = np.empty_like(x)
    reference.gelu_forward(out, x)
    y = [math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v) for v in x]
    sigmoid = [1 / (1 + math.exp(-2 * u)) for u in y]
    np.testing.assert_allclose(out, x * sigmoid, atol=2e-15)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    assert 1e-4 < np.abs(out - erf).max() < 1e-3


def test_gelu_backward() -> None:
    x = np.concatenate([np.linspace(-7, 7, 281), [-30.0, 30.0, 0.0]])
    g = np.cos(np.arange(x.size))

    def loss() -> float:
        out = np.empty_like(x)
        reference.gelu_forward(out, x)
        return float((out * g).sum())

    dx = g.copy()
    reference.gelu_backward(dx, dx, x)
    agree(dx, differences(loss, x))


def test_residual(rng: np.random.Generator) -> None:
    x, branch = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    out = x.copy()
    reference.residual_forward(out, out, branch)
    np.testing.assert_array_equal(out, x + branch)


def naive_attention(qkv: Array, H: int) -> tuple[Array, Array]:
    """Scalar loops: for each query, the softmax over the keys up to it."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    width = C // H
    out, lse = np.zeros((B, T, C)), np.zeros((B, H, T))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                q = qkv[b, t, h * width : (h + 1) * width]
                weights = []
                for s in range(t + 1):
                    k = qkv[b, s, C + h * width : C + (h + 1) * width]
                    weights.append(math.exp(float(q @ k) / math.sqrt(width)))
                for s in range(t + 1):
                    v = qkv[b, s, 2 * C + h * width : 2 * C + (h + 1) * width]
                    out[b, t, h * width : (h + 1) * width] += weights[s] / sum(weights) * v
                lse[b, h, t] = math.log(sum(weights))
    return out, lse


ATTENTION = [(1, 1, 1, 1), (1, 1, 2, 3), (2, 5, 2, 3), (1, 8, 1, 4), (1, 7, 3, 2)]  # B, T, H, C/H


@pytest.mark.parametrize("B, T, H, width", ATTENTION)
def test_attention(rng: np.random.Generator, B: int, T: int, H: int, width: int) -> None:
    C = H * width
    qkv, g = rng.normal(size=(B, T, 3 * C)), rng.normal(size=(B, T, C))
    out, lse = np.empty((B, T, C)), np.empty((B, H, T))

    def loss() -> float:
        reference.attention_forward(out, lse, qkv)
        return float((out * g).sum())

    loss()
    plain_out, plain_lse = naive_attention(qkv, H)
    np.testing.assert_allclose(out, plain_out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, plain_lse, rtol=1e-12, atol=1e-12)
    dqkv = np.empty(qkv.shape)
    reference.attention_backward(dqkv, g, qkv, out.copy(), lse.copy())
    agree(dqkv, differences(loss, qkv))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("B, T, H, width", ATTENTION)
def test_attention_decode(rng: np.random.Generator, B: int, T: int, H: int, width: int, chunk: int) -> None:
    C, maxT = H * width, T + 3
    qkv = rng.normal(size=(B, T, 3 * C))
    expected, _ = naive_attention(qkv, H)
    keys, values = np.full((B, maxT, C), np.nan), np.full((B, maxT, C), np.nan)
    for start in range(0, T, chunk):
        part = np.ascontiguousarray(qkv[:, start : start + chunk])
        out = np.empty((B, part.shape[1], C))
        reference.attention_decode(out, keys, values, part, H, start)
        np.testing.assert_allclose(out, expected[:, start : start + chunk], rtol=1e-12, atol=1e-12)
    assert np.isnan(keys[:, T:]).all() and np.isnan(values[:, T:]).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("B, T, C, V, Vp", [(1, 1, 1, 1, 1), (2, 3, 4, 5, 8), (1, 5, 3, 7, 7)])
def test_head_loss(
    rng: np.random.Generator, B: int, T: int, C: int, V: int, Vp: int, accumulate: bool
) -> None:
    x, w = rng.normal(size=(B, T, C)), rng.normal(size=(Vp, C))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    scale, losses = 0.37, np.empty((B, T))

    def loss() -> float:
        reference.head_loss(losses, None, None, x, w, targets, V, scale, False)
        return scale * float(losses.sum())

    loss()
    logits = np.empty((B, T, V))
    reference.head_logits(logits, x, w, V)
    np.testing.assert_allclose(logits, np.einsum("btc,vc->btv", x, w[:V]), rtol=1e-12, atol=1e-12)
    for b, t in np.ndindex(B, T):
        denominator = sum(math.exp(value) for value in logits[b, t])
        expected = -math.log(math.exp(logits[b, t, targets[b, t]]) / denominator)
        assert losses[b, t] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    before = rng.normal(size=w.shape)
    dw, dx, trained = before.copy(), x.copy(), np.empty((B, T))
    reference.head_loss(trained, dx, dw, dx, w, targets, V, scale, accumulate)
    np.testing.assert_array_equal(trained, losses)
    agree(dx, differences(loss, x))
    agree(dw - before if accumulate else dw, differences(loss, w))


def test_residual_layernorm(rng: np.random.Generator) -> None:
    """What is normed is the sum as it is stored."""
    x, branch, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (2, 3, 5), (5,), (5,)))
    total, again = (np.empty((2, 3, 5), np.float32) for _ in range(2))
    outputs, expected = ([np.empty((2, 3, 5)), np.empty((2, 3)), np.empty((2, 3))] for _ in range(2))
    reference.residual_layernorm_forward(total, *outputs, x, branch, w, b, 1e-3)
    reference.residual_forward(again, x, branch)
    reference.layernorm_forward(*expected, again, w, b, 1e-3)
    for found, array in zip([total, *outputs], [again, *expected], strict=True):
        np.testing.assert_array_equal(found, array)
    for alias in (x, branch):  # total may be either
        given = [alias if array is alias else array.copy() for array in (x, branch)]
        kept = alias.copy()
        reference.residual_layernorm_forward(alias, *outputs, *given, w, b, 1e-3)
        np.testing.assert_array_equal(alias, total)
        np.testing.assert_array_equal(outputs[0], expected[0])
        alias[...] = kept


def test_copy(rng: np.random.Generator) -> None:
    x, out = rng.normal(size=(3, 5)), np.empty((3, 5), np.float32)
    reference.copy(out, x)
    np.testing.assert_array_equal(out, x.astype(np.float32))


def test_sum_losses(rng: np.random.Generator) -> None:
    losses, total = rng.normal(size=(3, 5)), np.array([2.0])
    reference.sum_losses(total, losses, 0.5, True)
    assert total[0] == pytest.approx(2.0 + 0.5 * math.fsum(losses.flat), rel=1e-14)
    reference.sum_losses(total, losses, 0.5, False)
    assert total[0] == pytest.approx(0.5 * math.fsum(losses.flat), rel=1e-14)
    reference.sum_losses(total, np.empty((0, 3)), 0.5, False)
    assert total[0] == 0.0


def test_global_norm(rng: np.random.Generator) -> None:
    x, norm = rng.normal(size=(3, 5)), np.array([np.nan])
    reference.global_norm(norm, x)
    assert norm[0] == pytest.approx(math.hypot(*x.flat), rel=1e-14)
    reference.global_norm(norm, np.zeros(0))
    assert norm[0] == 0.0


def test_clip_scale() -> None:
    def clipped(norm: float, loss: float, limit: float) -> float:
        scale = np.array([-1.0])
        reference.clip_scale(scale, np.array([norm]), np.array([loss]), limit)
        return float(scale[0])

    assert clipped(4.0, 1.0, 2.0) == 0.5
    assert clipped(2.0, 1.0, 2.0) == clipped(4.0, 1.0, 0.0) == clipped(0.0, 1.0, 2.0) == 1.0
    assert clipped(1e308, 1e308, 1e308) == 1.0, "two large numbers are finite"
    for norm, loss in ((math.inf, 1.0), (math.nan, 1.0), (4.0, math.inf), (4.0, math.nan), (math.inf, -math.inf)):
        assert math.isnan(clipped(norm, loss, 2.0))


def test_adamw(rng: np.random.Generator) -> None:
    """Five updates in plain Python, with the moments and their corrections written as the sums they are.

    The first three elements decay, the fourth is in no span.
    """
    w = rng.normal(size=7)
    m, v, expected, copy = np.zeros(7), np.zeros(7), w.copy(), np.zeros(7, np.float32)
    lr, beta1, beta2, eps, decay, scale = 0.1, 0.9, 0.95, 1e-3, 0.5, 0.25
    spans = [(0, 3, decay), (4, 7, 0.0)]
    history: list[Array] = []
    for step in range(1, 6):
        dw = rng.normal(size=7)
        history.append(scale * dw)
        hyper, factor = np.array([lr, step]), np.array([scale])
        reference.adamw_step(w, m, v, dw, copy, hyper, factor, spans, beta1, beta2, eps, 0)
        for i in (0, 1, 2, 4, 5, 6):
            ages = range(step - 1, -1, -1)
            first = sum(beta1**age * past[i] for age, past in zip(ages, history, strict=True))
            second = sum(beta2**age * past[i] ** 2 for age, past in zip(ages, history, strict=True))
            m_hat = first / sum(beta1**age for age in ages)
            v_hat = second / sum(beta2**age for age in ages)
            expected[i] -= lr * (m_hat / (math.sqrt(v_hat) + eps) + (decay if i < 3 else 0.0) * expected[i])
        np.testing.assert_allclose(w, expected, rtol=1e-12)
        np.testing.assert_array_equal(copy, np.where(np.arange(7) == 3, 0, w).astype(np.float32))
        assert m[3] == v[3] == 0
        before = [array.tobytes() for array in (w, m, v, copy)]
        for bad in (math.nan, math.inf):
            reference.adamw_step(w, m, v, dw, copy, hyper, np.array([bad]), spans, beta1, beta2, eps, 0)
        assert before == [array.tobytes() for array in (w, m, v, copy)]


def test_float32_storage(rng: np.random.Generator) -> None:
    """float32 arrays get the float64 result, rounded once."""
    x, w, b = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 3, 64), (5, 64), (5,)))
    wide, narrow = np.empty((1, 3, 5)), np.empty((1, 3, 5), np.float32)
    reference.linear_forward(wide, x, w, b)
    reference.linear_forward(narrow, x, w, b)
    np.testing.assert_array_equal(narrow, wide.astype(np.float32))


@pytest.mark.parametrize("B, T", [(0, 3), (2, 0), (0, 0)])
def test_empty_batches(B: int, T: int) -> None:
    """No tokens: activations are empty, parameter gradients zero unless they accumulate."""
    C, N = 4, 6
    x, out, stat = np.empty((B, T, C)), np.empty((B, T, C)), np.empty((B, T))
    tokens = np.empty((B, T), np.int32)
    w, b = np.ones((N, C)), np.ones(C)
    reference.embedding_forward(out, tokens, w, w, N, 0)
    reference.layernorm_forward(out, stat, stat, x, b, b, 1e-5)
    reference.attention_forward(out, np.empty((B, 2, T)), np.empty((B, T, 3 * C)))
    reference.attention_backward(np.empty((B, T, 12)), out, np.empty((B, T, 12)), out, np.empty((B, 2, T)))
    dw, db = np.ones((N, C)), np.ones(C)
    reference.head_loss(stat, x, dw, x, w, tokens, N, 1.0, True)
    assert (dw == 1).all()
    reference.head_loss(stat, x, dw, x, w, tokens, N, 1.0, False)
    assert (dw == 0).all()
    reference.layernorm_backward(x, db, db, out, x, stat, stat, b, False)
    assert (db == 0).all()
