"""Llama (Touvron et al. 2023; Llama 3: Dubey et al. 2024) and what is built like it: TinyLlama, Mistral (Jiang et al.
2023: a sliding window), Qwen 2.5 (biases in qkv).  Its numbers and tables, and three pages - forward, backward, decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from llmc import model, rotary
from llmc.arena import Arena, Array, Row
from llmc.errors import ConfigError
from llmc.model import INIT_STD, Cache, statistics
from llmc.ops import Ops
from llmc.rotary import Scaling

# What is recomputed, by mode: these rows of `activation_rows` exist once and not per layer.
_NORMS = ("ln1", "ln1_rstd", "ln2", "ln2_rstd")
RECOMPUTED = {
    "none": (),
    "gelu": ("gated",),
    "gelu+norm": ("gated", *_NORMS),
    "block": ("gated", *_NORMS, "qkv", "atty", "lse", "middle", "gateup"),
}


@dataclass(frozen=True)
class Config(model.Config):
    """The numbers that define a Llama.  Raises ConfigError where they do not fit together."""

    max_seq_len: int = 2048
    vocab_size: int = 32000
    num_layers: int = 22
    num_heads: int = 32  # H
    channels: int = 2048  # C
    num_kv_heads: int = 4  # G
    head_size: int = 64  # D
    hidden: int = 5632  # F
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    window: int = 0  # tokens that a token sees, itself included; 0: all before it
    eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    BACKWARD: ClassVar[tuple[str, ...]] = ("dresidual", "datty", "dqkv")

    def __post_init__(self) -> None:
        self._positive(
            "max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "num_kv_heads", "head_size", "hidden"
        )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError("num_heads", f"{self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_size % 2:
            raise ConfigError("head_size", f"{self.head_size} is odd: channels are turned in pairs")
        if self.window < 0:
            raise ConfigError("window", f"must be at least 0, got {self.window}")
        for name in ("rope_theta", "eps"):
            if not getattr(self, name) > 0 or math.isinf(getattr(self, name)):
                raise ConfigError(name, f"must be a number above 0, got {getattr(self, name)}")

    @property
    def qkv_channels(self) -> int:
        """(H + 2 G) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    def build(self, ops: Ops, **options: Any) -> Llama:
        return Llama(self, ops, **options)

    def parameter_rows(self, dtype: str = "float32") -> list[Row]:
        """wte, seven tensors per layer (eight with biases), the last norm and, unless tied, the head."""
        C, F, L, D = self.channels, self.hidden, self.num_layers, self.head_size
        Q, KV, Vp = self.num_heads * D, self.num_kv_heads * D, self.padded_vocab_size
        layer = "model.layers.{layer}."
        q, k, v = (f"{layer}self_attn.{name}_proj" for name in "qkv")

        def stack(name: str, shape: tuple[int, ...], hf: Any) -> Row:
            return Row(name, shape, dtype, L, len(shape) == 2, f"{layer}{hf}" if isinstance(hf, str) else hf)

        biases = ((f"{q}.bias", Q), (f"{k}.bias", KV), (f"{v}.bias", KV))
        return [
            Row("wte", (Vp, C), dtype, decay=True, hf_name="model.embed_tokens.weight"),
            stack("ln1w", (C,), "input_layernorm.weight"),
            stack("qkvw", (Q + 2 * KV, C), ((f"{q}.weight", Q), (f"{k}.weight", KV), (f"{v}.weight", KV))),
            *([stack("qkvb", (Q + 2 * KV,), biases)] if self.qkv_bias else []),
            stack("attprojw", (C, Q), "self_attn.o_proj.weight"),
            stack("ln2w", (C,), "post_attention_layernorm.weight"),
            stack("gateupw", (2 * F, C), tuple((f"{layer}mlp.{name}_proj.weight", F) for name in ("gate", "up"))),
            stack("downw", (C, F), "mlp.down_proj.weight"),
            Row("lnfw", (C,), dtype, hf_name="model.norm.weight"),
            *([] if self.tied else [Row("head", (Vp, C), dtype, decay=True, hf_name="lm_head.weight")]),
        ]

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
            Row("last", (B, 1, C), dtype),
            Row("logits", (B, 1, self.vocab_size), dtype),
        ]

    def layer_window(self, layer: int) -> int:
        return self.window

    def initial(self, row: Row) -> float:
        """N(0, 0.02) for matrices, the two projections into the residual stream scaled by 1/sqrt(2L) as in GPT-2,
        biases 0, norm weights 1."""
        if len(row.shape) == 1:
            return 0.0 if row.name == "qkvb" else 1.0
        return model.scaled_std(self.num_layers) if row.name in ("attprojw", "downw") else INIT_STD


