"""The learning rate over time.

Updates are numbered 0 to steps - 1.  Every schedule begins with the same linear warm-up,

    lr * (step + 1) / warmup                                  for step < warmup,

so that the first update is not wasted on a rate of zero.  After it, with low = final_fraction * lr and
r = (step - warmup) / (steps - warmup), the part of the remaining run that lies behind:

    constant    lr
    cosine      low + (lr - low) * (1 + cos(pi r)) / 2        Loshchilov & Hutter 2017
    linear      lr - (lr - low) * r
    wsd         lr                                            for step < 0.8 * steps, then
                low + (lr - low) * (1 - sqrt(s))              Haegele et al. 2024

where s runs from 0 to 1 over the last fifth.  `low` belongs to step = steps, the first one that is not
done any more; from there on it is held.
"""

from __future__ import annotations

import math

from llmc.errors import ConfigError

KINDS = ("constant", "cosine", "linear", "wsd")
WSD_STABLE = 0.8  # the part of a wsd run that comes before the decay


def check(kind: str) -> None:
    """ConfigError, listing the valid ones, unless `kind` is a schedule."""
    if kind not in KINDS:
        raise ConfigError("schedule", f"{kind!r} is unknown; choose from {', '.join(KINDS)}")


def learning_rate(
    step: int, *, kind: str, lr: float, warmup: int = 0, steps: int = 0, final_fraction: float = 0.0
) -> float:
    """The rate of update `step` (from 0) of `steps`: formulas above.  ConfigError for an unknown `kind`."""
    check(kind)
    if step < warmup:
        return lr * (step + 1) / warmup
    low = final_fraction * lr
    if kind == "constant":
        return lr
    if kind == "wsd":
        begin = int(WSD_STABLE * steps)
        return lr if step < begin else low + (lr - low) * (1.0 - math.sqrt(_part(step, begin, steps)))
    r = _part(step, warmup, steps)
    if kind == "cosine":
        return low + (lr - low) * 0.5 * (1.0 + math.cos(math.pi * r))
    return lr - (lr - low) * r


def _part(step: int, begin: int, end: int) -> float:
    """How much of [begin, end) lies before `step`: 0 at begin, 1 from end on, also when it is empty."""
    return min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0
