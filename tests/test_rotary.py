"""The angles of rotary embedding: those of transformers, and what scaling is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from judge import torch, transformers

from llmc import llama, rotary
from llmc.errors import ConfigError
from llmc.rotary import Scaling

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("theta", "head_size", "scaling"),
    [(10000.0, 64, None), (1000000.0, 40, None), (500000.0, 128, LLAMA31), (500.0, 16, {**LLAMA31, "factor": 32.0})],
)
def test_table_is_that_of_transformers(theta: float, head_size: int, scaling: dict[str, float] | None) -> None:
    """Cosines and sines at places to 131071.  The frequencies, powers in float32, may differ in their last places: an
    angle is good to 2^-22 of itself, that is a frequency's two units and its own rounding."""
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling is not None:
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling}
    config = transformers.LlamaConfig(
        hidden_size=head_size, num_attention_heads=1, head_dim=head_size, max_position_embeddings=131072,
        rope_parameters=rope,
    )  # fmt: skip
    rotation = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = None if scaling is None else Scaling(**scaling, original_max_len=8192)
    table = rotary.table(theta, head_size, 131072, ours)
    assert table.shape == (131072, head_size) and table.dtype == np.float32
    places = np.array([0, 1, 2, 77, 1023, 8191, 8192, 131071])
    cosines, sines = rotation(torch.zeros(1), torch.from_numpy(places)[None])
    right = np.concatenate([cosines[0, :, : head_size // 2], sines[0, :, : head_size // 2]], axis=1)
    angles = places[:, None] * np.tile(rotary.frequencies(theta, head_size, ours).astype(np.float64), 2)
    assert (np.abs(table[places] - right) <= 2.0**-22 * angles + 2.0**-22).all()


def test_scaling_turns_slow_angles_more_slowly() -> None:
    """Those that turn less than once in the original length by the whole factor, those that turn four times not at all,
    and none less than a faster one."""
    scaling = Scaling(**LLAMA31, original_max_len=8192)
    plain = rotary.frequencies(500000.0, 128).astype(np.float64)
    ratio = rotary.frequencies(500000.0, 128, scaling) / plain
    turns = 8192 * plain / (2 * math.pi)
    assert (turns < 1).any() and (turns > 4).any() and ((turns > 1) & (turns < 4)).any()
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8, rtol=1e-6)
    np.testing.assert_array_equal(ratio[turns > 4], 1)
    assert ((ratio > 1 / 8) & (ratio < 1))[(turns > 1) & (turns < 4)].all()
    assert (np.diff(ratio) <= 0).all()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("factor", {"factor": 0.0}), ("factor", {"factor": math.inf}), ("low_freq_factor", {"low_freq_factor": -1.0}),
        ("high_freq_factor", {"high_freq_factor": 1.0}), ("original_max_len", {"original_max_len": 0}),
    ],
)  # fmt: skip
def test_impossible_scalings(field: str, changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=field):
        Scaling(**{**LLAMA31, "original_max_len": 8192, **changes})  # type: ignore[arg-type]


def test_presets_scale_as_they_were_published() -> None:
    for name, factor in (("llama-3.1-8b", 8), ("llama-3.2-1b", 32), ("llama-3.2-3b", 32), ("llama-3-8b", None)):
        scaling = llama.PRESETS[name].rope_scaling
        assert (None if scaling is None else scaling.factor) == factor, name
        assert scaling is None or (scaling.low_freq_factor, scaling.high_freq_factor) == (1, 4)
