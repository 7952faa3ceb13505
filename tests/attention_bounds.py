"""What attention may be off by in float32: errors followed through the algorithm, scores, exponentials, weights, sums.

Since the probabilities enter relatively, an error of a score is a relative error of its weight.  Everything here is per
head of queries, in float64, keys and values as often as heads share them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import reference
from guard import FLUSHED, TINY, UNIT, Array, summed


class Told(NamedTuple):
    """What an attention is told beside its arrays: the contract's letters; None is 1 / sqrt(D)."""

    H: int
    G: int
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0

    def scalars(self, D: int) -> tuple[float, int, float]:
        """The last arguments of the ops."""
        return (1 / math.sqrt(max(1, D)) if self.scale is None else self.scale), self.window, self.softcap


def split(x: Array, H: int) -> Array:
    """(B,T,C) -> (B,H,T,C/H) in float64."""
    B, T, C = x.shape
    return x.astype(np.float64).reshape(B, T, H, C // H).transpose(0, 2, 1, 3)


def join(x: Array) -> Array:
    """The inverse of `split`."""
    B, H, T, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B, T, H * width)


def shared(x: Array, told: Told) -> Array:
    """(B,T,G D) -> (B,H,T,D): a head of keys or values for each of the queries'."""
    return split(x, told.G).repeat(told.H // told.G, axis=1)


def parts(qkv: Array, told: Told) -> tuple[Array, Array, Array]:
    """(B,T,(H + 2 G) D) -> queries, keys and values (B,H,T,D)."""
    D = qkv.shape[-1] // (told.H + 2 * told.G)
    q, k, v = np.split(qkv, [told.H * D, (told.H + told.G) * D], axis=-1)
    return split(q, told.H), shared(k, told), shared(v, told)


def gathered(dq: Array, dk: Array, dv: Array, told: Told) -> Array:
    """(B,T,(H + 2 G) D) of what belongs to each head of queries, (B,H,T,D): sums over those that share keys."""
    B, H, T, D = dk.shape
    sums = (x.reshape(B, told.G, H // told.G, T, D).sum(axis=2) for x in (dk, dv))
    return np.concatenate([join(x) for x in (dq, *sums)], axis=-1)


class Weights(NamedTuple):
    """Of each query and key: whether it is seen, the score (0 where not) and what that may be off by, the derivative of
    the soft-cap and what that may be off by, the probability; and lse."""

    seen: Array
    scores: Array
    off: Array
    slope: Array
    slope_off: Array
    p: Array
    lse: Array


def weights(q: Array, k: Array, positions: Array | int, told: Told) -> Weights:
    """A soft-cap's tanh may be off by 16 UNIT of 1, as one made of an exponential and a quotient is; by 4 of itself
    when made with more care."""
    scale, window, softcap = told.scalars(q.shape[-1])
    starts = np.broadcast_to(np.asarray(positions), q.shape[:1])
    seen = reference._seen(starts, q.shape[2], k.shape[2], window) & np.ones((1, q.shape[1], 1, 1), bool)
    scores = scale * (q @ k.swapaxes(-1, -2))
    off = UNIT * (summed(q.shape[-1]) + 3) * scale * (np.abs(q) @ np.abs(k).swapaxes(-1, -2))
    slope, slope_off = np.ones(scores.shape), np.zeros(scores.shape)
    if softcap > 0:
        t = np.tanh(scores / softcap)
        off = off + (16 + 3) * UNIT * softcap
        scores, slope, slope_off = softcap * t, 1 - t**2, 2 * np.abs(t) * off / softcap + 2 * UNIT
    scores, off = np.where(seen, scores, 0.0), np.where(seen, off, 0.0)
    largest = np.where(seen, scores, -np.inf).max(axis=-1, initial=-np.inf, keepdims=True)
    raised = np.where(seen, np.exp(np.where(seen, scores - largest, 0.0)), 0.0)
    total = raised.sum(axis=-1, keepdims=True)
    return Weights(seen, scores, off, slope, slope_off, raised / total, largest + np.log(total))


def forward_bounds(q: Array, k: Array, v: Array, positions: Array | int, told: Told) -> tuple[Array, Array]:
    """Bounds of out and lse for the online softmax (Milakov & Gimelshein 2018).

    exp(s - m) is off by the error of the score, by that of the difference (and of a product with
    1/ln 2, should it be taken as 2^x), and by 4 units of its own; every later block may rescale it, at
    4 units more, of which there are at most T/16.
    """
    w = weights(q, k, positions, told)
    T = k.shape[2]
    largest = w.scores.max(axis=-1, initial=0.0, keepdims=True)
    relative = w.off + UNIT * (3 * (np.abs(w.scores) + np.abs(largest)) + 4 + 4 * (T / 16 + 1))
    total = (w.p * relative).sum(axis=-1, keepdims=True) + UNIT * (summed(T) + 4)
    sums = UNIT * (summed(T) + 4)
    out = (w.p * (relative + sums) + FLUSHED) @ np.abs(v) + total * (w.p @ np.abs(v))
    return join(out) + TINY, (total + 4 * UNIT * (np.abs(w.lse) + np.abs(largest)))[..., 0]


class Gradients(NamedTuple):
    """Per head of queries: P and dS, given out and lse exactly, and what they may be off by."""

    p: Array
    p_off: Array
    ds: Array
    ds_off: Array
    delta: Array


def gradients(dout: Array, qkv: Array, out: Array, lse: Array, told: Told) -> Gradients:
    q, k, v = parts(qkv, told)
    scale, D = told.scalars(q.shape[-1])[0], q.shape[-1]
    w = weights(q, k, 0, told)
    denominator = lse.astype(np.float64)[..., None]
    p = np.where(w.seen, np.exp(np.where(w.seen, w.scores - denominator, 0.0)), 0.0)
    relative = w.off + UNIT * (4 * (np.abs(w.scores) + np.abs(denominator)) + 6)
    do, o = split(dout, told.H), split(out, told.H)
    dp, delta = do @ v.swapaxes(-1, -2), (do * o).sum(axis=-1, keepdims=True)
    dp_off = UNIT * (summed(D) + 1) * (np.abs(do) @ np.abs(v).swapaxes(-1, -2))
    delta_off = UNIT * (summed(D) + 1) * np.abs(do * o).sum(axis=-1, keepdims=True)
    size = np.abs(dp) + np.abs(delta)
    ds = p * (dp - delta) * w.slope * scale
    # where a row sees one key alone dp - delta is 0, and under a soft-cap the slope may be: then errors meet errors
    slope = w.slope + w.slope_off
    ds_off = (relative * w.slope + w.slope_off) * np.abs(dp - delta) + (dp_off + delta_off + 4 * UNIT * size) * slope
    ds_off = (ds_off * p + FLUSHED * size) * scale + 4 * UNIT * np.abs(ds)
    return Gradients(p, p * relative + FLUSHED, ds, ds_off, delta)


def backward_bound(dout: Array, qkv: Array, out: Array, lse: Array, told: Told) -> Array:
    """The bound of dqkv, given out and lse exactly."""
    q, k, _ = parts(qkv, told)
    g, do, T = gradients(dout, qkv, out, lse, told), split(dout, told.H), q.shape[2]
    alone, among = UNIT * (summed(T) + 2), UNIT * (summed(T * told.H // told.G) + 2)
    dq = (g.ds_off + alone * np.abs(g.ds)) @ np.abs(k)
    dk = (g.ds_off + among * np.abs(g.ds)).swapaxes(-1, -2) @ np.abs(q)
    dv = (g.p_off + among * g.p).swapaxes(-1, -2) @ np.abs(do)
    return gathered(dq, dk, dv, told) + TINY
