"""Gemma (Gemma Team 2024) and Gemma 2 (Gemma Team 2024b): its numbers and tables, and three pages - forward, backward,
decode.  `Gemma` is version 1; `Gemma2` differs in what a branch goes through before it joins the stream, a norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from llmc import model, rotary
from llmc.arena import Arena, Array, Row
from llmc.errors import ConfigError
from llmc.model import INIT_STD, Cache, statistics
from llmc.ops import Ops

OFFSET = 1.0  # norm weights are kept as what is added to it

# What is recomputed, by mode: these rows of `activation_rows` exist once and not per layer.
_NORMS = ("ln1", "ln1_rstd", "ln2", "ln2_rstd")
_BRANCHES = ("branch1", "branch1_rstd", "branch2")
RECOMPUTED = {
    "none": (),
    "gelu": ("gated",),
    "gelu+norm": ("gated", *_NORMS),
    "block": ("gated", *_NORMS, *_BRANCHES, "qkv", "atty", "lse", "middle", "gateup"),
}


@dataclass(frozen=True)
class Config(model.Config):
    """The numbers that define a Gemma.  Raises ConfigError where they do not fit together."""

    max_seq_len: int = 8192
    vocab_size: int = 256000
    num_layers: int = 18
    num_heads: int = 8  # H
    channels: int = 2048  # C
    num_kv_heads: int = 1  # G
    head_size: int = 256  # D
    hidden: int = 16384  # F
    rope_theta: float = 10000.0
    eps: float = 1e-6
    version: int = 1
    window: int = 0  # tokens that a token of layers 0, 2, 4 ... sees, itself included; 0: all before it
    attn_softcap: float = 0.0  # of the scores; 0: none
    final_softcap: float = 0.0  # of the logits; 0: none
    query_scale: float = 256.0  # scores are multiplied by 1/sqrt of it; version 1: D
    BACKWARD: ClassVar[tuple[str, ...]] = ("dresidual", "datty", "dqkv")

    def __post_init__(self) -> None:
        self._positive(
            "max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "num_kv_heads", "head_size", "hidden"
        )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads", f"{self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ConfigError("head_size", f"{self.head_size} is odd: channels are turned in pairs")
        for name in ("rope_theta", "eps", "query_scale"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ConfigError(name, f"must be a number above 0, got {getattr(self, name)}")
        for name in ("window", "attn_softcap", "final_softcap"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(name, f"must be at least 0, got {getattr(self, name)}")
        if self.version not in (1, 2):
            raise ConfigError("version", f"must be 1 or 2, got {self.version}")
        if self.version == 1:
            for name, only in (
                ("window", 0), ("attn_softcap", 0), ("final_softcap", 0), ("query_scale", self.head_size)
            ):  # fmt: skip
                if getattr(self, name) != only:
                    raise ConfigError(name, f"must be {only} in Gemma 1, got {getattr(self, name)}")

    @property
    def qkv_channels(self) -> int:
        """(H + 2 G) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    @property
    def embedding_scale(self) -> float:
        """sqrt(C) as float32 holds it, which is what embeddings are multiplied by."""
        return float(np.float32(math.sqrt(self.channels)))

    def build(self, ops: Ops, **options: Any) -> Gemma:
        return (Gemma if self.version == 1 else Gemma2)(self, ops, **options)

    def parameter_rows(self, dtype: str = "float32") -> list[Row]:
        """wte, which is also the head, six tensors per layer (eight in version 2), the last norm."""
        C, F, L, D = self.channels, self.hidden, self.num_layers, self.head_size
        Q, KV, Vp = self.num_heads * D, self.num_kv_heads * D, self.padded_vocab_size
        layer = "model.layers.{layer}."
        q, k, v = (f"{layer}self_attn.{name}_proj.weight" for name in "qkv")

        def stack(name: str, shape: tuple[int, ...], hf: Any) -> Row:
            return Row(name, shape, dtype, L, len(shape) == 2, f"{layer}{hf}" if isinstance(hf, str) else hf)

        def norm(name: str, hf: str) -> Row:
            return stack(name, (C,), f"{hf}_layernorm.weight")

        if self.version == 1:
            before, after = [norm("ln2w", "post_attention")], []
        else:
            before = [norm("post1w", "post_attention"), norm("ln2w", "pre_feedforward")]
            after = [norm("post2w", "post_feedforward")]
        return [
            Row("wte", (Vp, C), dtype, decay=True, hf_name="model.embed_tokens.weight"),
            norm("ln1w", "input"),
            stack("qkvw", (Q + 2 * KV, C), ((q, Q), (k, KV), (v, KV))),
            stack("attprojw", (C, Q), "self_attn.o_proj.weight"),
            *before,
            stack("gateupw", (2 * F, C), tuple((f"{layer}mlp.{name}_proj.weight", F) for name in ("gate", "up"))),
            stack("downw", (C, F), "mlp.down_proj.weight"),
            *after,
            Row("lnfw", (C,), dtype, hf_name="model.norm.weight"),
        ]

    def _branch_shapes(self, B: int, T: int, dtype: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Branches before their norms, and the norms' statistics: shapes and types; version 2 alone has them."""
        channels, token = ((B, T, self.channels), dtype), ((B, T), statistics(dtype))
        both = {"branch1": channels, "branch1_rstd": token, "branch2": channels, "branch2_rstd": token}
        return both if self.version == 2 else {}

    def activation_rows(self, B: int, T: int, dtype: str = "float32", recompute: str = "none") -> list[Row]:
        """What the forward pass reads and keeps, and the three buffers the backward pass adds.

        `residual` is the stream before each layer (and after the last), `middle` the stream between a
        layer's two branches, `rope` the angles.  ConfigError for another mode, or if T exceeds the model's longest
        sequence.
        """
        self._check_activations(T, recompute)
        C, F, L, H = self.channels, self.hidden, self.num_layers, self.num_heads
        N, A, numbers = self.qkv_channels, self.num_heads * self.head_size, statistics(dtype)

        def layers(name: str, *shape: int, dtype: str = dtype) -> Row:
            return Row(name, shape, dtype, 0 if name in RECOMPUTED[recompute] else L)

        return [
            Row("tokens", (B, T), "int32"),
            Row("targets", (B, T), "int32"),
            Row("positions", (B,), "int32"),  # 0
            Row("rope", (T, self.head_size), numbers),
            Row("residual", (B, T, C), dtype, L + 1),
            layers("ln1", B, T, C),
            layers("ln1_rstd", B, T, dtype=numbers),
            layers("qkv", B, T, N),
            layers("atty", B, T, A),
            layers("lse", B, H, T, dtype=numbers),
            layers("middle", B, T, C),
            layers("ln2", B, T, C),
            layers("ln2_rstd", B, T, dtype=numbers),
            layers("gateup", B, T, 2 * F),
            layers("gated", B, T, F),
            *(layers(name, *shape, dtype=kind) for name, (shape, kind) in self._branch_shapes(B, T, dtype).items()),
            Row("lnf", (B, T, C), dtype),
            Row("lnf_rstd", (B, T), numbers),
            Row("losses", (B, T), numbers),
            Row("dresidual", (B, T, C), dtype),
            Row("datty", (B, T, A), dtype),
            Row("dqkv", (B, T, N), dtype),
        ]

    def cache_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        shape, L = (B, T, self.num_kv_heads * self.head_size), self.num_layers
        return [
            Row("rope", (T, self.head_size), statistics(dtype)),
            Row("keys", shape, dtype, L),
            Row("values", shape, dtype, L),
        ]

    def decode_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        C, F = self.channels, self.hidden
        return [
            Row("tokens", (B, T), "int32"),
            Row("positions", (B,), "int32"),
            Row("residual", (B, T, C), dtype),
            Row("norm", (B, T, C), dtype),
            Row("branch", (B, T, C), dtype),
            Row("rstd", (B, T), statistics(dtype)),
            Row("qkv", (B, T, self.qkv_channels), dtype),
            Row("atty", (B, T, self.num_heads * self.head_size), dtype),
            Row("gateup", (B, T, 2 * F), dtype),
            Row("gated", (B, T, F), dtype),
            *(Row(name, *shape) for name, shape in self._branch_shapes(B, T, dtype).items()),
            Row("last", (B, 1, C), dtype),
            Row("logits", (B, 1, self.vocab_size), dtype),
        ]

    def layer_window(self, layer: int) -> int:
        return 0 if layer % 2 else self.window

    def initial(self, row: Row) -> float:
        """N(0, 0.02) for matrices, the two projections into the residual stream scaled by 1/sqrt(2L) as in GPT-2,
        norm weights 0, which stands for 1."""
        if len(row.shape) == 1:
            return 0.0
        return model.scaled_std(self.num_layers) if row.name in ("attprojw", "downw") else INIT_STD


_GEMMA2: dict[str, Any] = {"version": 2, "attn_softcap": 50.0, "final_softcap": 30.0}
_TINY: dict[str, Any] = {"num_kv_heads": 1, "head_size": 16, "hidden": 88, "query_scale": 16}
_STORIES: dict[str, Any] = {"num_kv_heads": 2, "head_size": 32, "hidden": 408, "query_scale": 32}

PRESETS: dict[str, Config] = {
    "gemma-tiny": Config(64, 257, 2, 2, 32, **_TINY),
    "gemma-2-tiny": Config(64, 257, 2, 2, 32, **_TINY, **_GEMMA2, window=16),
    "gemma-stories": Config(256, 257, 4, 4, 128, **_STORIES),
    "gemma-2-stories": Config(256, 257, 4, 4, 128, **_STORIES, **_GEMMA2, window=64),
    "gemma-2b": Config(),
    "gemma-7b": Config(8192, 256000, 28, 16, 3072, num_kv_heads=16, hidden=24576),
    "gemma-2-2b": Config(8192, 256000, 26, 8, 2304, num_kv_heads=4, hidden=9216, **_GEMMA2, window=4096),
    "gemma-2-9b": Config(8192, 256000, 42, 16, 3584, num_kv_heads=8, hidden=14336, **_GEMMA2, window=4096),
}


class Gemma(model.Model):
    """A Gemma over a backend; what its attributes and methods are `model.Model` says.

    `Config.build` chooses the class; ConfigError for a configuration of another version.
    """

    config: Config
    VERSION: ClassVar[int] = 1

    def __init__(self, config: Config, *args: Any, **options: Any) -> None:
        if config.version != self.VERSION:
            raise ConfigError("version", f"{type(self).__name__} is version {self.VERSION}, not {config.version}")
        super().__init__(config, *args, **options)

    def _constants(self, arena: Arena) -> None:
        c = self.config
        arena.rope[...] = rotary.table(c.rope_theta, c.head_size, len(arena.rope))

    def _attention(self, i: int) -> tuple[float, int, float]:
        """Scale, window and soft-cap of layer i's attention."""
        c = self.config
        return 1.0 / math.sqrt(c.query_scale), c.layer_window(i), c.attn_softcap

    # ---- forward -----------------------------------------------------------------------------------

    def _body(self) -> None:
        ops, c, p, a = self.ops, self.config, self.weights, self._acts
        ops.embedding_forward(a.residual[0], a.tokens, a.positions, p.wte, None, c.vocab_size, c.embedding_scale)
        self._first_norm(a, 0)
        for i in range(c.num_layers):
            self._layer_forward(a, i)

    def _first_norm(self, a: Arena, i: int) -> None:
        x = a.layer(i)
        self.ops.rmsnorm_forward(x.ln1, x.ln1_rstd, x.residual, self.weights.layer(i).ln1w, self.config.eps, OFFSET)

    def _layer_forward(self, a: Arena, i: int, output: bool = True) -> None:
        """Layer i, from ln1 to residual[i + 1] and the norm that follows it, the next layer's or the last; without
        `output` only as far as its backward pass reads."""
        ops, c, w, x = self.ops, self.config, self.weights.layer(i), a.layer(i)
        ops.linear_forward(x.qkv, x.ln1, w.qkvw, None)
        ops.rope_forward(x.qkv, a.positions, a.rope, c.num_heads + c.num_kv_heads)
        ops.attention_forward(x.atty, x.lse, x.qkv, *self._attention(i))
        self._attention_branch(x.middle, x, w)
        ops.residual_rmsnorm_forward(x.middle, x.ln2, x.ln2_rstd, x.residual, x.middle, w.ln2w, c.eps, OFFSET)
        ops.linear_forward(x.gateup, x.ln2, w.gateupw, None)
        ops.geglu_forward(x.gated, x.gateup)
        if not output:
            return
        after = a.layer(i + 1)
        self._mlp_branch(after.residual, x, w)
        if i + 1 < c.num_layers:
            norm, scale = (after.ln1, after.ln1_rstd), self.weights.layer(i + 1).ln1w
        else:
            norm, scale = (a.lnf, a.lnf_rstd), w.lnfw
        ops.residual_rmsnorm_forward(after.residual, *norm, x.middle, after.residual, scale, c.eps, OFFSET)

    def _attention_branch(self, out: Array, x: Any, w: SimpleNamespace) -> None:
        """What attention adds to the stream."""
        self.ops.linear_forward(out, x.atty, w.attprojw, None)

    def _mlp_branch(self, out: Array, x: Any, w: SimpleNamespace) -> None:
        """What the MLP adds to the stream."""
        self.ops.linear_forward(out, x.gated, w.downw, None)

    # ---- backward ----------------------------------------------------------------------------------

    def _backward_pass(self, acc: bool) -> None:
        ops, c, p, g, a = self.ops, self.config, self.weights, self._gradients(), self._acts
        dresidual, datty, dqkv = a.dresidual, a.datty, a.dqkv

        ops.zero(dresidual)
        final = a.layer(c.num_layers).residual
        ops.rmsnorm_backward(dresidual, g.lnfw, a.lnf, final, a.lnf_rstd, p.lnfw, OFFSET, acc)
        for i in reversed(range(c.num_layers)):
            w, d, x = p.layer(i), g.layer(i), a.layer(i)
            self._layer_again(a, i)
            self._mlp_branch_backward(x.gated, d, dresidual, x, w, acc)
            ops.geglu_backward(x.gateup, x.gated, x.gateup)
            ops.linear_backward(x.ln2, d.gateupw, None, x.gateup, x.ln2, w.gateupw, acc)
            ops.rmsnorm_backward(dresidual, d.ln2w, x.ln2, x.middle, x.ln2_rstd, w.ln2w, OFFSET, acc)
            self._attention_branch_backward(datty, d, dresidual, x, w, acc)
            ops.attention_backward(dqkv, datty, x.qkv, x.atty, x.lse, *self._attention(i))
            ops.rope_backward(dqkv, a.rope, c.num_heads + c.num_kv_heads)
            ops.linear_backward(x.ln1, d.qkvw, None, dqkv, x.ln1, w.qkvw, acc)
            ops.rmsnorm_backward(dresidual, d.ln1w, x.ln1, x.residual, x.ln1_rstd, w.ln1w, OFFSET, acc)
        if not self.frozen:
            ops.embedding_backward(g.wte, None, dresidual, a.tokens, c.embedding_scale, acc)

    def _mlp_branch_backward(
        self, dgated: Array, d: SimpleNamespace, dout: Array, x: Any, w: SimpleNamespace, acc: bool
    ) -> None:
        self.ops.linear_backward(dgated, d.downw, None, dout, x.gated, w.downw, acc)

    def _attention_branch_backward(
        self, datty: Array, d: SimpleNamespace, dout: Array, x: Any, w: SimpleNamespace, acc: bool
    ) -> None:
        self.ops.linear_backward(datty, d.attprojw, None, dout, x.atty, w.attprojw, acc)

    def _layer_again(self, a: Arena, i: int) -> None:
        """Make again what `forward` has not kept of layer i."""
        if i == self.config.num_layers - 1:
            return  # nothing has written over the last layer's
        ops, c, w, x = self.ops, self.config, self.weights.layer(i), a.layer(i)
        if self.recompute in ("gelu+norm", "block"):
            self._first_norm(a, i)
        if self.recompute == "block":
            self._layer_forward(a, i, output=False)
        if self.recompute in ("gelu", "gelu+norm"):
            ops.geglu_forward(x.gated, x.gateup)
        if self.recompute == "gelu+norm":
            ops.rmsnorm_forward(x.ln2, x.ln2_rstd, x.middle, w.ln2w, c.eps, OFFSET)

    # ---- decode ------------------------------------------------------------------------------------

    def _decode_pass(self, s: Arena, cache: Cache) -> None:
        ops, c, p = self.ops, self.config, self.weights
        ops.embedding_forward(s.residual, s.tokens, s.positions, p.wte, None, c.vocab_size, c.embedding_scale)
        ops.rmsnorm_forward(s.norm, s.rstd, s.residual, p.layer(0).ln1w, c.eps, OFFSET)
        for i in range(c.num_layers):
            w, kv = p.layer(i), cache.layer(i)
            ops.linear_forward(s.qkv, s.norm, w.qkvw, None)
            ops.rope_forward(s.qkv, s.positions, kv.rope, c.num_heads + c.num_kv_heads)
            ops.attention_decode(s.atty, kv.keys, kv.values, s.qkv, s.positions, c.num_heads, *self._attention(i))
            self._attention_branch(s.branch, s, w)
            ops.residual_rmsnorm_forward(s.residual, s.norm, s.rstd, s.residual, s.branch, w.ln2w, c.eps, OFFSET)
            ops.linear_forward(s.gateup, s.norm, w.gateupw, None)
            ops.geglu_forward(s.gated, s.gateup)
            self._mlp_branch(s.branch, s, w)
            if i + 1 == c.num_layers:
                ops.residual_forward(s.residual, s.residual, s.branch)
                return
            after = p.layer(i + 1).ln1w
            ops.residual_rmsnorm_forward(s.residual, s.norm, s.rstd, s.residual, s.branch, after, c.eps, OFFSET)

    def _last_norm(self, out: Array, x: Array, s: Arena) -> None:
        self.ops.rmsnorm_forward(out, s.rstd[:1, :1], x, self.weights.lnfw, self.config.eps, OFFSET)


class Gemma2(Gemma):
    """Both branches go through a norm of their own, post1w and post2w, before they join the stream."""

    VERSION: ClassVar[int] = 2

    def _attention_branch(self, out: Array, x: Any, w: SimpleNamespace) -> None:
        self.ops.linear_forward(x.branch1, x.atty, w.attprojw, None)
        self.ops.rmsnorm_forward(out, x.branch1_rstd, x.branch1, w.post1w, self.config.eps, OFFSET)

    def _mlp_branch(self, out: Array, x: Any, w: SimpleNamespace) -> None:
        self.ops.linear_forward(x.branch2, x.gated, w.downw, None)
        self.ops.rmsnorm_forward(out, x.branch2_rstd, x.branch2, w.post2w, self.config.eps, OFFSET)

    def _mlp_branch_backward(
        self, dgated: Array, d: SimpleNamespace, dout: Array, x: Any, w: SimpleNamespace, acc: bool
    ) -> None:
        dbranch = self._dbranch()
        self.ops.rmsnorm_backward(dbranch, d.post2w, dout, x.branch2, x.branch2_rstd, w.post2w, OFFSET, acc)
        super()._mlp_branch_backward(dgated, d, dbranch, x, w, acc)

    def _attention_branch_backward(
        self, datty: Array, d: SimpleNamespace, dout: Array, x: Any, w: SimpleNamespace, acc: bool
    ) -> None:
        dbranch = self._dbranch()
        self.ops.rmsnorm_backward(dbranch, d.post1w, dout, x.branch1, x.branch1_rstd, w.post1w, OFFSET, acc)
        super()._attention_branch_backward(datty, d, dbranch, x, w, acc)

    def _dbranch(self) -> Array:
        """Zeros (B,T,C), in what held the gradient of the last norm, which has been through that norm."""
        self.ops.zero(self._acts.lnf)
        return self._acts.lnf

    def _layer_again(self, a: Arena, i: int) -> None:
        super()._layer_again(a, i)
        if self.recompute == "block" and i < self.config.num_layers - 1:
            x = a.layer(i)
            self.ops.linear_forward(x.branch2, x.gated, self.weights.layer(i).downw, None)  # its rstd is kept
