"""AdamW over an arena (Loshchilov & Hutter 2019): decay on the rows that ask for it, and no others."""

from __future__ import annotations

from collections.abc import Sequence

from llmc.arena import Arena, Row
from llmc.ops import Ops


class AdamW:
    """Moments for `params`, one row each, and the update.

    `rows` is the parameter table of `params` and `grads`; a row's `decay` says whether `weight_decay`
    applies to it.  `t` counts the updates done, so a resumed run corrects its bias rightly.
    """

    def __init__(
        self, rows: Sequence[Row], params: Arena, grads: Arena, ops: Ops, *, beta1: float = 0.9,
        beta2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:
        self.ops = ops
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.m = Arena(rows, ops.empty)
        self.v = Arena(rows, ops.empty)
        self.t = 0
        self._tensors = [
            (params[row.name], self.m[row.name], self.v[row.name], grads[row.name], row.decay) for row in rows
        ]

    def step(self, lr: float, scale: float = 1.0) -> None:
        """One update with learning rate `lr`; gradients are multiplied by `scale` on the way (clipping)."""
        self.t += 1
        for w, m, v, dw, decay in self._tensors:
            self.ops.adamw_step(
                w, m, v, dw, lr, self.beta1, self.beta2, self.eps, self.weight_decay if decay else 0.0, self.t, scale
            )
