"""One token out of a model's logits: what is left to choose from, and the draw.

The steps and their order are those of the logits processors of transformers: repetition penalty, temperature, top-k,
top-p, min-p.  A vocabulary is large and a step of decoding short, so nothing here sorts what need not be sorted, and no
pass over all logits is in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.arena import Array
from llmc.errors import ConfigError, DivergenceError

BLOCK = 256  # weights that are summed as one before a draw looks into them
FEW = 4096  # as many are sorted, or summed one by one, faster than anything cleverer
STRIDES = 64  # scores that a maximum is taken of, to find the largest
LIKELY = 500  # tokens that top_p mostly ends among


@dataclass(frozen=True)
class Sampling:
    """How a text is continued.  ConfigError for a value out of range.

    max_new_tokens      at most so many, fewer where something ends the text
    temperature         logits are divided by it; 0: always the likeliest token
    top_k               only the k likeliest tokens, with all that are as likely as the last of them; 0: all
    top_p               of these only the fewest whose probabilities add up to this, with all that are as likely as
                        the last of them (Holtzman et al. 2020); 1: all
    min_p               of these only tokens that are at least this times as likely as the likeliest; 0: all
    repetition_penalty  logits of tokens that are in the prompt or were written, are divided by it where positive and
                        multiplied with it where negative (Keskar et al. 2019); 1: none
    seed                sequence i of a batch is drawn from a stream of its own, that of (seed, i)
    stop                strings that end the text, of which they are no part
    stop_ids            tokens that do
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, low in (("max_new_tokens", 0), ("temperature", 0), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise ConfigError(name, f"must be a number from {low} up, got {value}")
            if name != "temperature" and value != int(value):
                raise ConfigError(name, f"must be a whole number, got {value}")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError("min_p", f"must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError("repetition_penalty", f"must be a number above 0, got {self.repetition_penalty}")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(int(token) for token in self.stop_ids))
        if "" in self.stop:
            raise ConfigError("stop", "an empty string would end every text")

    def random(self, sequence: int) -> np.random.Generator:
        """The stream of a batch's sequence."""
        return np.random.Generator(np.random.PCG64([self.seed, sequence]))


def choose(logits: Array, sampling: Sampling, random: np.random.Generator, seen: Array | None = None) -> int:
    """One token drawn from logits (V,), which stay as they are.

    `seen` (V,) bool, needed with a repetition penalty, marks the tokens that were there already.  Every draw takes one
    number from `random`, which is looked up in the cumulative sum of the probabilities; with temperature 0 none.
    DivergenceError where a logit is not finite.
    """
    low, high = logits.min(), logits.max()  # either is nan where a logit is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DivergenceError("sampling: the model's logits are not finite")
    scores = logits if sampling.repetition_penalty == 1 else _penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return int(scores.argmax())
    ids, weights = remaining(scores, sampling)
    place = _draw(weights, random.random())
    return place if ids is None else int(ids[place])


def remaining(scores: Array, sampling: Sampling) -> tuple[Array | None, Array]:
    """The tokens to draw from, in their order (None: all), and their probabilities times a common factor, which makes
    the largest 1.  Those of the tokens that top_p and min_p rule out are 0."""
    ids, top = None, scores.max()
    if 0 < sampling.top_k < scores.size:
        ids = np.flatnonzero(scores >= _kth_largest(scores, sampling.top_k))
        scores = scores[ids]
    # The most that the type holds, for temperatures so small that all but the likeliest get 0.
    inverse = min(1 / sampling.temperature, float(np.finfo(scores.dtype).max))
    with np.errstate(over="ignore"):
        weights = np.exp((scores - top) * scores.dtype.type(inverse))
    if sampling.top_p < 1:
        weights *= weights >= _nucleus(weights, sampling.top_p)
    if sampling.min_p > 0:
        weights *= weights >= weights.dtype.type(sampling.min_p)
    return ids, weights


def _penalised(logits: Array, penalty: float, seen: Array | None) -> Array:
    if seen is None:
        raise ConfigError("repetition_penalty", f"{penalty} needs to know which tokens were there already")
    places = np.flatnonzero(seen)
    scores, old = logits.copy(), logits[places]
    scores[places] = np.where(old > 0, old / penalty, old * penalty)
    return scores


def _largest(scores: Array, k: int) -> Array:
    """At least the k largest of scores (n,), k <= n, in no order, and where k is small few more."""
    columns = scores.size // STRIDES
    if k > columns:
        return scores
    # Of n / STRIDES groups' maxima, which are scores, k are not below the k-th largest of the maxima.
    largest = scores[: columns * STRIDES].reshape(STRIDES, columns).max(axis=0)
    return scores[scores >= np.partition(largest, -k)[-k]]


def _kth_largest(scores: Array, k: int) -> Array:
    return np.partition(_largest(scores, k), -k)[-k]


def _nucleus(weights: Array, top_p: float) -> Array:
    """The least of the fewest weights that make up top_p of the sum."""
    wanted, above = top_p * weights.sum(dtype=np.float64), 0.0
    candidates = weights if weights.size <= FEW else _largest(weights, LIKELY)
    if candidates.sum(dtype=np.float64) < wanted:
        # One bucket for each number of 7 bits: those of float32 are in order when they are taken for integers.
        bits = weights.astype(np.float32, copy=False).view(np.int32) >> 16
        # In the types that bincount works with: what it converts itself takes eight times as long.
        sums = np.cumsum(np.bincount(bits.astype(np.intp), weights.astype(np.float64))[::-1])
        place = int(np.searchsorted(sums, min(wanted, sums[-1])))
        above = sums[place - 1] if place else 0.0
        candidates = weights[bits == sums.size - 1 - place]
    descending = np.sort(candidates)[::-1]
    place = int(np.searchsorted(above + np.cumsum(descending, dtype=np.float64), wanted))
    return descending[min(place, descending.size - 1)]


def _draw(weights: Array, uniform: float) -> int:
    """The place of `uniform`, in [0, 1), among the weights laid end to end."""
    if weights.size <= FEW:
        sums = np.cumsum(weights, dtype=np.float64)
        return _first_above(sums, uniform * sums[-1])
    # In two steps: a running sum waits for itself at every element.
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, BLOCK)), dtype=np.float64)
    wanted = uniform * sums[-1]
    block = _first_above(sums, wanted)
    before = sums[block - 1] if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _first_above(inside, wanted - before)


def _first_above(sums: Array, wanted: float) -> int:
    """The place of the first running sum above `wanted`; where rounding has left none, that of the last weight which
    is not 0."""
    place = int(np.searchsorted(sums, wanted, side="right"))
    return place if place < sums.size else int(np.searchsorted(sums, sums[-1]))
