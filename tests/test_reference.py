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
    V, Vp, maxT, scale, start = 4, 6, T + 2, 1.7, np.zeros(B, np.int32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    wte, wpe, g = rng.normal(size=(Vp, C)), rng.normal(size=(maxT, C)), rng.normal(size=(B, T, C))

    def loss() -> float:
        out = np.empty((B, T, C))
        reference.embedding_forward(out, tokens, start, wte, wpe, V, scale)
        return float((out * g).sum())

    before_wte, before_wpe = rng.normal(size=wte.shape), rng.normal(size=wpe.shape)
    dwte, dwpe = before_wte.copy(), before_wpe.copy()
    reference.embedding_backward(dwte, dwpe, g, tokens, scale, accumulate)
    agree(dwte - before_wte, differences(loss, wte))
    agree(dwpe - before_wpe if accumulate else dwpe, differences(loss, wpe))
    alone = before_wte.copy()
    reference.embedding_backward(alone, None, g, tokens, scale, accumulate)
    np.testing.assert_array_equal(alone, dwte)


def test_embedding_positions(rng: np.random.Generator) -> None:
    wte, wpe = rng.normal(size=(3, 2)), rng.normal(size=(9, 2))
    tokens, positions = np.array([[2, 0, 2], [1, 1, 0]], np.int32), np.array([5, 1], np.int32)
    out = np.empty((2, 3, 2))
    reference.embedding_forward(out, tokens, positions, wte, wpe, 3, 0.5)
    for b, t in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[b, t], 0.5 * wte[tokens[b, t]] + wpe[positions[b] + t])
    reference.embedding_forward(out, tokens, positions, wte, None, 3, 0.5)
    np.testing.assert_array_equal(out, 0.5 * wte[tokens])


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
    alone = before[0].copy()
    reference.layernorm_backward(alone, None, None, g, x, mean.copy(), rstd.copy(), w, accumulate)
    np.testing.assert_array_equal(alone, dx)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("B, T, C", SHAPES)
def test_rmsnorm(rng: np.random.Generator, B: int, T: int, C: int, offset: float, accumulate: bool) -> None:
    x, g, w = rng.normal(0.5, 2.0, (B, T, C)), rng.normal(size=(B, T, C)), rng.normal(1.0, 0.5, C)
    out, rstd = np.empty((B, T, C)), np.empty((B, T))

    def loss() -> float:
        reference.rmsnorm_forward(out, rstd, x, w, 1e-3, offset)
        return float((out * g).sum())

    loss()
    for i, t in np.ndindex(B, T):  # by its plainest definition
        s = math.sqrt(sum(value**2 for value in x[i, t]) / C + 1e-3)
        expected = [value / s * (offset + factor) for value, factor in zip(x[i, t], w, strict=True)]
        np.testing.assert_allclose(out[i, t], expected, rtol=1e-12)
        assert rstd[i, t] == pytest.approx(1 / s, rel=1e-12)
    before = rng.normal(size=x.shape), rng.normal(size=C)
    dx, dw = (array.copy() for array in before)
    reference.rmsnorm_backward(dx, dw, g, x, rstd.copy(), w, offset, accumulate)
    agree(dx - before[0], differences(loss, x))
    agree(dw - before[1] if accumulate else dw, differences(loss, w))
    alone = before[0].copy()
    reference.rmsnorm_backward(alone, None, g, x, rstd.copy(), w, offset, accumulate)
    np.testing.assert_array_equal(alone, dx)


