"""GPT-2 (Radford et al. 2019): its numbers and tables, and three pages - forward, backward, decode."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc import model
from llmc.arena import Arena, Array, Row
from llmc.errors import ConfigError
from llmc.model import INIT_STD, Cache, statistics
from llmc.ops import Ops

LAYERNORM_EPS = 1e-5

# What is recomputed, by mode: these rows of `activation_rows` exist once and not per layer.  A norm's statistics come
# with it, so keeping them would save nothing.
_NORMS = ("ln1", "ln1_mean", "ln1_rstd", "ln2", "ln2_mean", "ln2_rstd")
RECOMPUTED = {
    "none": (),
    "gelu": ("fch_gelu",),
    "gelu+norm": ("fch_gelu", *_NORMS),
    "block": ("fch_gelu", *_NORMS, "qkv", "atty", "lse", "middle", "fch"),
}


@dataclass(frozen=True)
class Config(model.Config):
    """The numbers that define a GPT-2.  Raises ConfigError where they do not fit together."""

    max_seq_len: int = 1024
    vocab_size: int = 50257
    num_layers: int = 12
    num_heads: int = 12
    channels: int = 768

    def __post_init__(self) -> None:
        self._positive("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels")
        if self.channels % self.num_heads:
            raise ConfigError("channels", f"{self.channels} is not a multiple of num_heads {self.num_heads}")

    def build(self, ops: Ops, **options: Any) -> GPT2:
        return GPT2(self, ops, **options)

    def parameter_rows(self, dtype: str = "float32") -> list[Row]:
        """The sixteen parameter tensors, in the order of llm.c's files."""
        C, L = self.channels, self.num_layers

        def one(name: str, shape: tuple[int, ...], hf: str) -> Row:
            return Row(name, shape, dtype, decay=len(shape) == 2, hf_name=f"transformer.{hf}")

        def stack(name: str, shape: tuple[int, ...], hf: str) -> Row:
            # Hugging Face's GPT-2 keeps these matrices as Conv1D weights, (in, out).
            matrix = len(shape) == 2
            return Row(name, shape, dtype, L, matrix, f"transformer.h.{{layer}}.{hf}", transpose=matrix)

        return [
            one("wte", (self.padded_vocab_size, C), "wte.weight"),
            one("wpe", (self.max_seq_len, C), "wpe.weight"),
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

    def activation_rows(self, B: int, T: int, dtype: str = "float32", recompute: str = "none") -> list[Row]:
        """What the forward pass reads and keeps, and the one buffer the backward pass adds.

        `residual` is the stream before each layer (and after the last), `middle` the stream between a
        layer's two branches.  Per token and layer 16 C are kept with `recompute` "none", 12 C with "gelu", 10 C with
        "gelu+norm", C with "block"; what is recomputed has room for one layer.  ConfigError for another mode, or if
        T exceeds the model's longest sequence.
        """
        self._check_activations(T, recompute)
        C, L, H = self.channels, self.num_layers, self.num_heads
        numbers = statistics(dtype)

        def layers(name: str, *shape: int, dtype: str = dtype) -> Row:
            return Row(name, shape, dtype, 0 if name in RECOMPUTED[recompute] else L)

        return [
            Row("tokens", (B, T), "int32"),
            Row("targets", (B, T), "int32"),
            Row("positions", (B,), "int32"),  # 0
            Row("residual", (B, T, C), dtype, L + 1),
            layers("ln1", B, T, C),
            layers("ln1_mean", B, T, dtype=numbers),
            layers("ln1_rstd", B, T, dtype=numbers),
            layers("qkv", B, T, 3 * C),
            layers("atty", B, T, C),
            layers("lse", B, H, T, dtype=numbers),
            layers("middle", B, T, C),
            layers("ln2", B, T, C),
            layers("ln2_mean", B, T, dtype=numbers),
            layers("ln2_rstd", B, T, dtype=numbers),
            layers("fch", B, T, 4 * C),
            layers("fch_gelu", B, T, 4 * C),
            Row("lnf", (B, T, C), dtype),
            Row("lnf_mean", (B, T), numbers),
            Row("lnf_rstd", (B, T), numbers),
            Row("losses", (B, T), numbers),
            Row("dresidual", (B, T, C), dtype),
        ]

    def cache_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        shape = (B, T, self.channels)
        return [Row("keys", shape, dtype, self.num_layers), Row("values", shape, dtype, self.num_layers)]

    def decode_rows(self, B: int, T: int, dtype: str = "float32") -> list[Row]:
        C, numbers = self.channels, statistics(dtype)
        return [
            Row("tokens", (B, T), "int32"),
            Row("positions", (B,), "int32"),
            Row("residual", (B, T, C), dtype),
            Row("norm", (B, T, C), dtype),
            Row("branch", (B, T, C), dtype),
            Row("mean", (B, T), numbers),
            Row("rstd", (B, T), numbers),
            Row("qkv", (B, T, 3 * C), dtype),
            Row("atty", (B, T, C), dtype),
            Row("fch", (B, T, 4 * C), dtype),
            Row("fch_gelu", (B, T, 4 * C), dtype),
            Row("last", (B, 1, C), dtype),
            Row("logits", (B, 1, self.vocab_size), dtype),
        ]

    def initial(self, row: Row) -> float:
        """N(0, 0.02) for matrices, the two projections into the residual stream scaled by 1/sqrt(2L), biases 0, norm
        weights 1."""
        if len(row.shape) == 1:
            return 1.0 if row.name in ("ln1w", "ln2w", "lnfw") else 0.0
        return model.scaled_std(self.num_layers) if row.name in ("attprojw", "fcprojw") else INIT_STD


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


class GPT2(model.Model):
    """GPT-2 over a backend; what its attributes and methods are `model.Model` says."""

    config: Config

    # ---- forward -----------------------------------------------------------------------------------

    def _body(self) -> None:
        ops, p, a = self.ops, self.weights, self._acts
        ops.embedding_forward(a.residual[0], a.tokens, a.positions, p.wte, p.wpe, self.config.vocab_size, 1.0)
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
        ops.attention_forward(x.atty, x.lse, x.qkv, self._scale, 0, 0.0)
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

    @property
    def _scale(self) -> float:
        return 1.0 / math.sqrt(self.config.head_size)

    # ---- backward ----------------------------------------------------------------------------------

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
            ops.attention_backward(dqkv, datty, x.qkv, x.atty, x.lse, self._scale, 0, 0.0)
            ops.linear_backward(x.ln1, d.qkvw, d.qkvb, dqkv, x.ln1, w.qkvw, acc)
            ops.layernorm_backward(
                dresidual, d.ln1w, d.ln1b, x.ln1, x.residual, x.ln1_mean, x.ln1_rstd, w.ln1w, acc
            )
        if not self.frozen:
            ops.embedding_backward(g.wte, g.wpe, dresidual, a.tokens, 1.0, acc)

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

    def _decode_pass(self, s: Arena, cache: Cache) -> None:
        ops, p, L = self.ops, self.weights, self.config.num_layers
        ops.embedding_forward(s.residual, s.tokens, s.positions, p.wte, p.wpe, self.config.vocab_size, 1.0)
        first = p.layer(0)
        ops.layernorm_forward(s.norm, s.mean, s.rstd, s.residual, first.ln1w, first.ln1b, LAYERNORM_EPS)
        for i in range(L):
            w, kv = p.layer(i), cache.layer(i)
            ops.linear_forward(s.qkv, s.norm, w.qkvw, w.qkvb)
            ops.attention_decode(
                s.atty, kv.keys, kv.values, s.qkv, s.positions, self.config.num_heads, self._scale, 0, 0.0
            )
            ops.linear_forward(s.branch, s.atty, w.attprojw, w.attprojb)
            ops.residual_layernorm_forward(
                s.residual, s.norm, s.mean, s.rstd, s.residual, s.branch, w.ln2w, w.ln2b, LAYERNORM_EPS
            )
            ops.linear_gelu_forward(s.fch_gelu, s.fch, s.norm, w.fcw, w.fcb)
            ops.linear_forward(s.branch, s.fch_gelu, w.fcprojw, w.fcprojb)
            if i + 1 == L:
                ops.residual_forward(s.residual, s.residual, s.branch)
                return
            v = p.layer(i + 1)
            ops.residual_layernorm_forward(
                s.residual, s.norm, s.mean, s.rstd, s.residual, s.branch, v.ln1w, v.ln1b, LAYERNORM_EPS
            )

    def _last_norm(self, out: Array, x: Array, s: Arena) -> None:
        w = self.weights
        self.ops.layernorm_forward(out, s.mean[:1, :1], s.rstd[:1, :1], x, w.lnfw, w.lnfb, LAYERNORM_EPS)
