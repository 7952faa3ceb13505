"""The angles of rotary embedding, for `Ops.rope_forward`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmc.arena import Array
from llmc.errors import ConfigError


@dataclass(frozen=True)
class Scaling:
    """How Llama 3.1 and later stretch the slow angles, so that more positions fit in (`rope_type` "llama3").

    Angles whose wavelength, in tokens, is beyond original_max_len / low_freq_factor turn `factor` times as slowly,
    those within original_max_len / high_freq_factor as ever, and between the two the frequency is interpolated.
    ConfigError where these numbers make no sense.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "original_max_len"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ConfigError(name, f"must be a number above 0, got {getattr(self, name)}")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                "high_freq_factor", f"{self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )


def frequencies(theta: float, head_size: int, scaling: Scaling | None = None) -> Array:
    """Radians per token of each of D/2 angles, float32: theta^(-2i/D) (Su et al. 2021), scaled.

    In float32 like the angles themselves, since that is what published models were trained with.
    """
    exponents = np.arange(0, head_size, 2).astype(np.float32) / np.float32(head_size)
    f: Array = np.float32(1.0) / np.power(np.float32(theta), exponents)
    if scaling is None:
        return f
    wavelength = 2.0 * math.pi / f
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_len / wavelength - low) / (high - low), 0.0, 1.0)
    scaled = (1.0 - smooth) * f / scaling.factor + smooth * f
    return scaled.astype(np.float32)


def table(theta: float, head_size: int, length: int, scaling: Scaling | None = None) -> Array:
    """(length, D) float32: for each position the cosines of D/2 angles, then their sines."""
    positions = np.arange(length, dtype=np.float32)
    angles = (positions[:, None] * frequencies(theta, head_size, scaling)).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