@pytest.mark.parametrize("heads, D, beside", [(1, 2, 0), (2, 6, 3), (0, 4, 5), (3, 4, 0)])
def test_rope(rng: np.random.Generator, heads: int, D: int, beside: int) -> None:
    """Complex numbers, a half each, times e^(i angle)."""
    B, T, maxT = 2, 3, 9
    x, g = (rng.normal(size=(B, T, heads * D + beside)) for _ in range(2))
    turn = rng.normal(size=(maxT, D // 2))
    table, positions = np.concatenate([np.cos(turn), np.sin(turn)], axis=-1), np.array([5, 0], np.int32)
    out = x.copy()
    reference.rope_forward(out, positions, table, heads)
    expected = x.copy()
    for b, t, h in np.ndindex(B, T, heads):
        head = x[b, t, h * D : (h + 1) * D]
        turned = (head[: D // 2] + 1j * head[D // 2 :]) * np.exp(1j * turn[positions[b] + t])
        expected[b, t, h * D : (h + 1) * D] = np.concatenate([turned.real, turned.imag])
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)

    def loss() -> float:
        value = x.copy()
        reference.rope_forward(value, np.zeros(B, np.int32), table, heads)
        return float((value * g).sum())

    dx = g.copy()
    reference.rope_backward(dx, table, heads)
    agree(dx, differences(loss, x))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    "B, T, K, N, r, n, column", [(1, 1, 1, 1, 1, 1, 0), (2, 3, 5, 9, 2, 4, 3), (1, 4, 2, 5, 3, 5, 0)]
)
def test_lora(
    rng: np.random.Generator, B: int, T: int, K: int, N: int, r: int, n: int, column: int, accumulate: bool
) -> None:
    """A layer's output with an adapter beside some of its columns; its gradients, and that of x."""
    x, g, base = rng.normal(size=(B, T, K)), rng.normal(size=(B, T, N)), rng.normal(size=(B, T, N))
    a, b, scale = rng.normal(size=(r, K)), rng.normal(size=(n, r)), 0.7
    hidden, out = np.empty((B, T, r)), np.empty((B, T, N))

    def loss() -> float:
        out[...] = base
        reference.lora_forward(out, hidden, x, a, b, scale, column)
        return float((out * g).sum())

    loss()
    plain = base.copy()
    plain[..., column : column + n] += np.einsum("btk,nk->btn", x, scale * b @ a)
    np.testing.assert_allclose(out, plain, rtol=1e-12, atol=1e-12)
    before = rng.normal(size=a.shape), rng.normal(size=b.shape), rng.normal(size=x.shape)
    da, db, dx = (array.copy() for array in before)
    dhidden = np.empty(hidden.shape)
    reference.lora_backward(da, db, dhidden, g, hidden.copy(), x, b, scale, column, accumulate)
    reference.lora_backward_input(dx, dhidden, a)
    agree(da - before[0] if accumulate else da, differences(loss, a))
    agree(db - before[1] if accumulate else db, differences(loss, b))
    agree(dx - before[2], differences(loss, x))


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
    alone = x.copy()
    reference.linear_backward(alone, None, None, dout, alone, w, accumulate)
    np.testing.assert_array_equal(alone, dx)


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


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gates(rng: np.random.Generator, op: str) -> None:
    gate = np.concatenate([np.linspace(-7, 7, 57), [-30.0, 30.0, 0.0]])
    x, g = np.concatenate([gate, rng.normal(size=gate.size)])[None, None], rng.normal(size=(1, 1, gate.size))
    out = np.empty(g.shape)

    def loss() -> float:
        getattr(reference, f"{op}_forward")(out, x)
        return float((out * g).sum())

    loss()
    value = np.empty(gate.shape)
    reference.gelu_forward(value, gate)
    if op == "swiglu":
        value = np.array([v / (1 + math.exp(-v)) for v in gate])
    np.testing.assert_allclose(out[0, 0], value * x[0, 0, gate.size :], rtol=1e-12, atol=1e-15)
    dx = x.copy()  # the contract lets dx be x
    getattr(reference, f"{op}_backward")(dx, g, dx)
    agree(dx, differences(loss, x))


def test_residual(rng: np.random.Generator) -> None:
    x, branch = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 4))
    out = x.copy()
    reference.residual_forward(out, out, branch)
    np.testing.assert_array_equal(out, x + branch)


Attention = tuple[int, int, int, int, int, float, int, float]