LLAMA3 = Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)
LLAMA32 = Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)

PRESETS = {
    "llama-tiny": Config(64, 257, 2, 2, 32, num_kv_heads=1, head_size=16, hidden=88, tied=True),
    "llama-stories": Config(256, 257, 4, 4, 128, num_kv_heads=2, head_size=32, hidden=408, tied=True),
    "mistral-stories": Config(256, 257, 4, 4, 128, num_kv_heads=2, head_size=32, hidden=408, tied=True, window=64),
    "tinyllama-1.1b": Config(),
    "llama-2-7b": Config(4096, 32000, 32, 32, 4096, num_kv_heads=32, head_size=128, hidden=11008),
    "llama-3-8b": Config(
        8192, 128256, 32, 32, 4096, num_kv_heads=8, head_size=128, hidden=14336, rope_theta=500000.0
    ),
    "llama-3.1-8b": Config(
        131072, 128256, 32, 32, 4096, num_kv_heads=8, head_size=128, hidden=14336, rope_theta=500000.0,
        rope_scaling=LLAMA3,
    ),
    "llama-3.2-1b": Config(
        131072, 128256, 16, 32, 2048, num_kv_heads=8, head_size=64, hidden=8192, rope_theta=500000.0,
        rope_scaling=LLAMA32, tied=True,
    ),
    "llama-3.2-3b": Config(
        131072, 128256, 28, 24, 3072, num_kv_heads=8, head_size=128, hidden=8192, rope_theta=500000.0,
        rope_scaling=LLAMA32, tied=True,
    ),
    "mistral-7b": Config(
        32768, 32000, 32, 32, 4096, num_kv_heads=8, head_size=128, hidden=14336, window=4096
    ),
    "qwen-2.5-0.5b": Config(
        32768, 151936, 24, 14, 896, num_kv_heads=2, head_size=64, hidden=4864, rope_theta=1000000.0, eps=1e-6,
        tied=True, qkv_bias=True,
    ),
}  # fmt: skip


