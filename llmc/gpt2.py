"""GPT-2 (Radford et al. 2019): configuration, tables, and three pages - forward, backward, decode.

The model owns arenas and calls `ops`; it knows nothing of files, optimisers or devices.  Shapes follow
`ops.py`: B sequences of T tokens, C channels, H heads, V vocabulary entries padded to Vp, L layers.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmc.arena import Arena, Array, Row, table_nbytes
from llmc.errors import ConfigError
from llmc.ops import Ops

LAYERNORM_EPS = 1e-5
INIT_STD = 0.02

# What the backward pass makes again, by mode: these rows of `activation_rows` exist once and not per layer.  A norm's
# statistics come with it, so keeping them would save nothing.
_NORMS = ("ln1", "ln1_mean", "ln1_rstd", "ln2", "ln2_mean", "ln2_rstd")
RECOMPUTE = {
    "none": (),
    "gelu": ("fch_gelu",),
    "gelu+norm": ("fch_gelu", *_NORMS),
    "block": ("fch_gelu", *_NORMS, "qkv", "atty", "lse", "middle", "fch"),
}


@dataclass(frozen=True)
class Config:
    """The numbers that define a GPT-2.  Raises ConfigError where they do not fit together."""

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self) -> None:
        for field in ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels"):
            if getattr(self, field) < 1:
                raise ConfigError(field, f"must be at least 1, got {getattr(self, field)}")
        if self.channels % self.num_heads:
            raise ConfigError("channels", f"{self.channels} is not a multiple of num_heads {self.num_heads}")

    @property
    def padded_vocab_size(self) -> int:
        """Vp: the vocabulary rounded up to a multiple of 128, as llm.c's files hold it."""
        return -(-self.vocab_size // 128) * 128

    @property
    def num_parameters(self) -> int:
        """Padded rows of wte not counted."""
        padding = (self.padded_vocab_size - self.vocab_size) * self.channels
        return sum(row.size for row in parameter_rows(self)) - padding


PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(num_layers=24, num_heads=16, channels=1024),
    "gpt2-large": Config(num_layers=36, num_heads=20, channels=1280),
    "gpt2-xl": Config(num_layers=48, num_heads=25, channels=1600),
    "stories": Config(max_seq_len=256, vocab_size=257, num_layers=4, num_heads=4, channels=128),
    "tiny": Config(max_seq_len=64, vocab_size=257, num_layers=2, num_heads=2, channels=32),
}
# Depth names above 12 follow the GPT-2 family, whose width does not grow in proportion to its depth.
DEPTHS = {24: "gpt2-medium", 36: "gpt2-large", 48: "gpt2-xl"}


def preset(name: str) -> Config:
    """The configuration called `name`: a key of PRESETS, or `d<depth>` (d1 to d12: 64 channels per layer;
    d24, d36, d48: GPT-2 medium, large and xl).  ConfigError lists the names otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    if name[:1] == "d" and name[1:].isdecimal():
        depth = int(name[1:])
        if depth in DEPTHS:
            return PRESETS[DEPTHS[depth]]
        if 1 <= depth <= 12:
            return Config(num_layers=depth, num_heads=depth, channels=64 * depth)
    raise ConfigError("preset", f"{name!r} is unknown; choose from {', '.join(PRESETS)}, d1 to d12, d24, d36, d48")


def parameter_rows(config: Config, dtype: str = "float32") -> list[Row]:
    """The sixteen parameter tensors, in the order of llm.c's files."""
    C, L = config.channels, config.num_layers

    def one(name: str, shape: tuple[int, ...], hf: str) -> Row:
        return Row(name, shape, dtype, decay=len(shape) == 2, hf_name=f"transformer.{hf}")

    def stack(name: str, shape: tuple[int, ...], hf: str) -> Row:
        # Hugging Face's GPT-2 keeps these matrices as Conv1D weights, (in, out).
        matrix = len(shape) == 2
        return Row(name, shape, dtype, L, matrix, f"transformer.h.{{layer}}.{hf}", transpose=matrix)

    return [
        one("wte", (config.padded_vocab_size, C), "wte.weight"),
        one("wpe", (config.max_seq_len, C), "wpe.weight"),
        stack("ln1w", (C,), "ln_1.weight"),
        stack("ln1b", (C,), "ln_1.bias"),
        stack("qkvw", (3 * C, C), "attn.c_attn.weight"),
        stack("qkvb", (3 * C,), "attn.c_attn.bias"),
        stack("attprojw", (C, C), "attn.c_proj.weight"),
        stack("attprojb", (C,), "attn.c_proj.bias"),
        stack("ln2w", (C,), "ln_2.weight"),
        stack("ln2b", (C,), "ln_2.bias"),
        stack("fcw", (4 * C, C), "mlp.c_fc.weight"),
        stack("fcb", (4 * C,), "mlp.c_fc.bias"),
        stack("fcprojw", (C, 4 * C), "mlp.c_proj.weight"),
        stack("fcprojb", (C,), "mlp.c_proj.bias"),
        one("lnfw", (C,), "ln_f.weight"),
        one("lnfb", (C,), "ln_f.bias"),
    ]


