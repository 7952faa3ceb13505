"""How well a model predicts held-out text."""

from __future__ import annotations

import math
from typing import Protocol

from llmc.arena import Array
from llmc.errors import ConfigError
from llmc.model import Model


class Batches(Protocol):
    """What `data.Shards` and `stories.Stories` share: an endless supply of (tokens, targets)."""

    def next(self) -> tuple[Array, Array]:
        """Tokens and targets, int32 (B, T), C-contiguous."""

    def reset(self) -> None:
        """Back to the first batch."""


def mean_loss(model: Model, data: Batches, batches: int) -> float:
    """Mean loss in nats per token over the first `batches` batches of `data`, which is reset before.

    Every batch has the same shape, so the mean of the batches' means is the mean over all tokens.
    ConfigError if `batches` is less than 1.
    """
    if batches < 1:
        raise ConfigError("val_batches", f"must be at least 1, got {batches}")
    data.reset()
    return math.fsum(model.loss(*data.next()) for _ in range(batches)) / batches


def perplexity(model: Model, data: Batches, batches: int) -> float:
    """exp of `mean_loss`: the number of equally likely tokens that would be as hard to guess."""
    loss = mean_loss(model, data, batches)
    try:
        return math.exp(loss)
    except OverflowError:  # a loss over 709 nats
        return math.inf
