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


def reserve(channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int) -> None:
    pass


def workspace_nbytes(
    channels: int, vocab_size: int, parameters: int, tokens: int, heads: int, head_size: int
) -> dict[str, int]:
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


def _places(positions: Array, T: int) -> Array:
    """(B,T): the place of every token."""
    return positions[:, None] + np.arange(T)


def embedding_forward(
    out: Array, tokens: Array, positions: Array, wte: Array, wpe: Array | None, V: int, scale: float
) -> None:
    out[...] = scale * f64(wte[tokens])
    if wpe is not None:
        out[...] = scale * f64(wte[tokens]) + f64(wpe[_places(positions, tokens.shape[1])])


def embedding_backward(
    dwte: Array, dwpe: Array | None, dout: Array, tokens: Array, scale: float, accumulate: bool
) -> None:
    by_token = np.zeros(dwte.shape)
    np.add.at(by_token, tokens, scale * f64(dout))
    put(dwte, by_token, True)
    if dwpe is not None:
        by_position = np.zeros(dwpe.shape)
        by_position[: tokens.shape[1]] = f64(dout).sum(axis=0)
        put(dwpe, by_position, accumulate)


# ---- norms -----------------------------------------------------------------------------------------


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
    dx: Array, dw: Array | None, db: Array | None, dout: Array, x: Array, mean: Array, rstd: Array, w: Array,
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
    if dw is not None and db is not None:
        put(dw, dw_new, accumulate)
        put(db, db_new, accumulate)
    put(dx, gradient, True)


def residual_layernorm_forward(
    total: Array, out: Array, mean: Array, rstd: Array, x: Array, branch: Array, w: Array, b: Array, eps: float
) -> None:
    total[...] = f64(x) + f64(branch)
    layernorm_forward(out, mean, rstd, total, w, b, eps)


def rmsnorm_forward(out: Array, rstd: Array, x: Array, w: Array, eps: float, offset: float) -> None:
    x = f64(x)
    r = 1.0 / np.sqrt((x**2).mean(axis=-1) + eps)
    rstd[...] = r
    out[...] = x * r[..., None] * (offset + f64(w))


def rmsnorm_backward(
    dx: Array, dw: Array | None, dout: Array, x: Array, rstd: Array, w: Array, offset: float, accumulate: bool
) -> None:
    r = f64(rstd)[..., None]
    normed = f64(x) * r
    dnormed = f64(dout) * (offset + f64(w))
    gradient = r * (dnormed - normed * (dnormed * normed).mean(axis=-1, keepdims=True))
    if dw is not None:
        put(dw, (f64(dout) * normed).sum(axis=(0, 1)), accumulate)
    put(dx, gradient, True)


def residual_rmsnorm_forward(
    total: Array, out: Array, rstd: Array, x: Array, branch: Array, w: Array, eps: float, offset: float
) -> None:
    total[...] = f64(x) + f64(branch)
    rmsnorm_forward(out, rstd, total, w, eps, offset)


# ---- rotary embedding ------------------------------------------------------------------------------


def _turn(qkv: Array, cosines: Array, sines: Array, heads: int) -> None:
    """The first `heads` heads of (B,T,N) by angles (B,T,D/2)."""
    half = cosines.shape[-1]
    turned = f64(qkv[..., : heads * 2 * half]).reshape(*qkv.shape[:2], heads, 2, half)
    one, two = turned[..., 0, :], turned[..., 1, :]
    c, s = cosines[:, :, None], sines[:, :, None]
    result = np.stack([one * c - two * s, two * c + one * s], axis=-2)
    qkv[..., : heads * 2 * half] = result.reshape(*qkv.shape[:2], heads * 2 * half)


def rope_forward(qkv: Array, positions: Array, table: Array, heads: int) -> None:
    rows = f64(table)[_places(positions, qkv.shape[1])]
    _turn(qkv, *np.split(rows, 2, axis=-1), heads)


def rope_backward(dqkv: Array, table: Array, heads: int) -> None:
    rows = f64(table)[_places(np.zeros(len(dqkv), np.int64), dqkv.shape[1])]
    cosines, sines = np.split(rows, 2, axis=-1)
    _turn(dqkv, cosines, -sines, heads)


# ---- linear ----------------------------------------------------------------------------------------


def _rows(x: Array) -> Array:
    """(B,T,C) -> (B*T,C), float64."""
    return f64(x).reshape(x.shape[0] * x.shape[1], x.shape[2])


def linear_forward(out: Array, x: Array, w: Array, b: Array | None) -> None:
    product = (_rows(x) @ f64(w).T).reshape(out.shape)
    out[...] = product if b is None else product + f64(b)