def check_recompute(mode: str) -> None:
    """ConfigError unless `mode` is a key of RECOMPUTE."""
    if mode not in RECOMPUTE:
        raise ConfigError("recompute", f"{mode!r} is unknown; choose from {', '.join(RECOMPUTE)}")


def activation_rows(
    config: Config, B: int, T: int, dtype: str = "float32", recompute: str = "none"
) -> list[Row]:
    """What the forward pass reads and keeps, and the one buffer the backward pass adds.

    `residual` is the stream before each layer (and after the last), `middle` the stream between a
    layer's two branches.  Per token and layer 16 C are kept with `recompute` "none", 12 C with "gelu", 10 C with
    "gelu+norm", C with "block"; what is recomputed has room for one layer.  ConfigError for another mode, or if
    T exceeds the model's longest sequence.
    """
    check_recompute(recompute)
    if T > config.max_seq_len:
        raise ConfigError("sequence length", f"{T} exceeds the model's {config.max_seq_len}")
    C, L, H = config.channels, config.num_layers, config.num_heads
    statistics = _statistics(dtype)

    def layers(name: str, *shape: int) -> Row:
        return Row(name, shape, dtype, 0 if name in RECOMPUTE[recompute] else L)

    def numbers(name: str, *shape: int) -> Row:
        return layers(name, *shape)._replace(dtype=statistics)

    return [
        Row("tokens", (B, T), "int32"),
        Row("targets", (B, T), "int32"),
        Row("residual", (B, T, C), dtype, L + 1),
        layers("ln1", B, T, C),
        numbers("ln1_mean", B, T),
        numbers("ln1_rstd", B, T),
        layers("qkv", B, T, 3 * C),
        layers("atty", B, T, C),
        numbers("lse", B, H, T),
        layers("middle", B, T, C),
        layers("ln2", B, T, C),
        numbers("ln2_mean", B, T),
        numbers("ln2_rstd", B, T),
        layers("fch", B, T, 4 * C),
        layers("fch_gelu", B, T, 4 * C),
        Row("lnf", (B, T, C), dtype),
        Row("lnf_mean", (B, T), statistics),
        Row("lnf_rstd", (B, T), statistics),
        Row("losses", (B, T), statistics),
        Row("dresidual", (B, T, C), dtype),
    ]


def _statistics(dtype: str) -> str:
    """The type of means, logarithms and losses beside activations of `dtype`."""
    return "float32" if dtype == "bfloat16" else dtype


def workspace(config: Config, B: int, T: int) -> dict[str, int]:
    """The arguments of `ops.reserve` for a model of this configuration and batches of (B, T)."""
    parameters = table_nbytes(parameter_rows(config)) // np.dtype("float32").itemsize
    return {
        "channels": config.channels, "vocab_size": config.padded_vocab_size, "parameters": parameters,
        "tokens": B * T, "heads": config.num_heads,
    }  # fmt: skip


def cache_rows(config: Config, B: int, dtype: str = "float32") -> list[Row]:
    """The key-value cache of `decode`."""
    shape = (B, config.max_seq_len, config.channels)
    return [Row("keys", shape, dtype, config.num_layers), Row("values", shape, dtype, config.num_layers)]


def decode_rows(config: Config, B: int, T: int, dtype: str = "float32") -> list[Row]:
    """Scratch of `decode` for T new tokens; one layer's worth, since nothing is kept for a backward pass."""
    C, statistics = config.channels, _statistics(dtype)
    return [
        Row("tokens", (B, T), "int32"),
        Row("residual", (B, T, C), dtype),
        Row("norm", (B, T, C), dtype),
        Row("mean", (B, T), statistics),
        Row("rstd", (B, T), statistics),
        Row("qkv", (B, T, 3 * C), dtype),
        Row("atty", (B, T, C), dtype),
        Row("fch", (B, T, 4 * C), dtype),
        Row("fch_gelu", (B, T, 4 * C), dtype),
        Row("last", (B, 1, C), dtype),
        Row("logits", (B, 1, config.vocab_size), dtype),
    ]