# B, T, H, G, D, scale, window, softcap
ATTENTION: list[Attention] = [
    (1, 1, 1, 1, 1, 1.0, 0, 0.0), (1, 1, 2, 2, 3, 0.5, 0, 0.0), (2, 5, 2, 2, 3, 0.58, 0, 0.0),
    (1, 8, 1, 1, 4, 0.5, 0, 0.0), (2, 6, 4, 2, 3, 0.3, 0, 0.0), (1, 7, 3, 1, 2, 0.7, 0, 0.0),
    (1, 7, 2, 1, 3, 0.5, 1, 0.0), (2, 6, 2, 2, 2, 0.5, 3, 0.0), (1, 5, 1, 1, 2, 0.5, 9, 0.0),
    (1, 6, 2, 2, 3, 1.0, 0, 0.8), (2, 7, 6, 2, 3, 0.4, 4, 1.5),
]  # fmt: skip


def naive_attention(qkv: Array, case: Attention) -> tuple[Array, Array]:
    """Scalar loops: for each query, the softmax over the keys that it sees."""
    B, _, H, G, D, scale, window, softcap = case
    T = qkv.shape[1]
    out, lse = np.zeros((B, T, H * D)), np.zeros((B, H, T))
    for b, h, t in np.ndindex(B, H, T):
        g = h // (H // G)  # neighbours share
        weights, values = [], []
        for s in range(max(0, t - window + 1) if window else 0, t + 1):
            key = qkv[b, s, (H + g) * D : (H + g + 1) * D]
            score = scale * float(qkv[b, t, h * D : (h + 1) * D] @ key)
            weights.append(math.exp(softcap * math.tanh(score / softcap) if softcap else score))
            values.append(qkv[b, s, (H + G + g) * D : (H + G + g + 1) * D])
        for weight, value in zip(weights, values, strict=True):
            out[b, t, h * D : (h + 1) * D] += weight / sum(weights) * value
        lse[b, h, t] = math.log(sum(weights))
    return out, lse


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(rng: np.random.Generator, case: Attention) -> None:
    B, T, H, G, D, scale, window, softcap = case
    qkv, g = rng.normal(size=(B, T, (H + 2 * G) * D)), rng.normal(size=(B, T, H * D))
    out, lse = np.empty((B, T, H * D)), np.empty((B, H, T))

    def loss() -> float:
        reference.attention_forward(out, lse, qkv, scale, window, softcap)
        return float((out * g).sum())

    loss()
    plain_out, plain_lse = naive_attention(qkv, case)
    np.testing.assert_allclose(out, plain_out, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse, plain_lse, rtol=1e-12, atol=1e-12)
    dqkv = np.empty(qkv.shape)
    reference.attention_backward(dqkv, g, qkv, out.copy(), lse.copy(), scale, window, softcap)
    agree(dqkv, differences(loss, qkv))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_decode(rng: np.random.Generator, case: Attention, chunk: int) -> None:
    """As if all had come at once; the sequences of a batch are at places of their own."""
    B, T, H, G, D, scale, window, softcap = case
    maxT = T + 3
    qkv = rng.normal(size=(B, T, (H + 2 * G) * D))
    expected, _ = naive_attention(qkv, case)
    keys, values = np.full((B, maxT, G * D), np.nan), np.full((B, maxT, G * D), np.nan)
    done = np.arange(B, dtype=np.int32) % T  # the second is one token ahead
    for b in range(B):
        keys[b, : done[b]] = qkv[b, : done[b], H * D : (H + G) * D]
        values[b, : done[b]] = qkv[b, : done[b], (H + G) * D :]
    while done.max() < T:
        n = min(chunk, T - int(done.max()))
        part = np.stack([qkv[b, done[b] : done[b] + n] for b in range(B)])
        out = np.empty((B, n, H * D))
        reference.attention_decode(out, keys, values, part, done, H, scale, window, softcap)
        for b in range(B):
            np.testing.assert_allclose(out[b], expected[b, done[b] : done[b] + n], rtol=1e-12, atol=1e-12)
        done += n
    for b in range(B):
        assert np.isnan(keys[b, done[b] :]).all() and np.isnan(values[b, done[b] :]).all()


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 1.3])
@pytest.mark.parametrize("B, T, C, V, Vp", [(1, 1, 1, 1, 1), (2, 3, 4, 5, 8), (1, 5, 3, 7, 7)])
def test_head_loss(
    rng: np.random.Generator, B: int, T: int, C: int, V: int, Vp: int, softcap: float, accumulate: bool
) -> None:
    x, w = rng.normal(size=(B, T, C)), rng.normal(size=(Vp, C))
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    scale, losses = 0.37, np.empty((B, T))

    def loss() -> float:
        reference.head_loss(losses, None, None, x, w, targets, V, scale, softcap, False)
        return scale * float(losses.sum())

    loss()
    logits = np.empty((B, T, V))
    reference.head_logits(logits, x, w, V, softcap)
    plain = np.einsum("btc,vc->btv", x, w[:V])
    if softcap:
        plain = np.array([softcap * math.tanh(value / softcap) for value in plain.flat]).reshape(plain.shape)
    np.testing.assert_allclose(logits, plain, rtol=1e-12, atol=1e-12)
    for b, t in np.ndindex(B, T):
        denominator = sum(math.exp(value) for value in logits[b, t])
        expected = -math.log(math.exp(logits[b, t, targets[b, t]]) / denominator)
        assert losses[b, t] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    before = rng.normal(size=w.shape)
    dw, dx, trained = before.copy(), x.copy(), np.empty((B, T))
    reference.head_loss(trained, dx, dw, dx, w, targets, V, scale, softcap, accumulate)
    np.testing.assert_array_equal(trained, losses)
    agree(dx, differences(loss, x))
    agree(dw - before if accumulate else dw, differences(loss, w))
    alone = x.copy()
    reference.head_loss(trained, alone, None, alone, w, targets, V, scale, softcap, accumulate)
    np.testing.assert_array_equal(alone, dx)


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