def linear_backward(
    dx: Array, dw: Array | None, db: Array | None, dout: Array, x: Array, w: Array, accumulate: bool
) -> None:
    dw_new = _rows(dout).T @ _rows(x)
    db_new = _rows(dout).sum(axis=0)
    dx_new = (_rows(dout) @ f64(w)).reshape(dx.shape)
    if dw is not None:
        put(dw, dw_new, accumulate)
    if db is not None:
        put(db, db_new, accumulate)
    dx[...] = dx_new


def lora_forward(out: Array, hidden: Array, x: Array, a: Array, b: Array, scale: float, column: int) -> None:
    narrow = scale * _rows(x) @ f64(a).T
    hidden[...] = narrow.reshape(hidden.shape)
    part = out[..., column : column + len(b)]
    part[...] = f64(part) + (narrow @ f64(b).T).reshape(part.shape)


def lora_backward(
    da: Array, db: Array, dhidden: Array, dout: Array, hidden: Array, x: Array, b: Array, scale: float, column: int,
    accumulate: bool,
) -> None:
    part = f64(dout[..., column : column + len(b)]).reshape(-1, len(b))
    narrow = scale * part @ f64(b)
    put(db, part.T @ _rows(hidden), accumulate)
    put(da, narrow.T @ _rows(x), accumulate)
    dhidden[...] = narrow.reshape(dhidden.shape)


def lora_backward_input(dx: Array, dhidden: Array, a: Array) -> None:
    put(dx, (_rows(dhidden) @ f64(a)).reshape(dx.shape), True)


def linear_gelu_forward(out: Array, pre: Array, x: Array, w: Array, b: Array | None) -> None:
    exact = np.empty(out.shape)
    linear_forward(exact, x, w, b)
    pre[...] = exact
    gelu_forward(out, exact)


