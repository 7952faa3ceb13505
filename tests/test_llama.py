"""What is Llama's alone: a window and scaled angles do what transformers does with them, and not nothing; presets,
initial weights, impossible numbers.  What holds of every architecture is in test_architectures.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers
from architectures import ARCHITECTURES, WINDOW, batch, build, furthest, parameters, switched_off

from llmc import llama
from llmc.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("mistral", {"window": 0}), ("mistral", {"window": WINDOW + 1}), ("llama-3", {"rope_scaling": None}),
        ("llama-3", {"rope_theta": 10000.0}), ("qwen", {"qkv_bias": False}),
    ],
)  # fmt: skip
def test_switched_off(cpu: ModuleType, name: str, off: dict[str, Any]) -> None:
    switched_off(cpu, name, off)


def test_a_window_reaches_as_far_as_it_says(cpu: ModuleType) -> None:
    """What changes with a token, in three layers: the WINDOW - 1 tokens after it three times over, and no more."""
    model = build("mistral", cpu)
    x, _ = batch((1, 40))
    other = x.copy()
    other[0, 5] = (other[0, 5] + 1) % 131
    changed = np.flatnonzero((model.logits(x)[0] != model.logits(other)[0]).any(axis=-1))
    np.testing.assert_array_equal(changed, np.arange(5, 5 + 3 * (WINDOW - 1) + 1))


def test_a_window_wider_than_the_text_is_none(cpu: ModuleType) -> None:
    x, _ = batch()
    config = ARCHITECTURES["mistral"].ours
    none, wide = (build("mistral", cpu, replace(config, window=window)) for window in (0, 33))
    assert furthest(none.logits(x), wide.logits(x)) < 1e-6


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("tinyllama-1.1b", "LlamaConfig", (32000, 2048, 5632, 22, 32, 4)),
        ("llama-2-7b", "LlamaConfig", (32000, 4096, 11008, 32, 32, 32)),
        ("llama-3-8b", "LlamaConfig", (128256, 4096, 14336, 32, 32, 8)),
        ("llama-3.1-8b", "LlamaConfig", (128256, 4096, 14336, 32, 32, 8)),
        ("llama-3.2-1b", "LlamaConfig", (128256, 2048, 8192, 16, 32, 8)),
        ("llama-3.2-3b", "LlamaConfig", (128256, 3072, 8192, 28, 24, 8)),
        ("mistral-7b", "MistralConfig", (32000, 4096, 14336, 32, 32, 8)),
        ("qwen-2.5-0.5b", "Qwen2Config", (151936, 896, 4864, 24, 14, 2)),
    ],
)
def test_presets_have_the_parameters_of_their_namesakes(name: str, kind: str, sizes: tuple[int, ...]) -> None:
    c = llama.PRESETS[name]
    assert (c.vocab_size, c.channels, c.hidden, c.num_layers, c.num_heads, c.num_kv_heads) == sizes
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = getattr(transformers, kind)(
        **dict(zip((*fields, "num_key_value_heads"), sizes, strict=True)), tie_word_embeddings=c.tied
    )
    assert c.num_parameters == parameters(theirs)


def test_published_numbers_of_parameters() -> None:
    published = {
        "tinyllama-1.1b": 1_100_048_384, "llama-2-7b": 6_738_415_616, "llama-3.2-1b": 1_235_814_400,
        "mistral-7b": 7_241_732_096, "qwen-2.5-0.5b": 494_032_768,
    }  # fmt: skip
    assert {name: llama.PRESETS[name].num_parameters for name in published} == published


def test_initialisation(cpu: ModuleType) -> None:
    """The same for one seed, other for another; norms 1, biases 0, matrices with the stated spreads."""
    config = replace(ARCHITECTURES["qwen"].ours, channels=128, vocab_size=1000, tied=False)
    one, again, other = (config.build(cpu) for _ in range(3))
    for model, seed in ((one, 1), (again, 1), (other, 2)):
        model.initialise(seed)
    np.testing.assert_array_equal(one.params.buffer, again.params.buffer)
    for row, tensor in one.params:
        if len(row.shape) == 1:
            assert (tensor == (0.0 if row.name == "qkvb" else 1.0)).all(), row.name
            continue
        used = tensor[: config.vocab_size] if row.name in ("wte", "head") else tensor
        std = 0.02 / np.sqrt(2 * 3) if row.name in ("attprojw", "downw") else 0.02
        assert abs(used.mean()) < 5 * std / np.sqrt(used.size), row.name
        assert abs(used.std() / std - 1) < 5 / np.sqrt(2 * used.size), row.name
        assert (used != other.params[row.name][: len(used)]).mean() > 0.9, row.name


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("num_heads", {"num_kv_heads": 4}), ("head_size", {"head_size": 41}), ("num_kv_heads", {"num_kv_heads": 0}),
        ("hidden", {"hidden": 0}), ("window", {"window": -1}), ("rope_theta", {"rope_theta": 0.0}),
        ("eps", {"eps": -1.0}), ("vocab_size", {"vocab_size": 0}),
    ],
)  # fmt: skip
def test_impossible_configurations(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(ARCHITECTURES["llama"].ours, **changes)