class GPT2:
    """Parameters (zero until `initialise` or a checkpoint fills them) and, after `prepare`, what training needs.

    `dtype` is the type of weights, gradients and activations, by default what the backend stores.  Where that is
    bfloat16, `params` are float32 masters, unless `masters` is false: what is trained, read from files and saved.
    `weights` are what the layers read: `params` themselves, or their copies rounded to nearest, which `refresh` makes
    after others have written to `params`.

    `recompute` is the mode that `prepare` was given.  `tokenizer` is the caller's to set, or to promise with
    `tokenizer_later`; the model ignores it.
    """

    def __init__(self, config: Config, ops: Ops, dtype: str | None = None, masters: bool = True) -> None:
        self.config = config
        self.dtype: str = ops.info()["storage"] if dtype is None else dtype
        self.recompute = "none"
        self.tokenizer = None
        self._replays: dict[tuple[Any, ...], Callable[[], None]] = {}
        self.ops = ops
        rows = parameter_rows(config, self.dtype)
        narrow = masters and self.dtype == "bfloat16"
        self.params = Arena(parameter_rows(config) if narrow else rows, ops.empty)
        self.weights = Arena(rows, ops.empty) if narrow else self.params
        self.grads: Arena | None = None
        self.acts: Arena | None = None
        self.total = ops.empty((1,), "float64")
        self._scratch: Arena | None = None
        ops.reserve(**workspace(config, 1, 1))

    @property
    def ops(self) -> Ops:
        """The backend that the model calls.  Another one must take the same arrays; what was recorded is forgotten."""
        return self._ops

    @ops.setter
    def ops(self, ops: Ops) -> None:
        self._ops = ops
        self._replays.clear()

    @property
    def tokenizer(self) -> Any:
        """What turns text into this model's tokens and back, or None."""
        if self._promised is not None:
            self.tokenizer = self._promised()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._promised: Callable[[], Any] | None = None

    def tokenizer_later(self, load: Callable[[], Any]) -> None:
        """`load()` gives the tokenizer, when it is first asked for: a vocabulary takes longer to read than all else
        before the first step, and most runs of the weights alone need none."""
        self._promised = load

    def initialise(self, seed: int) -> None:
        """GPT-2's random initialisation: N(0, 0.02) for matrices, the two projections into the residual
        stream scaled by 1/sqrt(2L), biases 0, norm weights 1, padded rows of wte 0.

        Every tensor has its own stream of `Ops.normal`, so `seed` alone decides the values.  ConfigError for a
        negative seed or one of more than 64 bits.
        """
        if not 0 <= seed < 1 << 64:
            raise ConfigError("seed", f"must be from 0 to 2^64 - 1, got {seed}")
        L, V = self.config.num_layers, self.config.vocab_size
        for stream, (row, tensor) in enumerate(self.params):
            if len(row.shape) == 1:
                tensor[...] = 1.0 if row.name in ("ln1w", "ln2w", "lnfw") else 0.0
                continue
            std = INIT_STD / math.sqrt(2 * L) if row.name in ("attprojw", "fcprojw") else INIT_STD
            self.ops.normal(tensor[:V] if row.name == "wte" else tensor, seed, stream, std)
        self.params.wte[V:] = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Make `weights` from `params` anew, where they are not the same."""
        if self.weights is not self.params:
            self.ops.copy(self.weights.flat, self.params.flat)

    def prepare(self, B: int, T: int, recompute: str = "none") -> None:
        """Allocate what training on batches of (B, T) needs, so that the first step allocates nothing.

        `recompute`, a key of RECOMPUTE, trades time for memory from now on: what it names is not kept per layer
        but made again in the backward pass, by the same ops from the same inputs, so gradients are the same
        bits; but for "gelu" and "gelu+norm" in bfloat16, whose GELU is that of a sum that was rounded when it was
        stored.  ConfigError for another mode, or if T exceeds the model's longest sequence.
        """
        check_recompute(recompute)
        if recompute != self.recompute:
            self.recompute = recompute
            self._forget()
        self._activations(B, T)
        self._gradients()

    def _activations(self, B: int, T: int) -> Arena:
        if self.acts is None or self.acts.losses.shape != (B, T):
            rows = activation_rows(self.config, B, T, self.dtype, self.recompute)
            self._forget()  # freed before its successor is made
            self.ops.reserve(**workspace(self.config, B, T))
            self.acts = Arena(rows, self.ops.empty)
        return self.acts

    def _forget(self) -> None:
        self._replays.clear()
        self.acts = None

    def _gradients(self) -> Arena:
        if self.grads is None:
            self.grads = Arena(parameter_rows(self.config, self.dtype), self.ops.empty)
        return self.grads

    @property
    def nbytes(self) -> int:
        """Bytes of the arenas that exist now; the backend's workspace and key-value caches are not counted."""
        copies = None if self.weights is self.params else self.weights
        arenas = (self.params, copies, self.grads, self.acts, self._scratch)
        return sum(arena.nbytes for arena in arenas if arena is not None)

    @property
    def losses(self) -> Array:
        """(B, T): the loss of each token in the last `forward` or `loss`.  RuntimeError before either."""
        if self.acts is None:
            raise RuntimeError("losses exist only after forward() or loss()")
        return self.acts.losses

    def _replay(self, function: Callable[..., None], *args: Any) -> None:
        """function(self, *args), which the backend may record.

        Recordings hold the model weakly: it and its arenas go when the last who holds it lets go.
        """
        key = (function, *args)
        if key not in self._replays:
            self._replays[key] = self.ops.record(partial(function, weakref.proxy(self), *args))
        self._replays[key]()

    def _begin(self, tokens: Array, targets: Array | None) -> None:
        """Bring a batch to the device; ValueError for an id outside the vocabulary."""
        a, V = self._activations(*tokens.shape), self.config.vocab_size
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if ids is None:
                continue
            if ids.shape != tokens.shape:
                raise ValueError(f"{name}: expected shape {tokens.shape}, got {ids.shape}")
            if ids.size and not 0 <= ids.min() <= ids.max() < V:
                b, t = np.argwhere((ids < 0) | (ids >= V))[0]
                raise ValueError(f"{name}: id {ids[b, t]} at [{b}, {t}] is outside [0, {V})")
            a[name][...] = ids

    # ---- forward -----------------------------------------------------------------------------------

    def _body(self) -> None:
        """Everything before the head: acts.lnf from acts.tokens."""
        ops, p, a = self.ops, self.weights, self._acts
        ops.embedding_forward(a.residual[0], a.tokens, p.wte, p.wpe, self.config.vocab_size, 0)
        self._first_norm(a, 0)
        for i in range(self.config.num_layers):
            self._layer_forward(a, i)

    def _first_norm(self, a: Arena, i: int) -> None:
        w, x = self.weights.layer(i), a.layer(i)
        self.ops.layernorm_forward(x.ln1, x.ln1_mean, x.ln1_rstd, x.residual, w.ln1w, w.ln1b, LAYERNORM_EPS)

    def _layer_forward(self, a: Arena, i: int, output: bool = True) -> None:
        """Layer i, from ln1 to residual[i + 1] and the norm that follows it, the next layer's or the last; without
        `output` only as far as its backward pass reads."""
        ops, w, x = self.ops, self.weights.layer(i), a.layer(i)
        ops.linear_forward(x.qkv, x.ln1, w.qkvw, w.qkvb)
        ops.attention_forward(x.atty, x.lse, x.qkv)
        ops.linear_forward(x.middle, x.atty, w.attprojw, w.attprojb)
        ops.residual_layernorm_forward(
            x.middle, x.ln2, x.ln2_mean, x.ln2_rstd, x.residual, x.middle, w.ln2w, w.ln2b, LAYERNORM_EPS
        )
        ops.linear_gelu_forward(x.fch_gelu, x.fch, x.ln2, w.fcw, w.fcb)
        if not output:
            return
        after = a.layer(i + 1)
        ops.linear_forward(after.residual, x.fch_gelu, w.fcprojw, w.fcprojb)
        if i + 1 < self.config.num_layers:
            v = self.weights.layer(i + 1)
            norm, scale, shift = (after.ln1, after.ln1_mean, after.ln1_rstd), v.ln1w, v.ln1b
        else:
            norm, scale, shift = (a.lnf, a.lnf_mean, a.lnf_rstd), w.lnfw, w.lnfb
        ops.residual_layernorm_forward(after.residual, *norm, x.middle, after.residual, scale, shift, LAYERNORM_EPS)

    def forward(self, tokens: Array, targets: Array, *, scale: float | None = None, accumulate: bool = False) -> float:
        """Mean loss over tokens, targets (B, T) int32, and the head's backward with it.

        `scale` multiplies every token's loss in the gradient (default 1/(B T), the mean); `accumulate`
        adds to the gradients instead of overwriting them.  Follow with `backward`.
        """
        self._forward(tokens, targets, scale, accumulate)
        return self._mean_loss()

    def gradients(
        self, tokens: Array, targets: Array, *, scale: float | None = None, accumulate: bool = False
    ) -> None:
        """`forward` and `backward` without waiting for either.  `total` (1,) becomes `scale` times the sum of the
        losses, or with `accumulate` is added to."""
        self._forward(tokens, targets, scale, accumulate)
        self.backward(accumulate)

    def _forward(self, tokens: Array, targets: Array, scale: float | None, accumulate: bool) -> None:
        self._begin(tokens, targets)
        self._gradients()
        self._replay(GPT2._forward_pass, 1.0 / max(1, tokens.size) if scale is None else scale, accumulate)

    def _forward_pass(self, scale: float, accumulate: bool) -> None:
        self._body()
        a, grads, V = self._acts, self._gradients(), self.config.vocab_size
        self.ops.head_loss(a.losses, a.lnf, grads.wte, a.lnf, self.weights.wte, a.targets, V, scale, accumulate)
        self.ops.sum_losses(self.total, a.losses, scale, accumulate)

    def loss(self, tokens: Array, targets: Array) -> float:
        """Mean loss over tokens, targets (B, T); no gradients."""
        self._begin(tokens, targets)
        self._replay(GPT2._loss_pass)
        return self._mean_loss()

    def begin_loss(self, tokens: Array, targets: Array) -> None:
        """`loss` without waiting for it: `total` (1,) becomes the mean."""
        self._begin(tokens, targets)
        self._replay(GPT2._loss_pass)
        self.ops.sum_losses(self.total, self._acts.losses, 1.0 / max(1, tokens.size), False)

    def _loss_pass(self) -> None:
        self._body()
        a, V = self._acts, self.config.vocab_size
        self.ops.head_loss(a.losses, None, None, a.lnf, self.weights.wte, a.targets, V, 1.0, False)

    def _mean_loss(self) -> float:
        return float(np.mean(self.ops.fetch(self._acts.losses)(), dtype=np.float64))

    def logits(self, tokens: Array) -> Array:
        """Logits (B, T, V) for tokens (B, T): a new NumPy array of B T V floats, for tests and `verify`."""
        self._begin(tokens, None)
        self._replay(GPT2._body)
        out = self.ops.empty((*tokens.shape, self.config.vocab_size), self.dtype)
        self.ops.head_logits(out, self._acts.lnf, self.weights.wte, self.config.vocab_size)
        return self.ops.fetch(out)()

    @property
    def _acts(self) -> Arena:
        if self.acts is None:
            raise RuntimeError("there are no activations before a forward pass")
        return self.acts

    # ---- backward ----------------------------------------------------------------------------------

    def backward(self, accumulate: bool = False) -> None:
        """The rest of the backward pass after `forward`; gradients are left in `grads`.

        Works in place: each gradient overwrites the activation that was its partner and is dead by then.
        """
        if self.grads is None or self.acts is None:
            raise RuntimeError("backward() needs a forward() before it")
        self._replay(GPT2._backward_pass, accumulate)

    def _backward_pass(self, acc: bool) -> None:
        ops, p, g, a = self.ops, self.weights, self._gradients(), self._acts
        dresidual = a.dresidual

        ops.zero(dresidual)
        final = a.layer(self.config.num_layers).residual
        ops.layernorm_backward(dresidual, g.lnfw, g.lnfb, a.lnf, final, a.lnf_mean, a.lnf_rstd, p.lnfw, acc)
        for i in reversed(range(self.config.num_layers)):
            w, d, x = p.layer(i), g.layer(i), a.layer(i)
            self._layer_again(a, i)
            dfch, datty = x.fch_gelu, x.ln2
            dqkv = x.fch.reshape(-1)[: x.qkv.size].reshape(x.qkv.shape)
            ops.gelu_linear_backward(dfch, d.fcprojw, d.fcprojb, dresidual, x.fch, x.fch_gelu, w.fcprojw, acc)
            ops.linear_backward(x.ln2, d.fcw, d.fcb, dfch, x.ln2, w.fcw, acc)
            ops.layernorm_backward(
                dresidual, d.ln2w, d.ln2b, x.ln2, x.middle, x.ln2_mean, x.ln2_rstd, w.ln2w, acc
            )
            ops.linear_backward(datty, d.attprojw, d.attprojb, dresidual, x.atty, w.attprojw, acc)
            ops.attention_backward(dqkv, datty, x.qkv, x.atty, x.lse)
            ops.linear_backward(x.ln1, d.qkvw, d.qkvb, dqkv, x.ln1, w.qkvw, acc)
            ops.layernorm_backward(
                dresidual, d.ln1w, d.ln1b, x.ln1, x.residual, x.ln1_mean, x.ln1_rstd, w.ln1w, acc
            )
        ops.embedding_backward(g.wte, g.wpe, dresidual, a.tokens, acc)

    def _layer_again(self, a: Arena, i: int) -> None:
        """Make again what `forward` has not kept of layer i."""
        if i == self.config.num_layers - 1:
            return  # nothing has written over the last layer's
        ops, w, x = self.ops, self.weights.layer(i), a.layer(i)
        if self.recompute in ("gelu+norm", "block"):
            self._first_norm(a, i)
        if self.recompute == "block":
            self._layer_forward(a, i, output=False)
        if self.recompute in ("gelu", "gelu+norm"):
            ops.gelu_forward(x.fch_gelu, x.fch)
        if self.recompute == "gelu+norm":
            ops.layernorm_forward(x.ln2, x.ln2_mean, x.ln2_rstd, x.middle, w.ln2w, w.ln2b, LAYERNORM_EPS)

    # ---- decode ------------------------------------------------------------------------------------

    def new_cache(self, B: int = 1) -> Arena:
        """An empty key-value cache for B sequences of up to `max_seq_len` tokens."""
        return Arena(cache_rows(self.config, B, self.dtype), self.ops.empty)

    def decode(self, cache: Arena, tokens: Array, position: int) -> Array:
        """Logits (B, V) of the token after `tokens` (B, T), which follow the `position` tokens in the cache.

        Prefill passes the whole prompt, then one token at a time.  The result is a view that the next
        call overwrites.  ValueError past `max_seq_len`.
        """
        B, T = tokens.shape
        if self._scratch is None or self._scratch.mean.shape != (B, T):
            self._scratch = None  # freed before its successor is made
            self.ops.reserve(**workspace(self.config, B, T))
            self._scratch = Arena(decode_rows(self.config, B, T, self.dtype), self.ops.empty)
        ops, p, s, V = self.ops, self.weights, self._scratch, self.config.vocab_size
        s.tokens[...] = tokens

        ops.embedding_forward(s.residual, s.tokens, p.wte, p.wpe, V, position)
        for i in range(self.config.num_layers):
            w, kv = p.layer(i), cache.layer(i)
            ops.layernorm_forward(s.norm, s.mean, s.rstd, s.residual, w.ln1w, w.ln1b, LAYERNORM_EPS)
            ops.linear_forward(s.qkv, s.norm, w.qkvw, w.qkvb)
            ops.attention_decode(s.atty, kv.keys, kv.values, s.qkv, self.config.num_heads, position)
            ops.linear_forward(s.norm, s.atty, w.attprojw, w.attprojb)
            ops.residual_forward(s.residual, s.residual, s.norm)
            ops.layernorm_forward(s.norm, s.mean, s.rstd, s.residual, w.ln2w, w.ln2b, LAYERNORM_EPS)
            ops.linear_gelu_forward(s.fch_gelu, s.fch, s.norm, w.fcw, w.fcb)
            ops.linear_forward(s.norm, s.fch_gelu, w.fcprojw, w.fcprojb)
            ops.residual_forward(s.residual, s.residual, s.norm)
        for last, mean, rstd, x in self._last_tokens(s):
            ops.layernorm_forward(last, mean, rstd, x, p.lnfw, p.lnfb, LAYERNORM_EPS)
        ops.head_logits(s.logits, s.last, p.wte, V)
        return s.logits[:, 0]

    @staticmethod
    def _last_tokens(s: Arena) -> Iterator[tuple[Array, ...]]:
        """Each sequence's last token alone: its slices are contiguous, those of all sequences are not."""
        for b in range(s.last.shape[0]):
            one = slice(b, b + 1)
            yield s.last[one], s.mean[one, -1:], s.rstd[one, -1:], s.residual[one, -1:]
