"""GPT-2 in PyTorch: the judge of llmc's own, and the maker of what `verify` compares with.

Written from the paper (Radford et al. 2019) with PyTorch's own operations, so that it shares nothing with
the kernels but the parameters' names and shapes.  The only module of llmc that imports torch, and only
when something is computed: `perturb` needs NumPy alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc import checkpoint, files, loading
from llmc.arena import PADDED, Array, Row
from llmc.data import Shards
from llmc.errors import ConfigError, MissingDependencyError
from llmc.files import PathLike
from llmc.gpt2 import LAYERNORM_EPS, Config
from llmc.ops import Ops
from llmc.verify import DECAY_ON, Recipe, decaying, write_recipe

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "float64")

OUTLIERS = 3  # channels, as in trained GPT-2
OUTLIER = 12.0  # their values after the last layer; the others' are about 1
LARGEST_LOGIT = 100.0
# Standard deviations of the biases.
BIASES = {"ln1b": 0.1, "qkvb": 0.3, "attprojb": 0.1, "ln2b": 0.1, "fcb": 1.0, "fcprojb": 0.1, "lnfb": 0.1}


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError("the PyTorch reference needs torch: pip install torch") from error
    return torch


# ---- the model -------------------------------------------------------------------------------------


def parameters(
    tensors: Iterable[tuple[Row, Array]], config: Config, dtype: str = "float32"
) -> dict[str, Tensor]:
    """Leaf tensors of `dtype` by row name, copied from an arena; wte without its padding."""
    torch = _torch()
    if dtype not in DTYPES:
        raise ConfigError("dtype", f"{dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    made = {}
    for row, array in tensors:
        values = array[: config.vocab_size] if row.name in PADDED else array
        made[row.name] = torch.tensor(values, dtype=getattr(torch, dtype)).requires_grad_()
    return made


def forward(p: Mapping[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    """Logits (B,T,V) for tokens (B,T) int64.

    Blocks with the norm in front, x + attention(norm(x)) and x + mlp(norm(x)); GELU in its tanh form; a
    last norm; the head is wte.
    """
    import torch
    from torch.nn import functional

    B, T = tokens.shape
    C, H = config.channels, config.num_heads

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return functional.layer_norm(x, (C,), w, b, LAYERNORM_EPS)

    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    x = p["wte"][tokens] + p["wpe"][:T]
    for i in range(config.num_layers):
        qkv = functional.linear(norm(x, p["ln1w"][i], p["ln1b"][i]), p["qkvw"][i], p["qkvb"][i])
        q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in qkv.split(C, dim=2))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(C // H)
        attention = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        mixed = attention.transpose(1, 2).reshape(B, T, C)
        x = x + functional.linear(mixed, p["attprojw"][i], p["attprojb"][i])
        hidden = functional.linear(norm(x, p["ln2w"][i], p["ln2b"][i]), p["fcw"][i], p["fcb"][i])
        hidden = functional.gelu(hidden, approximate="tanh")
        x = x + functional.linear(hidden, p["fcprojw"][i], p["fcprojb"][i])
    return functional.linear(norm(x, p["lnfw"], p["lnfb"]), p["wte"])


@dataclass(frozen=True)
class Result:
    """What the reference made of one batch: logits (B,T,V), the loss before each update, and the gradients
    before the first, by row name (wte without its padding), in the dtype of the calculation."""

    logits: Array
    losses: tuple[float, ...]
    gradients: dict[str, Array]


def overfit(
    tensors: Iterable[tuple[Row, Array]], config: Config, x: Array, y: Array, *, steps: int = 10,
    lr: float = 1e-4, weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    decay_on: str = "2d", dtype: str = "float32", on_step: Callable[[int, float], None] | None = None,
) -> Result:
    """Train on one batch x, y (B,T) for `steps` updates of torch's AdamW, starting from an arena's values.

    The arena is not changed.  `decay_on` is "2d" (the rows that ask for decay) or "all".  `on_step` is
    called with each step's number and loss.
    """
    torch = _torch()
    if decay_on not in DECAY_ON:
        raise ConfigError("decay_on", f"{decay_on!r} is unknown; choose from {', '.join(DECAY_ON)}")
    if steps < 1:
        raise ConfigError("steps", f"must be at least 1, got {steps}")
    pairs = list(tensors)
    p = parameters(pairs, config, dtype)
    rows = decaying(tuple(row for row, _ in pairs), decay_on)
    groups = [
        {"params": [p[row.name] for row in rows if row.decay], "weight_decay": weight_decay},
        {"params": [p[row.name] for row in rows if not row.decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    tokens, targets = (torch.from_numpy(np.asarray(ids, np.int64)) for ids in (x, y))
    losses: list[float] = []
    kept: Array | None = None
    gradients: dict[str, Array] = {}
    for step in range(steps):
        logits = forward(p, config, tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if kept is None:
            kept = logits.detach().numpy()
            for tensor_name, tensor in p.items():
                if tensor.grad is not None:
                    gradients[tensor_name] = tensor.grad.numpy().copy()
        del logits, loss
        if on_step is not None:
            on_step(step, losses[-1])
        if step + 1 < steps:  # nothing looks at the weights after the last loss
            optimizer.step()
    if kept is None:
        raise RuntimeError("no step was taken")
    return Result(kept, tuple(losses), gradients)


# ---- a harder model --------------------------------------------------------------------------------


def perturb(params: Iterable[tuple[Row, Array]], seed: int = 0) -> None:
    """Make a randomly initialised model a hard judge, in place, in the ways in which trained models are hard.

    A fresh GPT-2 forgives: its biases are 0, its norms do nothing, its logits are small.  Here every bias
    becomes non-zero (those before GELU carry it into the bend where its forms differ), norm weights spread
    around 1, attention prefers some tokens to others.  A few channels of the residual stream carry values
    far above the rest, and more in every layer.  The last norm passes them on to the head: logits have a
    negative offset in common, so that padding would stand out, and those of one token in a hundred lie
    near -100.  Padded rows of wte stay 0.  `params` is an arena (or pairs of rows and arrays); `seed`
    alone decides the values.
    """
    tensors = {row.name: array for row, array in params}
    random = np.random.Generator(np.random.Philox(key=seed))
    C, L = tensors["ln1w"].shape[::-1]
    outliers = random.choice(C, size=min(OUTLIERS, max(1, C // 16)), replace=False)
    for name, tensor in tensors.items():
        if name in ("ln1w", "ln2w", "lnfw"):
            tensor *= 1.0 + 0.2 * random.standard_normal(tensor.shape)
        elif name in BIASES:
            tensor += BIASES[name] * random.standard_normal(tensor.shape)
    tensors["qkvw"][:, : 2 * C] *= 3.0
    wte = tensors["wte"]
    used = np.flatnonzero(wte.any(axis=1))
    rare = random.choice(used, size=max(1, used.size // 100), replace=False)
    wte[np.ix_(used, outliers)] -= 0.05
    wte[np.ix_(rare, outliers)] = -0.5
    for name in ("attprojb", "fcprojb"):
        tensors[name][:, outliers] += OUTLIER / (2 * L)
    tensors["lnfw"] *= 5.0
    # The last norm gives rows of length sqrt(C), nearly all of it in the outliers, in equal parts.
    tensors["lnfw"][outliers] = LARGEST_LOGIT / (0.5 * math.sqrt(C * outliers.size))


# ---- the command -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """The files that `run` left."""

    model: Path
    debug_state: Path
    recipe: Path
    losses: tuple[float, ...]


def run(
    init: PathLike, out_dir: PathLike, *, B: int = 4, T: int = 64, steps: int = 10, lr: float = 1e-4,
    weight_decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
    decay_on: str = "2d", dtype: str = "float32", seed: int = 0,
    tokens: PathLike | Sequence[PathLike] | None = None, perturbed: bool = False, version: int = 3,
    name: str | None = None, ops: Ops | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Written:
    """Overfit one batch with PyTorch and write what `llmc verify` needs, as llm.c's script does.

    `init` is any source of `loading.load` (random weights come from `seed`); `perturbed` makes it harder
    (`perturb`).  The batch is the first B*T+1 tokens of the token file `tokens`, else random ones from
    `seed`.  Written to `out_dir`, created if need be: NAME.bin (`version` 3, or 1: vocabulary not padded),
    NAME_debug_state.bin (logits, loss and gradients before the first update) and NAME_debug_state.json
    (the losses before each of `steps` updates, with the recipe).  NAME is made from `init` by default.

    With dtype "float64" the model file's fp32 weights are the truth that the calculation starts from.
    """
    if version not in (1, 3):
        raise ConfigError("version", f"{version}: a reference is written as model version 1 or 3 (fp32)")
    for field, value in (("batch size", B), ("sequence length", T)):
        if value < 1:
            raise ConfigError(field, f"must be at least 1, got {value}")
    _torch()
    stem = name or Path(os.fspath(init)).name.removesuffix(".bin")
    folder = Path(out_dir).expanduser()
    debug = folder / f"{stem}_debug_state.bin"
    target = folder / f"{stem}.bin"
    if target.exists() and os.path.exists(init) and os.path.samefile(target, init):
        raise ConfigError("out", f"{target} is the source itself; choose another folder or name")
    model = loading.load(init, seed=seed, ops=ops)
    config = model.config
    if not isinstance(config, Config):
        raise ConfigError("init", f"{os.fspath(init)!r} is no GPT-2, which is all that this reference computes")
    if T > config.max_seq_len:
        raise ConfigError("sequence length", f"{T} exceeds the model's {config.max_seq_len}")
    if perturbed:
        perturb(model.params, seed)
    if tokens is None:
        ids = np.random.Generator(np.random.Philox(key=seed)).integers(config.vocab_size, size=B * T + 1)
        stream = ids.astype(np.int32)
        x, y = stream[:-1].reshape(B, T), stream[1:].reshape(B, T)
    else:
        x, y = Shards(tokens, B, T, vocab_size=config.vocab_size).next()
    result = overfit(
        model.params, config, x, y, steps=steps, lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2,
        eps=eps, decay_on=decay_on, dtype=dtype, on_step=on_step,
    )  # fmt: skip

    written = Written(target, debug, debug.with_suffix(".json"), result.losses)
    files.make_folder(folder)
    loading.save_bin(model, written.model, version)
    checkpoint.write_debug_state(
        written.debug_state, checkpoint.DEBUG_VERSIONS[version], x, y, result.logits, result.losses[0],
        ((row, result.gradients[row.name]) for row in model.params.table),
    )  # fmt: skip
    weights = "perturbed" if perturbed else "random" if loading.is_preset(os.fspath(init)) else "trained"
    recipe = Recipe(result.losses, lr, beta1, beta2, eps, weight_decay, decay_on, weights, dtype)
    write_recipe(written.recipe, recipe, model=written.model.name, batch_size=B, sequence_length=T, seed=seed)
    return written