def gelu_linear_backward(
    dpre: Array, dw: Array | None, db: Array | None, dout: Array, pre: Array, x: Array, w: Array, accumulate: bool
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


def _gated(x: Array) -> tuple[Array, Array]:
    gate, up = np.split(f64(x), 2, axis=-1)
    return gate, up


def _gate_backward(dx: Array, dout: Array, x: Array, value: Array, slope: Array) -> None:
    _, up = _gated(x)
    dx[...] = np.concatenate([f64(dout) * up * slope, f64(dout) * value], axis=-1)


def _logistic(x: Array) -> Array:
    return np.where(x < 0, np.exp(np.minimum(x, 0)), 1.0) / (1.0 + np.exp(-np.abs(x)))


def swiglu_forward(out: Array, x: Array) -> None:
    gate, up = _gated(x)
    out[...] = gate * _logistic(gate) * up


def swiglu_backward(dx: Array, dout: Array, x: Array) -> None:
    gate, _ = _gated(x)
    s = _logistic(gate)
    _gate_backward(dx, dout, x, gate * s, s + gate * s * _logistic(-gate))


def geglu_forward(out: Array, x: Array) -> None:
    gate, up = _gated(x)
    value = np.empty(gate.shape)
    gelu_forward(value, gate)
    out[...] = value * up


def geglu_backward(dx: Array, dout: Array, x: Array) -> None:
    gate, _ = _gated(x)
    value, slope = np.empty(gate.shape), np.empty(gate.shape)
    gelu_forward(value, gate)
    gelu_backward(slope, np.ones(gate.shape), gate)
    _gate_backward(dx, dout, x, value, slope)


# ---- attention -------------------------------------------------------------------------------------


def _heads(x: Array, H: int) -> Array:
    """(B,T,H D) -> (B,H,T,D), float64."""
    B, T, C = x.shape
    return f64(x).reshape(B, T, H, C // H).transpose(0, 2, 1, 3)


def _channels(x: Array) -> Array:
    """(B,H,T,D) -> (B,T,H D), the inverse of `_heads`."""
    B, H, T, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * width)


def _shared(x: Array, H: int) -> Array:
    """(B,G,T,D) -> (B,H,T,D): every key-value head as often as query heads share it."""
    return x.repeat(H // max(x.shape[1], 1), axis=1)


def _grouped(x: Array, G: int) -> Array:
    """(B,H,T,D) -> (B,G,T,D), the gradient of `_shared`."""
    B, H, T, D = x.shape
    return x.reshape(B, G, H // G, T, D).sum(axis=2)


def _split(qkv: Array, H: int, D: int) -> tuple[Array, Array, Array, int]:
    """(B,T,(H + 2 G) D) -> queries (B,H,T,D), keys and values (B,G,T,D), G."""
    G = (qkv.shape[-1] // max(D, 1) - H) // 2
    q, k, v = np.split(qkv, [H * D, (H + G) * D], axis=-1)
    return _heads(q, H), _heads(k, G), _heads(v, G), G


def _seen(positions: Array, T: int, keys: int, window: int) -> Array:
    """(B,1,T,keys): whether the token at positions[b] + t sees a key."""
    ahead = _places(positions, T)[:, None, :, None] - np.arange(keys)
    return (ahead >= 0) & ((ahead < window) | (window <= 0))


def _capped(x: Array, softcap: float) -> Array:
    return softcap * np.tanh(x / softcap) if softcap > 0 else x


def _slope(capped: Array, softcap: float) -> Array:
    """The derivative of `_capped`, from its value."""
    return 1.0 - (capped / softcap) ** 2 if softcap > 0 else np.ones(capped.shape)


def _logsumexp(x: Array) -> Array:
    """log of the sum of exponentials along the last axis, which may be empty only if another one is."""
    if x.size == 0:
        return np.zeros(x.shape[:-1])
    largest = x.max(axis=-1)
    return largest + np.log(np.exp(x - largest[..., None]).sum(axis=-1))


def attention_forward(
    out: Array, lse: Array, qkv: Array, scale: float, window: int, softcap: float
) -> None:
    B, T, H = out.shape[0], out.shape[1], lse.shape[1]
    q, k, v, _ = _split(qkv, H, out.shape[2] // H)
    scores = _capped(scale * q @ _shared(k, H).swapaxes(-1, -2), softcap)
    scores = np.where(_seen(np.zeros(B, np.int64), T, T, window), scores, -np.inf)
    log_denominator = _logsumexp(scores)
    out[...] = _channels(np.exp(scores - log_denominator[..., None]) @ _shared(v, H))
    lse[...] = log_denominator


def attention_backward(
    dqkv: Array, dout: Array, qkv: Array, out: Array, lse: Array, scale: float, window: int, softcap: float
) -> None:
    B, T, H = out.shape[0], out.shape[1], lse.shape[1]
    q, k, v, G = _split(qkv, H, out.shape[2] // H)
    keys, values = _shared(k, H), _shared(v, H)
    scores = _capped(scale * q @ keys.swapaxes(-1, -2), softcap)
    seen = _seen(np.zeros(B, np.int64), T, T, window)
    p = np.where(seen, np.exp(np.where(seen, scores - f64(lse)[..., None], 0.0)), 0.0)
    do, o = _heads(dout, H), _heads(out, H)
    dv = p.swapaxes(-1, -2) @ do
    dp = do @ values.swapaxes(-1, -2)
    ds = p * (dp - (do * o).sum(axis=-1, keepdims=True)) * _slope(scores, softcap) * scale
    dq = ds @ keys
    dk = ds.swapaxes(-1, -2) @ q
    parts = (dq, _grouped(dk, G), _grouped(dv, G))
    dqkv[...] = np.concatenate([_channels(part) for part in parts], axis=-1)


def attention_decode(
    out: Array, keys: Array, values: Array, qkv: Array, positions: Array, H: int, scale: float, window: int,
    softcap: float,
) -> None:
    B, T, D = out.shape[0], out.shape[1], out.shape[2] // H
    G = keys.shape[2] // max(D, 1)
    q, k, v = np.split(qkv, [H * D, (H + G) * D], axis=-1)
    where = (np.arange(B)[:, None], _places(positions, T))
    keys[where], values[where] = k, v
    end = int(positions.max(initial=0)) + T
    seen = _seen(positions, T, end, window)
    past = seen.any(axis=(1, 2))[:, None, :, None]  # what lies beyond a sequence's tokens may be anything
    all_keys = _shared(np.where(past, _heads(keys[:, :end], G), 0.0), H)
    all_values = _shared(np.where(past, _heads(values[:, :end], G), 0.0), H)
    scores = _capped(scale * _heads(q, H) @ all_keys.swapaxes(-1, -2), softcap)
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - _logsumexp(scores)[..., None])
    out[...] = _channels(p @ all_values)


# ---- head ------------------------------------------------------------------------------------------


def head_loss(
    losses: Array, dx: Array | None, dw: Array | None, x: Array, w: Array, targets: Array, V: int,
    scale: float, softcap: float, accumulate: bool,
) -> None:
    rows, table = _rows(x), f64(w[:V])
    logits = _capped(rows @ table.T, softcap)
    log_denominator = _logsumexp(logits)
    tokens, chosen = np.arange(len(rows)), targets.reshape(-1)
    losses[...] = (log_denominator - logits[tokens, chosen]).reshape(losses.shape)
    if dx is None:
        return
    dlogits = np.exp(logits - log_denominator[:, None])
    dlogits[tokens, chosen] -= 1.0
    dlogits *= scale * _slope(logits, softcap)
    if dw is not None:
        dw_new = np.zeros(dw.shape)
        dw_new[:V] = dlogits.T @ rows
        put(dw, dw_new, accumulate)
    dx[...] = (dlogits @ table).reshape(dx.shape)


def head_logits(logits: Array, x: Array, w: Array, V: int, softcap: float) -> None:
    logits[...] = _capped(_rows(x) @ f64(w[:V]).T, softcap).reshape(logits.shape)


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