class Llama(model.Model):
    """A Llama over a backend; what its attributes and methods are `model.Model` says."""

    config: Config

    def _constants(self, arena: Arena) -> None:
        c = self.config
        arena.rope[...] = rotary.table(c.rope_theta, c.head_size, len(arena.rope), c.rope_scaling)

    @property
    def _attention(self) -> tuple[float, int, float]:
        """Scale, window and soft-cap of attention."""
        return 1.0 / math.sqrt(self.config.head_size), self.config.window, 0.0

    # ---- forward -----------------------------------------------------------------------------------

    def _body(self) -> None:
        ops, p, a = self.ops, self.weights, self._acts
        ops.embedding_forward(a.residual[0], a.tokens, a.positions, p.wte, None, self.config.vocab_size, 1.0)
        self._first_norm(a, 0)
        for i in range(self.config.num_layers):
            self._layer_forward(a, i)

    def _first_norm(self, a: Arena, i: int) -> None:
        x = a.layer(i)
        self.ops.rmsnorm_forward(x.ln1, x.ln1_rstd, x.residual, self.weights.layer(i).ln1w, self.config.eps, 0.0)

    def _layer_forward(self, a: Arena, i: int, output: bool = True) -> None:
        """Layer i, from ln1 to residual[i + 1] and the norm that follows it, the next layer's or the last; without
        `output` only as far as its backward pass reads."""
        ops, c, w, x = self.ops, self.config, self.weights.layer(i), a.layer(i)
        ops.linear_forward(x.qkv, x.ln1, w.qkvw, w.qkvb if c.qkv_bias else None)
        ops.rope_forward(x.qkv, a.positions, a.rope, c.num_heads + c.num_kv_heads)
        ops.attention_forward(x.atty, x.lse, x.qkv, *self._attention)
        ops.linear_forward(x.middle, x.atty, w.attprojw, None)
        ops.residual_rmsnorm_forward(x.middle, x.ln2, x.ln2_rstd, x.residual, x.middle, w.ln2w, c.eps, 0.0)
        ops.linear_forward(x.gateup, x.ln2, w.gateupw, None)
        ops.swiglu_forward(x.gated, x.gateup)
        if not output:
            return
        after = a.layer(i + 1)
        ops.linear_forward(after.residual, x.gated, w.downw, None)
        if i + 1 < c.num_layers:
            norm, scale = (after.ln1, after.ln1_rstd), self.weights.layer(i + 1).ln1w
        else:
            norm, scale = (a.lnf, a.lnf_rstd), w.lnfw
        ops.residual_rmsnorm_forward(after.residual, *norm, x.middle, after.residual, scale, c.eps, 0.0)

    # ---- backward ----------------------------------------------------------------------------------

    def _backward_pass(self, acc: bool) -> None:
        ops, c, p, g, a = self.ops, self.config, self.weights, self._gradients(), self._acts
        dresidual, datty, dqkv = a.dresidual, a.datty, a.dqkv

        ops.zero(dresidual)
        final = a.layer(c.num_layers).residual
        ops.rmsnorm_backward(dresidual, g.lnfw, a.lnf, final, a.lnf_rstd, p.lnfw, 0.0, acc)
        for i in reversed(range(c.num_layers)):
            w, d, x = p.layer(i), g.layer(i), a.layer(i)
            self._layer_again(a, i)
            ops.linear_backward(x.gated, d.downw, None, dresidual, x.gated, w.downw, acc)
            ops.swiglu_backward(x.gateup, x.gated, x.gateup)
            ops.linear_backward(x.ln2, d.gateupw, None, x.gateup, x.ln2, w.gateupw, acc)
            ops.rmsnorm_backward(dresidual, d.ln2w, x.ln2, x.middle, x.ln2_rstd, w.ln2w, 0.0, acc)
            ops.linear_backward(datty, d.attprojw, None, dresidual, x.atty, w.attprojw, acc)
            ops.attention_backward(dqkv, datty, x.qkv, x.atty, x.lse, *self._attention)
            ops.rope_backward(dqkv, a.rope, c.num_heads + c.num_kv_heads)
            ops.linear_backward(x.ln1, d.qkvw, d.qkvb if c.qkv_bias else None, dqkv, x.ln1, w.qkvw, acc)
            ops.rmsnorm_backward(dresidual, d.ln1w, x.ln1, x.residual, x.ln1_rstd, w.ln1w, 0.0, acc)
        if self.frozen:
            return
        if not c.tied and not acc:  # else the head has written it
            ops.zero(g.wte)
        ops.embedding_backward(g.wte, None, dresidual, a.tokens, 1.0, acc)

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
            ops.swiglu_forward(x.gated, x.gateup)
        if self.recompute == "gelu+norm":
            ops.rmsnorm_forward(x.ln2, x.ln2_rstd, x.middle, w.ln2w, c.eps, 0.0)

    # ---- decode ------------------------------------------------------------------------------------

    def _decode_pass(self, s: Arena, cache: Cache) -> None:
        ops, c, p = self.ops, self.config, self.weights
        ops.embedding_forward(s.residual, s.tokens, s.positions, p.wte, None, c.vocab_size, 1.0)
        ops.rmsnorm_forward(s.norm, s.rstd, s.residual, p.layer(0).ln1w, c.eps, 0.0)
        for i in range(c.num_layers):
            w, kv = p.layer(i), cache.layer(i)
            ops.linear_forward(s.qkv, s.norm, w.qkvw, w.qkvb if c.qkv_bias else None)
            ops.rope_forward(s.qkv, s.positions, kv.rope, c.num_heads + c.num_kv_heads)
            ops.attention_decode(s.atty, kv.keys, kv.values, s.qkv, s.positions, c.num_heads, *self._attention)
            ops.linear_forward(s.branch, s.atty, w.attprojw, None)
            ops.residual_rmsnorm_forward(s.residual, s.norm, s.rstd, s.residual, s.branch, w.ln2w, c.eps, 0.0)
            ops.linear_forward(s.gateup, s.norm, w.gateupw, None)
            ops.swiglu_forward(s.gated, s.gateup)
            ops.linear_forward(s.branch, s.gated, w.downw, None)
            if i + 1 == c.num_layers:
                ops.residual_forward(s.residual, s.residual, s.branch)
                return
            after = p.layer(i + 1).ln1w
            ops.residual_rmsnorm_forward(s.residual, s.norm, s.rstd, s.residual, s.branch, after, c.eps, 0.0)

    def _last_norm(self, out: Array, x: Array, s: Arena) -> None:
        self.ops.rmsnorm_forward(out, s.rstd[:1, :1], x, self.weights.lnfw, self.config.eps, 0.0)
