"""What is Gemma's alone: soft-caps, windows on every second layer and the scale of queries do what transformers does
with them, and not nothing; presets, initial weights, impossible numbers.  What holds of every architecture is in
test_architectures.py.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import transformers
from architectures import ARCHITECTURES, CAPS, WINDOW, batch, build, parameters, switched_off

from llmc import gemma
from llmc.errors import ConfigError


@pytest.mark.parametrize(
    "off",
    [
        {"window": 0}, {"window": WINDOW + 1}, {"attn_softcap": 0.0}, {"final_softcap": 0.0}, {"query_scale": 40},
        {"rope_theta": 500.0},
    ],
    ids=lambda off: "-".join(off),
)  # fmt: skip
def test_switched_off(cpu: ModuleType, off: dict[str, Any]) -> None:
    switched_off(cpu, "gemma-2", off)


def test_windows_are_those_of_even_layers(cpu: ModuleType) -> None:
    """What changes with a token: in the first layer what has it in its window, in the second all that follows."""
    config = replace(ARCHITECTURES["gemma-2"].ours, num_layers=2)
    model = config.build(cpu)
    model.initialise(seed=1)
    model.params.qkvw[...] *= 20
    x, _ = batch((1, 40))
    other = x.copy()
    other[0, 5] = (other[0, 5] + 1) % 131
    streams = []
    for ids in (x, other):
        model.logits(ids)
        assert model.acts is not None
        streams.append(model.acts.residual.copy())
    one, two = ((streams[0][i] != streams[1][i]).any(axis=(0, 2)).nonzero()[0] for i in (1, 2))
    np.testing.assert_array_equal(one, np.arange(5, 5 + WINDOW))
    np.testing.assert_array_equal(two, np.arange(5, 40))


def test_logits_stay_below_the_cap(cpu: ModuleType) -> None:
    model = build("gemma-2", cpu)
    x, _ = batch()
    assert 0.9 * CAPS[1] < np.abs(model.logits(x)).max() <= CAPS[1]


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("gemma-2b", "GemmaConfig", (256000, 2048, 16384, 18, 8, 1)),
        ("gemma-7b", "GemmaConfig", (256000, 3072, 24576, 28, 16, 16)),
        ("gemma-2-2b", "Gemma2Config", (256000, 2304, 9216, 26, 8, 4)),
        ("gemma-2-9b", "Gemma2Config", (256000, 3584, 14336, 42, 16, 8)),
    ],
)
def test_presets_are_their_namesakes(name: str, kind: str, sizes: tuple[int, ...]) -> None:
    """The other numbers are what transformers has where a file says nothing."""
    c = gemma.PRESETS[name]
    assert (c.vocab_size, c.channels, c.hidden, c.num_layers, c.num_heads, c.num_kv_heads) == sizes
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    theirs = getattr(transformers, kind)(**dict(zip((*fields, "num_key_value_heads"), sizes, strict=True)))
    assert c.num_parameters == parameters(theirs)
    assert (c.head_size, c.eps, c.max_seq_len) == (theirs.head_dim, theirs.rms_norm_eps, theirs.max_position_embeddings)
    if c.version == 2:
        assert (c.window, c.query_scale) == (theirs.sliding_window, theirs.query_pre_attn_scalar)
        assert (c.attn_softcap, c.final_softcap) == (theirs.attn_logit_softcapping, theirs.final_logit_softcapping)


def test_published_numbers_of_parameters() -> None:
    assert gemma.PRESETS["gemma-2b"].num_parameters == 2_506_172_416
    assert gemma.PRESETS["gemma-2-2b"].num_parameters == 2_614_341_888


@pytest.mark.parametrize("name", ["gemma", "gemma-2"])
def test_initialisation(cpu: ModuleType, name: str) -> None:
    """Norm weights 0, which stands for 1, matrices with the stated spreads; `seed` decides."""
    config = replace(ARCHITECTURES[name].ours, channels=128, vocab_size=1000)
    one, again, other = (config.build(cpu) for _ in range(3))
    for model, seed in ((one, 1), (again, 1), (other, 2)):
        model.initialise(seed)
    np.testing.assert_array_equal(one.params.buffer, again.params.buffer)
    for row, tensor in one.params:
        if len(row.shape) == 1:
            assert not tensor.any(), row.name
            continue
        used = tensor[: config.vocab_size] if row.name == "wte" else tensor
        std = 0.02 / np.sqrt(2 * 3) if row.name in ("attprojw", "downw") else 0.02
        assert abs(used.mean()) < 5 * std / np.sqrt(used.size), row.name
        assert abs(used.std() / std - 1) < 5 / np.sqrt(2 * used.size), row.name
        assert (used != other.params[row.name][: len(used)]).mean() > 0.9, row.name


@pytest.mark.parametrize(
    ("name", "field", "changes"),
    [
        ("gemma", "num_heads", {"num_kv_heads": 4}), ("gemma", "head_size", {"head_size": 41}),
        ("gemma", "version", {"version": 3}), ("gemma", "window", {"window": 5}),
        ("gemma", "attn_softcap", {"attn_softcap": 50.0}), ("gemma", "final_softcap", {"final_softcap": 30.0}),
        ("gemma", "query_scale", {"query_scale": 17}), ("gemma-2", "window", {"window": -1}),
        ("gemma-2", "attn_softcap", {"attn_softcap": -1.0}), ("gemma-2", "final_softcap", {"final_softcap": np.nan}),
        ("gemma-2", "query_scale", {"query_scale": 0}), ("gemma-2", "hidden", {"hidden": 0}),
    ],
)  # fmt: skip
def test_impossible_configurations(name: str, field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        replace(ARCHITECTURES[name].ours, **changes)


def test_a_class_takes_its_own_version_alone(cpu: ModuleType) -> None:
    one, two = (ARCHITECTURES[name].ours for name in ("gemma", "gemma-2"))
    assert type(one.build(cpu)) is gemma.Gemma and type(two.build(cpu)) is gemma.Gemma2
    for kind, config in ((gemma.Gemma, two), (gemma.Gemma2, one)):
        with pytest.raises(ConfigError, match="version"):
            kind(config, cpu)
