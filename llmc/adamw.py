"""AdamW over an arena (Loshchilov & Hutter 2019): decay on the rows that ask for it, and no others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

from llmc.arena import Arena, Array, Row, spans
from llmc.ops import Ops

# What changes from step to step lies on the device, so that a recorded update can be replayed.
STATE = (Row("hyper", (2,), "float64"), Row("norm", (1,), "float64"), Row("scale", (1,), "float64"))


def moment_rows(rows: Sequence[Row]) -> list[Row]:
    """The table of m and of v for parameters of `rows`: of their type, but of float32 where that is bfloat16."""
    return [row._replace(dtype="float32") if row.dtype == "bfloat16" else row for row in rows]


class AdamW:
    """Moments for `params`, one row each, and the update.

    `rows` is the parameter table of `params` and `grads`; a row's `decay` says whether `weight_decay`
    applies to it.  `grad_clip` is the largest global norm of the gradient, 0 for no limit.  `weights`, if not None,
    is an arena over the same table that gets the parameters rounded to its type.  `loss` float64 (1,), if not None,
    must be finite, like the gradient's norm, for an update to change anything.  `seed` is that of stochastic
    rounding, which parameters of bfloat16 get.

    `t` counts the updates done, so a resumed run corrects its bias rightly; `norm` (1,) is the gradient's in the
    last of them, before clipping.
    """

    def __init__(
        self, rows: Sequence[Row], params: Arena, grads: Arena, ops: Ops, *, weights: Arena | None = None,
        loss: Array | None = None, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
        weight_decay: float = 0.0, grad_clip: float = 0.0, seed: int = 0,
    ) -> None:
        self.ops = ops
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.grad_clip, self.seed = grad_clip, seed
        self.params, self.grads = params, grads
        self.weights = None if weights is params else weights
        self.m = Arena(moment_rows(rows), ops.empty)
        self.v = Arena(moment_rows(rows), ops.empty)
        self.t = 0
        self._state = Arena(STATE, ops.empty)
        self._loss = self._state.norm if loss is None else loss
        self._spans = _merged([(start, stop, weight_decay if row.decay else 0.0) for row, start, stop in spans(rows)])
        self._replay = ops.record(partial(AdamW._update, weakref.proxy(self)))  # named in the message of a fault

    @property
    def norm(self) -> Array:
        return self._state.norm

    def step(self, lr: float) -> None:
        """One update with learning rate `lr`.  Nothing changes where the norm or the loss is not finite."""
        self.t += 1
        self._state.hyper[...] = (lr, self.t)
        self._replay()

    def _update(self) -> None:
        ops, state = self.ops, self._state
        ops.global_norm(state.norm, self.grads.flat)
        ops.clip_scale(state.scale, state.norm, self._loss, self.grad_clip)
        ops.adamw_step(
            self.params.flat, self.m.flat, self.v.flat, self.grads.flat,
            None if self.weights is None else self.weights.flat,
            state.hyper, state.scale, self._spans, self.beta1, self.beta2, self.eps, self.seed,
        )  # fmt: skip


def _merged(parts: Sequence[tuple[int, int, float]]) -> tuple[tuple[int, int, float], ...]:
    """Neighbours with the same decay as one."""
    found: list[tuple[int, int, float]] = []
    for start, stop, decay in parts:
        if found and found[-1][1] == start and found[-1][2] == decay:
            start = found.pop()[0]
        found.append((start, stop, decay))
    return tuple(found)
