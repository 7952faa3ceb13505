"""Low-rank adapters (Hu et al. 2021): a frozen model whose matrices get a trained addition, w + scale * B A.

A model knows nothing of them.  `Adapters` has their rows, values and gradients; `Adapted` is a backend that does what
the model asks for and, where a layer's w has adapters, theirs on top.  `attach` brings the two together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from llmc.arena import Arena, Array, Row
from llmc.errors import ConfigError
from llmc.model import Model
from llmc.ops import Ops

ALL = "all"  # every matrix of the layers
PREFIX = "base_model.model."  # of PEFT's names


@dataclass(frozen=True)
class LoRA:
    """The numbers of an adapter: its rank, alpha (the addition's scale is alpha / rank), and the modules that get one.

    `targets` are names of modules in a Hugging Face file, from their end ("q_proj", "mlp.c_proj"), or "all".
    ConfigError, naming the field, for what makes no sense.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL,)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError("lora_rank", f"must be at least 1, got {self.rank}")
        if not self.alpha > 0 or math.isinf(self.alpha):
            raise ConfigError("lora_alpha", f"must be a number above 0, got {self.alpha}")
        if not self.targets or not all(self.targets):
            raise ConfigError("lora_targets", "names no module")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Part(NamedTuple):
    """One module that has an adapter: the rows of its a and b, and which of the outputs of `row` are its own."""

    row: str
    module: str  # its name in a Hugging Face file, with {layer}
    column: int
    width: int
    a: Row
    b: Row


def modules(rows: Sequence[Row]) -> list[tuple[Row, str, int, int]]:
    """The layers' matrices in a Hugging Face file's terms: row, module, first output, number of outputs."""
    found = []
    for row in rows:
        if not row.layers or len(row.shape) != 2:
            continue
        parts = ((row.hf_name, row.shape[0]),) if isinstance(row.hf_name, str) else row.hf_name
        column = 0
        for name, width in parts:
            found.append((row, name.removesuffix(".weight"), column, width))
            column += width
    return found


def parts_of(rows: Sequence[Row], lora: LoRA, dtype: str = "float32") -> list[Part]:
    """The adapters of a model with the parameter table `rows`.  ConfigError for a target that none of its modules
    ends in, listing them."""
    known = modules(rows)

    def chosen(module: str, targets: Sequence[str]) -> bool:
        return any(target == ALL or module == target or module.endswith(f".{target}") for target in targets)

    for target in lora.targets:
        if not any(chosen(module, [target]) for _, module, _, _ in known):
            names = ", ".join(dict.fromkeys(module.rpartition(".")[2] for _, module, _, _ in known))
            raise ConfigError("lora_targets", f"the model has no module {target!r}; choose from {ALL}, {names}")
    parts = []
    for row, module, column, width in known:
        if not chosen(module, lora.targets):
            continue
        name = f"{row.name}_{column}"
        a = Row(f"{name}_a", (lora.rank, row.shape[1]), dtype, row.layers, True, f"{PREFIX}{module}.lora_A.weight")
        b = Row(f"{name}_b", (width, lora.rank), dtype, row.layers, True, f"{PREFIX}{module}.lora_B.weight")
        parts.append(Part(row.name, module, column, width, a, b))
    return parts


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """The table of the adapters' arenas."""
    return [row for part in parts for row in (part.a, part.b)]


def scratch_rows(rows: Sequence[Row], parts: Sequence[Part], tokens: int, dtype: str) -> list[Row]:
    """What the adapters keep between forward and backward, for `tokens` tokens, and what the backward pass adds."""
    rank, L = parts[0].a.shape[0], parts[0].a.layers
    most = max(sum(part.row == row.name for part in parts) for row in rows)
    hidden = [Row(part.a.name.removesuffix("_a"), (tokens * rank,), dtype, L) for part in parts]
    return [*hidden, Row("dhidden", (most, tokens * rank), dtype)]


