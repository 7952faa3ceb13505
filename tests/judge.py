"""Small random models made by transformers, and what PyTorch says of them: the judge of this package's.

Weights travel by the names in `parameter_rows`, so that a wrong name or order shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from guard import Array

from llmc.arena import PADDED, Row
from llmc.model import Config, Model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def names(row: Row) -> list[list[str]]:
    """For each layer the names under which a file holds the row, one after another along its first axis."""
    parts = [(row.hf_name, 0)] if isinstance(row.hf_name, str) else row.hf_name
    return [[name.format(layer=layer) for name, _ in parts] for layer in range(max(1, row.layers))]


def make(config: Any, seed: int = 0, large: bool = True) -> Any:
    """A random model of a transformers configuration, in float64, with eager attention.

    With `large` every parameter is drawn anew: norm weights and biases far from 1 and 0, some channels outlying,
    scores and logits large enough for soft-caps and scales to matter.
    """
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    if large:
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.dim() == 1:
                    tensor.add_(0.3 * torch.randn_like(tensor))
                else:
                    tensor.copy_(torch.randn_like(tensor) * (1.5 / tensor.shape[-1] ** 0.5))
                tensor.copy_(tensor.float().double())  # what float32 holds
            model.get_input_embeddings().weight[:, :2] *= 4
    return model


def fill(model: Model, theirs: Any) -> Model:
    """The weights of `theirs`, a transformers model, in ours."""
    state = theirs.state_dict()
    V = model.config.vocab_size
    for row, tensor in model.params:
        for layer, parts in enumerate(names(row)):
            value = np.concatenate([state[name].double().numpy() for name in parts])
            value = value.T if row.transpose else value
            target = tensor[layer] if row.layers else tensor
            target[: len(value) if row.name in PADDED else None] = value
            assert row.name not in PADDED or len(value) == V
    model.refresh()
    return model


@dataclass
class Verdict:
    """Logits (B,T,V), the mean loss, and the gradients by the names of our rows."""

    logits: Array
    loss: float
    gradients: dict[str, Array]


def judge(theirs: Any, config: Config, x: Array, y: Array) -> Verdict:
    """What `theirs` computes for tokens x and targets y."""
    theirs.zero_grad()
    logits = theirs(torch.from_numpy(x).long(), use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())
    loss.backward()
    grads = dict(theirs.named_parameters())
    found = {}
    for row in config.parameter_rows():
        layers = []
        for parts in names(row):
            value = np.concatenate([grads[name].grad.numpy() for name in parts])
            layers.append(value.T if row.transpose else value)
        found[row.name] = np.stack(layers) if row.layers else layers[0]
    return Verdict(logits.detach().numpy(), float(loss.detach()), found)


def losses(theirs: Any, x: Array, y: Array, steps: int, recipe: dict[str, float]) -> list[float]:
    """The loss before each of `steps` AdamW updates on one batch, weight decay on matrices alone."""
    parameters = list(theirs.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe["lr"], betas=(recipe["beta1"], recipe["beta2"]), eps=recipe["eps"]
    )
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        logits = theirs(torch.from_numpy(x).long(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).long().flatten())
        loss.backward()
        seen.append(float(loss.detach()))
        optimizer.step()
    return seen


def norm_ratio(a: Array, b: Array) -> float:
    """Norm of the difference over the norm."""
    return float(np.linalg.norm((a.astype(np.float64) - b).ravel()) / np.linalg.norm(b.ravel()))