def test_residual_rmsnorm(rng: np.random.Generator) -> None:
    x, branch, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 5), (2, 3, 5), (5,)))
    total, rstd = np.empty((2, 3, 5), np.float32), np.empty((2, 3))
    out, expected = np.empty((2, 3, 5)), np.empty((2, 3, 5))
    reference.residual_rmsnorm_forward(total, out, rstd, x, branch, w, 1e-3, 1.0)
    np.testing.assert_array_equal(total, (x.astype(np.float64) + branch).astype(np.float32))
    reference.rmsnorm_forward(expected, np.empty((2, 3)), total, w, 1e-3, 1.0)
    np.testing.assert_array_equal(out, expected)
    reference.residual_rmsnorm_forward(x, out, rstd, x, branch, w, 1e-3, 1.0)  # total may be x
    np.testing.assert_array_equal(x, total)


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
    reference.embedding_forward(out, tokens, np.zeros(B, np.int32), w, w, N, 1.0)
    reference.layernorm_forward(out, stat, stat, x, b, b, 1e-5)
    lse, qkv = np.empty((B, 2, T)), np.empty((B, T, 2 * C))  # two query heads, one of keys and values
    reference.attention_forward(out, lse, qkv, 1.0, 0, 0.0)
    reference.attention_backward(qkv.copy(), out, qkv, out, lse, 1.0, 0, 0.0)
    dw, db = np.ones((N, C)), np.ones(C)
    reference.head_loss(stat, x, dw, x, w, tokens, N, 1.0, 0.0, True)
    assert (dw == 1).all()
    reference.head_loss(stat, x, dw, x, w, tokens, N, 1.0, 0.0, False)
    assert (dw == 0).all()
    reference.layernorm_backward(x, db, db, out, x, stat, stat, b, False)
    assert (db == 0).all()
