"""Every op of the contract in NumPy: the definition that all kernels are held to.

The functions have the names and the arguments of `llmc.ops.Ops` and follow its docstrings.  Whatever
dtype comes in, the arithmetic is float64; results are written into the given arrays, float32 or float64,
in place.  So this module is itself a backend: a model built over it, with arenas whose rows are float64,
runs in float64 from end to end.

Nothing here is clever: each function is the textbook formula over whole arrays, attention with its T x T
matrix, the head with all its logits.  Arguments are not checked.  Every result is computed before any
output is written, so the contract's aliasing rules hold without further thought.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def f64(x: Array) -> Array:
    """`x` in float64 (a copy unless it is that already: never written to)."""
    return np.asarray(x, dtype=np.float64)


def put(out: Array, value: Array, accumulate: bool) -> None:
    """Overwrite `out`, or add to it; the sum too is taken in float64."""
    out[...] = f64(out) + value if accumulate else value


# ---- memory ----------------------------------------------------------------------------------------


def info() -> dict[str, Any]:
    return {"device": "numpy", "dtype": "fp32", "storage": "float32", "ahead": 0, "isa": "numpy", "threads": 1}


def empty(shape: tuple[int, ...], dtype: str) -> Array:
    return np.zeros(shape, dtype)


def zero(x: Array) -> None:
    x[...] = 0


def copy(out: Array, x: Array) -> None:
    out[...] = x


def reserve(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int) -> None:
    pass


def workspace_nbytes(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int) -> dict[str, int]:
    return {"shared": 0, "threads": 0}


def memory() -> None:
    return None


# ---- in which order, and when ----------------------------------------------------------------------


def record(function: Callable[[], None]) -> Callable[[], None]:
    return function


def fetch(x: Array) -> Callable[[], Array]:
    return lambda: x


def stamp() -> float:
    return time.perf_counter()


def elapsed(begin: float, end: float) -> float:
    return end - begin


# ---- random numbers --------------------------------------------------------------------------------


def philox(counter: Sequence[Array], key: tuple[int, int]) -> list[Array]:
    """Philox4x32-10 (Salmon et al. 2011): four words, as uint64 arrays, of the counter's four and the key's two."""
    c = [np.asarray(word, np.uint64) for word in counter]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for number in range(10):
        k0, k1 = ((key[i] + number * (0x9E3779B9, 0xBB67AE85)[i]) % 2**32 for i in (0, 1))
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (second >> half) ^ c[1] ^ np.uint64(k0), second & low,
            (first >> half) ^ c[3] ^ np.uint64(k1), first & low,
        ]  # fmt: skip
    return c


def normal_inputs(n: int, seed: int, stream: int) -> tuple[Array, Array, Array]:
    """u and x of `normal`'s first n elements, and whether each takes the cosine."""
    i = np.arange(n, dtype=np.uint64)
    place, word, block = i % 16, i // 16 % 4, i // 64
    b = 16 * block + place
    ones = np.ones_like(b)
    halves = [(value % 2**32, value // 2**32) for value in (seed, stream)]
    w = philox((b % 2**32, b // 2**32, ones * halves[1][0], ones * halves[1][1]), halves[0])
    w0, w1 = np.where(word < 2, w[0], w[2]), np.where(word < 2, w[1], w[3])
    u = np.maximum(w0.astype(np.float32), 0.5).astype(np.float64) / 2.0**32
    x = (w1 // 256).astype(np.float64) / 2.0**23 - 1
    return u, x, word % 2 == 0


def normal(out: Array, seed: int, stream: int, std: float) -> None:
    u, x, cosine = normal_inputs(out.size, seed, stream)
    r = np.sqrt(-2 * np.log(u))
    # Reduced while exact: pi x in float64 would miss the zeros at the multiples of pi/2.
    sine = np.sin(np.pi * np.where(np.abs(x) <= 0.5, x, np.sign(x) - x))
    out[...] = (std * r * np.where(cosine, np.sin(np.pi * (0.5 - np.abs(x))), sine)).reshape(out.shape)


# ---- embedding -------------------------------------------------------------------------------------


def embedding_forward(out: Array, tokens: Array, wte: Array, wpe: Array, V: int, position: int) -> None:
    T = tokens.shape[1]
    out[...] = f64(wte[tokens]) + f64(wpe[position : position + T])


def embedding_backward(dwte: Array, dwpe: Array, dout: Array, tokens: Array, accumulate: bool) -> None:
    T = tokens.shape[1]
    by_token = np.zeros(dwte.shape)
    np.add.at(by_token, tokens, f64(dout))
    by_position = np.zeros(dwpe.shape)
    by_position[:T] = f64(dout).sum(axis=0)
    put(dwte, by_token, True)
    put(dwpe, by_position, accumulate)


# ---- layernorm -------------------------------------------------------------------------------------


def layernorm_forward(
    out: Array, mean: Array, rstd: Array, x: Array, w: Array, b: Array, eps: float
) -> None:
    x = f64(x)
    mu = x.mean(axis=-1)
    variance = ((x - mu[..., None]) ** 2).mean(axis=-1)
    r = 1.0 / np.sqrt(variance + eps)
    mean[...] = mu
    rstd[...] = r
    out[...] = (x - mu[..., None]) * r[..., None] * f64(w) + f64(b)


def layernorm_backward(
    dx: Array, dw: Array, db: Array, dout: Array, x: Array, mean: Array, rstd: Array, w: Array,
    accumulate: bool,
) -> None:
    r = f64(rstd)[..., None]
    normed = (f64(x) - f64(mean)[..., None]) * r
    dnormed = f64(dout) * f64(w)
    gradient = r * (
        dnormed
        - dnormed.mean(axis=-1, keepdims=True)
        - normed * (dnormed * normed).mean(axis=-1, keepdims=True)
    )
    dw_new = (f64(dout) * normed).sum(axis=(0, 1))
    db_new = f64(dout).sum(axis=(0, 1))
    put(dw, dw_new, accumulate)
    put(db, db_new, accumulate)
    put(dx, gradient, True)


def residual_layernorm_forward(
    total: Array, out: Array, mean: Array, rstd: Array, x: Array, branch: Array, w: Array, b: Array, eps: float
) -> None:
    total[...] = f64(x) + f64(branch)
    layernorm_forward(out, mean, rstd, total, w, b, eps)


# ---- linear ----------------------------------------------------------------------------------------


def _rows(x: Array) -> Array:
    """(B,T,C) -> (B*T,C), float64."""
    return f64(x).reshape(x.shape[0] * x.shape[1], x.shape[2])


def linear_forward(out: Array, x: Array, w: Array, b: Array | None) -> None:
    product = (_rows(x) @ f64(w).T).reshape(out.shape)
    out[...] = product if b is None else product + f64(b)


def linear_backward(
    dx: Array, dw: Array, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool
) -> None:
    dw_new = _rows(dout).T @ _rows(x)
    db_new = _rows(dout).sum(axis=0)
    dx_new = (_rows(dout) @ f64(w)).reshape(dx.shape)
    put(dw, dw_new, accumulate)
    if db is not None:
        put(db, db_new, accumulate)
    dx[...] = dx_new


def linear_gelu_forward(out: Array, pre: Array, x: Array, w: Array, b: Array | None) -> None:
    exact = np.empty(out.shape)
    linear_forward(exact, x, w, b)
    pre[...] = exact
    gelu_forward(out, exact)


def gelu_linear_backward(
    dpre: Array, dw: Array, db: Array | None, dout: Array, pre: Array, x: Array, w: Array, accumulate: bool
) -> None:
    dx = np.empty(dpre.shape)
    linear_backward(dx, dw, db, dout, x, w, accumulate)
    gelu_backward(dpre, dx, pre)


# ---- activation, residual --------------------------------------------------------------------------


def gelu_forward(out: Array, x: Array) -> None:
    x = f64(x)
    out[...] = 0.5 * x * (1.0 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def gelu_backward(dx: Array, dout: Array, x: Array) -> None:
    x = f64(x)
    t = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3))
    slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x**2)
    dx[...] = f64(dout) * slope


def residual_forward(out: Array, x: Array, branch: Array) -> None:
    out[...] = f64(x) + f64(branch)


# ---- attention -------------------------------------------------------------------------------------


def _heads(x: Array, H: int) -> Array:
    """(B,T,C) -> (B,H,T,C/H), float64."""
    B, T, C = x.shape
    return f64(x).reshape(B, T, H, C // H).transpose(0, 2, 1, 3)


def _channels(x: Array) -> Array:
    """(B,H,T,C/H) -> (B,T,C), the inverse of `_heads`."""
    B, H, T, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * width)


def _scores(q: Array, k: Array, position: int) -> Array:
    """Scaled scores of queries at `position`, `position` + 1, ... with keys from 0 on; the future is -inf."""
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(max(q.shape[-1], 1))
    future = np.arange(k.shape[2])[None, :] > position + np.arange(q.shape[2])[:, None]
    return np.where(future, -np.inf, scores)


def _logsumexp(x: Array) -> Array:
    """log of the sum of exponentials along the last axis, which may be empty only if another one is."""
    if x.size == 0:
        return np.zeros(x.shape[:-1])
    largest = x.max(axis=-1)
    return largest + np.log(np.exp(x - largest[..., None]).sum(axis=-1))


def attention_forward(out: Array, lse: Array, qkv: Array) -> None:
    H = lse.shape[1]
    q, k, v = (_heads(part, H) for part in np.split(qkv, 3, axis=-1))
    scores = _scores(q, k, 0)
    log_denominator = _logsumexp(scores)
    out[...] = _channels(np.exp(scores - log_denominator[..., None]) @ v)
    lse[...] = log_denominator


def attention_backward(dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array) -> None:
    H = lse.shape[1]
    q, k, v = (_heads(part, H) for part in np.split(qkv, 3, axis=-1))
    p = np.exp(_scores(q, k, 0) - f64(lse)[..., None])
    do, o = _heads(dout, H), _heads(out, H)
    dv = p.swapaxes(-1, -2) @ do
    dp = do @ v.swapaxes(-1, -2)
    ds = p * (dp - (do * o).sum(axis=-1, keepdims=True)) / math.sqrt(max(q.shape[-1], 1))
    dq = ds @ k
    dk = ds.swapaxes(-1, -2) @ q
    dqkv[...] = np.concatenate([_channels(dq), _channels(dk), _channels(dv)], axis=-1)


def attention_decode(out: Array, keys: Array, values: Array, qkv: Array, H: int, position: int) -> None:
    q, k, v = np.split(qkv, 3, axis=-1)
    end = position + qkv.shape[1]
    keys[:, position:end] = k
    values[:, position:end] = v
    scores = _scores(_heads(q, H), _heads(keys[:, :end], H), position)
    p = np.exp(scores - _logsumexp(scores)[..., None])
    out[...] = _channels(p @ _heads(values[:, :end], H))


# ---- head ------------------------------------------------------------------------------------------


def head_loss(
    losses: Array, dx: Array | None, dw: Array | None, x: Array, w: Array, targets: Array, V: int,
    scale: float, accumulate: bool,
) -> None:
    rows, table = _rows(x), f64(w[:V])
    logits = rows @ table.T
    log_denominator = _logsumexp(logits)
    tokens, chosen = np.arange(len(rows)), targets.reshape(-1)
    losses[...] = (log_denominator - logits[tokens, chosen]).reshape(losses.shape)
    if dx is None or dw is None:
        return
    dlogits = np.exp(logits - log_denominator[:, None])
    dlogits[tokens, chosen] -= 1.0
    dlogits *= scale
    dw_new = np.zeros(dw.shape)
    dw_new[:V] = dlogits.T @ rows
    put(dw, dw_new, accumulate)
    dx[...] = (dlogits @ table).reshape(dx.shape)


def head_logits(logits: Array, x: Array, w: Array, V: int) -> None:
    logits[...] = (_rows(x) @ f64(w[:V]).T).reshape(logits.shape)


def sum_losses(total: Array, losses: Array, scale: float, accumulate: bool) -> None:
    put(total, np.array([scale * f64(losses).sum()]), accumulate)


# ---- optimizer -------------------------------------------------------------------------------------


def global_norm(norm: Array, x: Array) -> None:
    norm[0] = math.sqrt(float(np.sum(f64(x) ** 2)))


def clip_scale(scale: Array, norm: Array, loss: Array, limit: float) -> None:
    if not (np.isfinite(norm[0]) and np.isfinite(loss[0])):
        scale[0] = np.nan
    else:
        scale[0] = limit / norm[0] if 0 < limit < norm[0] else 1.0


def adamw_step(
    w: Array, m: Array, v: Array, dw: Array, copy: Array | None, hyper: Array, scale: Array,
    spans: Sequence[tuple[int, int, float]], beta1: float, beta2: float, eps: float, seed: int,
) -> None:
    """Without stochastic rounding: w is written as its type rounds, to nearest."""
    if not np.isfinite(scale[0]):
        return
    lr, t = hyper
    for start, stop, weight_decay in spans:
        part = slice(start, stop)
        g = scale[0] * f64(dw[part])
        m_new = beta1 * f64(m[part]) + (1.0 - beta1) * g
        v_new = beta2 * f64(v[part]) + (1.0 - beta2) * g**2
        m_hat = m_new / (1.0 - beta1**t)
        v_hat = v_new / (1.0 - beta2**t)
        w[part] = f64(w[part]) - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * f64(w[part]))
        m[part], v[part] = m_new, v_new
        if copy is not None:
            copy[part] = w[part]
