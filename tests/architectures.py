"""The architectures beside GPT-2, each twice: a configuration of transformers and the same of this package.

Small and odd: three key-value heads under six, heads of 40 channels that do not add up to the stream's 60, a
vocabulary that is a multiple of nothing, windows and original lengths shorter than the batches.  What imports this
module is skipped where PyTorch or transformers are missing, as by judge.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import judge
import numpy as np
import torch
import transformers
from guard import Array
from torch.utils._python_dispatch import TorchDispatchMode

from llmc import gemma, llama, rotary
from llmc.adamw import AdamW
from llmc.model import Config, Model
from llmc.rotary import Scaling

V, LAYERS, HEADS, CHANNELS, LENGTH = 131, 3, 6, 60, 80
SIZES: dict[str, Any] = {"num_kv_heads": 3, "head_size": 40, "hidden": 77}
RECIPE = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
STEPS = 5
SHAPE = 2, 33  # of the batch that transformers judges
WINDOW = 7
CAPS = 5.0, 4.0  # of scores and of logits
QUERY_SCALE = 17


@dataclass(frozen=True)
class Architecture:
    theirs: Callable[[], Any]  # a transformers configuration
    ours: Config


def _theirs(kind: str, **more: Any) -> Callable[[], Any]:
    """No id is a padding one, whose embedding would get no gradient; tied unless said."""
    rope = more.pop("rope", {"rope_type": "default", "rope_theta": 10000.0})
    sizes = {
        "vocab_size": V, "hidden_size": CHANNELS, "intermediate_size": SIZES["hidden"], "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": SIZES["num_kv_heads"], "head_dim": SIZES["head_size"],
        "max_position_embeddings": LENGTH, "pad_token_id": None, "rope_parameters": rope, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return lambda: getattr(transformers, kind)(**(sizes | more))


def _ours(kind: type[Config], **more: Any) -> Config:
    return kind(LENGTH, V, LAYERS, HEADS, CHANNELS, **SIZES, eps=1e-5, **more)  # type: ignore[call-arg]


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

ARCHITECTURES = {
    "llama": Architecture(_theirs("LlamaConfig", tie_word_embeddings=False), _ours(llama.Config)),
    "llama-3": Architecture(
        _theirs(
            "LlamaConfig",
            rope={
                "rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 24, **SCALING,
            },
        ),
        _ours(llama.Config, tied=True, rope_theta=500.0, rope_scaling=Scaling(**SCALING, original_max_len=24)),
    ),
    "mistral": Architecture(
        _theirs("MistralConfig", tie_word_embeddings=False, sliding_window=WINDOW), _ours(llama.Config, window=WINDOW)
    ),
    "qwen": Architecture(_theirs("Qwen2Config"), _ours(llama.Config, tied=True, qkv_bias=True)),
    "gemma": Architecture(_theirs("GemmaConfig"), _ours(gemma.Config, query_scale=SIZES["head_size"])),
    "gemma-2": Architecture(
        _theirs(
            "Gemma2Config", query_pre_attn_scalar=QUERY_SCALE, sliding_window=WINDOW, attn_logit_softcapping=CAPS[0],
            final_logit_softcapping=CAPS[1],
        ),
        _ours(
            gemma.Config, version=2, window=WINDOW, attn_softcap=CAPS[0], final_softcap=CAPS[1],
            query_scale=QUERY_SCALE,
        ),
    ),
}  # fmt: skip


class _Double(TorchDispatchMode):
    """What is float64 stays so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64} if kwargs.get("dtype") == torch.float32 else kwargs
        return func(*args, **kwargs)


@contextmanager
def in_double(name: str, model: Any) -> Iterator[None]:
    """transformers takes norms and softmax in float32 even of a float64 model, which leaves errors of 10^-6: here it
    does not, and has the angles of `rotary.table` to the bit (test_rotary compares the two tables)."""
    c: Any = ARCHITECTURES[name].ours
    halves = np.split(rotary.table(c.rope_theta, c.head_size, LENGTH, getattr(c, "rope_scaling", None)), 2, axis=1)
    cosines, sines = (torch.from_numpy(np.concatenate([half, half], axis=1)).double() for half in halves)
    model.model.rotary_emb.forward = lambda x, position_ids: (cosines[position_ids], sines[position_ids])
    try:
        with _Double():
            yield
    finally:
        del model.model.rotary_emb.forward