class Adapters:
    """The adapters of one model: `params` (masters where the backend stores bfloat16), `weights`, `grads`.

    b starts at zero, so that the model is at first what it was; a at N(0, 1/(3 K)) for K inputs, as wide as PEFT's.
    """

    def __init__(self, model: Model, lora: LoRA, masters: bool = True) -> None:
        self.lora, self.ops, self._matrices = lora, model.ops, model.params.table
        self.dtype = model.dtype
        self.parts = parts_of(model.params.table, lora)
        rows = rows_of(self.parts)
        self.table = [row._replace(dtype=self.dtype) for row in rows]
        copies = masters and self.dtype == "bfloat16"
        self.params = Arena(rows if copies else self.table, self.ops.empty)
        self.weights = Arena(self.table, self.ops.empty) if copies else self.params
        self.grads: Arena | None = None
        self._scratch: Arena | None = None
        self._tokens = 0
        # A layer's matrix is known by the view that the model passes, which its arena keeps.
        self._of = {
            id(getattr(model.weights.layer(i), row)): (i, [part for part in self.parts if part.row == row])
            for row in dict.fromkeys(part.row for part in self.parts)
            for i in range(model.config.num_layers)
        }

    def initialise(self, seed: int) -> None:
        """Random a, b = 0; `seed` alone decides the values."""
        for stream, (row, tensor) in enumerate(self.params):
            if row.name.endswith("_a"):
                self.ops.normal(tensor, seed, stream, 1.0 / math.sqrt(3 * row.shape[1]))
            else:
                tensor[...] = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Make `weights` from `params` anew, where they are not the same."""
        if self.weights is not self.params:
            self.ops.copy(self.weights.flat, self.params.flat)

    def prepare(self, tokens: int) -> None:
        """Allocate what training on batches of so many tokens needs."""
        if self.grads is None:
            self.grads = Arena(self.table, self.ops.empty)
        self.grow(tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas that exist now."""
        copies = None if self.weights is self.params else self.weights
        arenas = (self.params, copies, self.grads, self._scratch)
        return sum(arena.nbytes for arena in arenas if arena is not None)

    def grow(self, tokens: int) -> bool:
        """Make room for so many tokens; whether what was there is gone, and with it what recordings write to."""
        if tokens <= self._tokens:
            return False
        had, self._scratch, self._tokens = self._scratch is not None, None, tokens  # freed before its successor is made
        self._scratch = Arena(scratch_rows(self._matrices, self.parts, tokens, self.dtype), self.ops.empty)
        return had

    def _room(self, tokens: int) -> Arena:
        if self._scratch is None or tokens > self._tokens:
            raise RuntimeError(f"adapters have room for {self._tokens} tokens, not for {tokens}: call grow() first")
        return self._scratch

    def of(self, w: Array) -> tuple[int, list[Part]]:
        """The layer that the matrix w belongs to and its adapters; none for a matrix without."""
        return self._of.get(id(w), (0, []))

    def hidden(self, part: Part, layer: int, x: Array) -> Array:
        """What of x (B,T,K) came out of a part's a: (B,T,r), kept until the backward pass."""
        B, T, rank = x.shape[0], x.shape[1], self.lora.rank
        return self._room(B * T)[part.a.name.removesuffix("_a")][layer][: B * T * rank].reshape(B, T, rank)

    def dhidden(self, index: int, x: Array) -> Array:
        B, T, rank = x.shape[0], x.shape[1], self.lora.rank
        return self._room(B * T).dhidden[index][: B * T * rank].reshape(B, T, rank)

    def merge(self, model: Model) -> None:
        """Add the adapters into the matrices of `model`, which is theirs, and leave it without them, trainable as a
        whole.

        ConfigError where its matrices are bfloat16: what is added would be lost in the rounding.
        """
        if model.params[self.parts[0].row].dtype != "float32":
            raise ConfigError("lora", "adapters are merged into float32 weights: load the model in fp32")
        for part in self.parts:
            for i in range(model.config.num_layers):
                w = model.params[part.row][i][part.column : part.column + part.width]
                a, b = self.params[part.a.name][i], self.params[part.b.name][i]
                scaled = self.ops.empty((1, *b.shape), "float32")
                scaled[...] = self.lora.scale * self.ops.fetch(b)()[None]
                self.ops.lora_backward_input(w.reshape(1, *w.shape), scaled, a)
        model.ops, model.frozen = self.ops, False
        model.adapters, model.source = None, ""  # which no longer names these weights
        model.refresh()


def attach(model: Model, lora: LoRA, seed: int = 0, masters: bool = True) -> Adapters:
    """Freeze `model` and give it adapters, which change nothing until they are trained.  ConfigError for a target that
    it does not have, or if it has adapters already."""
    if model.adapters is not None:
        raise ConfigError("lora_rank", "the model has adapters already")
    adapters = Adapters(model, lora, masters)
    adapters.initialise(seed)
    model.frozen, model.grads = True, None
    model.adapters = adapters
    if model.acts is not None:
        adapters.grow(model.losses.size)
    model.ops = cast(Ops, Adapted(model.ops, adapters))
    return adapters


class Adapted:
    """A backend whose linear layers have adapters; everything else is the backend's own."""

    def __init__(self, ops: Ops, adapters: Adapters) -> None:
        self._ops, self._adapters = ops, adapters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _forward(self, out: Array, x: Array, w: Array) -> None:
        adapters = self._adapters
        layer, parts = adapters.of(w)
        for part in parts:
            values = adapters.weights.layer(layer)
            a, b = getattr(values, part.a.name), getattr(values, part.b.name)
            self._ops.lora_forward(
                out, adapters.hidden(part, layer, x), x, a, b, adapters.lora.scale, part.column
            )

    def _backward(self, dx: Array, dout: Array, x: Array, w: Array, accumulate: bool) -> None:
        """`linear_backward` of a frozen w: x is read before dx, which may be x, is written."""
        adapters = self._adapters
        layer, parts = adapters.of(w)
        inputs = []
        for index, part in enumerate(parts):
            values, grads = adapters.weights.layer(layer), cast(Arena, adapters.grads).layer(layer)
            a, b = getattr(values, part.a.name), getattr(values, part.b.name)
            da, db = getattr(grads, part.a.name), getattr(grads, part.b.name)
            hidden, dhidden = adapters.hidden(part, layer, x), adapters.dhidden(index, x)
            self._ops.lora_backward(
                da, db, dhidden, dout, hidden, x, b, adapters.lora.scale, part.column, accumulate
            )
            inputs.append((dhidden, a))
        self._ops.linear_backward(dx, None, None, dout, x, w, accumulate)
        for dhidden, a in inputs:
            self._ops.lora_backward_input(dx, dhidden, a)

    def linear_forward(self, out: Array, x: Array, w: Array, b: Array | None) -> None:
        self._ops.linear_forward(out, x, w, b)
        self._forward(out, x, w)

    def linear_backward(
        self, dx: Array, dw: None, db: None, dout: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        self._backward(dx, dout, x, w, accumulate)

    def linear_gelu_forward(self, out: Array, pre: Array, x: Array, w: Array, b: Array | None) -> None:
        self.linear_forward(pre, x, w, b)
        self._ops.gelu_forward(out, pre)

    def gelu_linear_backward(
        self, dpre: Array, dw: None, db: None, dout: Array, pre: Array, x: Array, w: Array, accumulate: bool
    ) -> None:
        self._backward(dpre, dout, x, w, accumulate)
        self._ops.gelu_backward(dpre, dpre, pre)