@cache
def theirs(name: str, large: bool = True) -> Any:
    """The model of transformers, in float64, as new or `large` as judge.make has it; not to be changed."""
    return judge.make(ARCHITECTURES[name].theirs(), large=large)


@cache
def verdict(name: str, exact: bool = False, large: bool = True) -> judge.Verdict:
    """What transformers says of `batch()`, as it is or in double throughout."""
    model = theirs(name, large)
    with in_double(name, model) if exact else nullcontext():
        return judge.judge(model, ARCHITECTURES[name].ours, *batch())


@cache
def their_losses(name: str, exact: bool = False) -> list[float]:
    """Before each of STEPS updates on `batch()`."""
    model = judge.make(ARCHITECTURES[name].theirs())
    with in_double(name, model) if exact else nullcontext():
        return judge.losses(model, *batch(), STEPS, RECIPE)


def build(name: str, ops: Any, config: Config | None = None, large: bool = True, **options: Any) -> Model:
    """Ours, with the same weights; `config` in place of the architecture's."""
    return judge.fill((config or ARCHITECTURES[name].ours).build(ops, **options), theirs(name, large))


def batch(shape: tuple[int, int] = SHAPE, seed: int = 11) -> tuple[Array, Array]:
    ids = np.random.default_rng(seed).integers(V, size=(2, *shape), dtype=np.int32)
    return ids[0], ids[1]


def gradients(model: Model) -> dict[str, Array]:
    """Copies, without the rows that pad vocabularies."""
    assert model.grads is not None
    values = {row.name: model.ops.fetch(tensor)().copy() for row, tensor in model.grads}
    return {name: value[:V] if name in ("wte", "head") else value for name, value in values.items()}


def worst(found: dict[str, Array], exact: dict[str, Array]) -> dict[str, float]:
    """How far each gradient is off, relative to its norm."""
    assert set(found) == set(exact)
    return {name: judge.norm_ratio(value, exact[name]) for name, value in found.items()}


def furthest(found: Array, exact: Array) -> float:
    """The largest difference over the largest number."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


def backward(model: Model, x: Array, y: Array) -> dict[str, Array]:
    model.forward(x, y)
    model.backward()
    return gradients(model)


def optimizer_for(model: Model, grad_clip: float = 0.0) -> AdamW:
    assert model.grads is not None
    recipe = {name: value for name, value in RECIPE.items() if name != "lr"}
    return AdamW(
        model.params.table, model.params, model.grads, model.ops, weights=model.weights, grad_clip=grad_clip, **recipe
    )  # fmt: skip


def train(model: Model, steps: int, x: Array, y: Array, grad_clip: float = 0.0) -> list[float]:
    model.prepare(*x.shape)
    optimizer = optimizer_for(model, grad_clip)
    losses = []
    for _ in range(steps):
        losses.append(model.forward(x, y))
        model.backward()
        optimizer.step(RECIPE["lr"])
    return losses


def switched_off(ops: Any, name: str, off: dict[str, Any]) -> None:
    """With its numbers the model is what transformers says; with those of `off` in their place it clearly is not:
    logits, gradients, and decode, which has its own way to the cache."""
    x, y = batch()
    right = verdict(name)
    for changes, least, most in (({}, 0.0, 1e-5), (off, 1e-2, np.inf)):
        config = replace(ARCHITECTURES[name].ours, **changes)
        model = build(name, ops, config)
        decoded = model.decode(model.new_cache(len(x)), x, np.zeros(len(x), np.int32))
        off_by = {
            "logits": furthest(model.logits(x), right.logits),
            "decoded": furthest(decoded, right.logits[:, -1]),
            "gradients": max(
                judge.norm_ratio(value, right.gradients[row]) for row, value in backward(model, x, y).items()
            ),
        }
        assert all(least <= value < most for value in off_by.values()), (changes, off_by)


def parameters(config: Any) -> int:
    """The number of a transformers model's, which is not made."""
    with torch.device("meta"):
        return int(transformers.AutoModelForCausalLM.from_config(config).num_parameters())
