"""What `llmc bench kernels` calls: every op of the contract at the shapes that it has in a training step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc import costs
from llmc.arena import Array
from llmc.costs import Cost
from llmc.gpt2 import LAYERNORM_EPS, Config

SOFTCAP = 50.0  # Gemma 2's
RANK = 16  # of an adapter

# How every benchmark trains, those of bench/ too: AdamW with decay on matrices.
LEARNING_RATE = 1e-4
RECIPE: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@dataclass(frozen=True)
class Case:
    """One op at one shape: a function and its arguments, and what a call costs."""

    op: str
    shape: str
    dtype: str
    cost: Cost
    function: Callable[..., Any] = field(repr=False)
    args: tuple[Any, ...] = field(repr=False, default=())

    def call(self) -> None:
        self.function(*self.args)

    def copies(self, backend: Any, count: int) -> list[tuple[Any, ...]]:
        """So many sets of arguments: these, and others of the same values in memory of their own.  An array that is
        two arguments is two of each set."""
        return [self.args, *(self._copy(backend) for _ in range(count - 1))]

    def _copy(self, backend: Any) -> tuple[Any, ...]:
        made: dict[int, Array] = {}

        def copied(value: Any) -> Any:
            if not hasattr(value, "nbytes"):
                return value
            if id(value) not in made:
                made[id(value)] = backend.empty(value.shape, value.dtype.name)
                # Ids go by way of the host, so that their range is known.
                made[id(value)][...] = np.asarray(value) if value.dtype == np.int32 else value
            return made[id(value)]

        return tuple(copied(value) for value in self.args)


def cases(backend: Any, config: Config, B: int, T: int, dtype: str) -> Iterator[Case]:
    """Every op of the contract at the shapes of a training step (decoding ops at theirs), and a linear layer's three
    products one by one.

    Only the arrays of a few related ops exist at a time, if the caller lets go of a case before it asks for the next:
    these ops are a generator of their own, and its locals end with it.
    """
    random, streams, storage = np.random.default_rng(0), itertools.count(), backend.info()["storage"]
    C, H, V, Vp, maxT = (
        config.channels, config.num_heads, config.vocab_size, config.padded_vocab_size, config.max_seq_len
    )  # fmt: skip
    columns = V if backend.info()["device"] == "cpu" else Vp  # a GPU multiplies whole rows of 16 bytes
    layers = {"qkv": (C, 3 * C), "attproj": (C, C), "fc": (C, 4 * C), "fcproj": (4 * C, C), "head": (C, columns)}
    D, G = C // H, next(G for G in range(max(H // 3, 1), 0, -1) if H % G == 0)
    tokens, wide, heads = f"{B}x{T}x{C}", f"{B}x{T}x{4 * C}", f"{B}x{T}x{C}, {H} heads"
    grouped = f"{B}x{T}x{C}, {H}/{G} heads"
    variant = f"{grouped}, window {T // 2}, soft-cap"

    def new(*shape: int, scale: float = 1.0) -> Array:
        """In the memory that arenas have: in huge pages where there are any, without which a large table waits for
        page tables more than for itself."""
        out = blank(*shape, dtype=storage)
        backend.normal(out, 0, next(streams), scale)
        return out

    def blank(*shape: int, dtype: str = "float32") -> Array:
        out: Array = backend.empty(shape, dtype)
        return out

    def narrow(w: Array) -> Array:
        out = blank(*w.shape, dtype="bfloat16")
        backend.copy(out, w)
        return out

    def number(*values: float) -> Array:
        out: Array = backend.empty((len(values),), "float64")
        out[...] = values
        return out

    def case(op: str, size: str, *args: Any) -> Case:
        cost = costs.cost(op, dict(zip(costs.PARAMETERS[op], args, strict=True)))
        return Case(op, size, dtype, cost, getattr(backend, op), args)

    def ids() -> Array:
        out: Array = backend.empty((B, T), "int32")
        out[...] = random.integers(V, size=(B, T))
        return out

    def starts(count: int, place: int = 0) -> Array:
        out: Array = backend.empty((count,), "int32")
        out[...] = np.full(count, place, np.int32)
        return out

    def products(name: str) -> Iterator[Case]:
        K, N = layers[name]
        x, w, y = new(B * T, K), new(N, K), new(B * T, N)
        for use, shape, a, b in (("forward", y.shape, x, w), ("dx", x.shape, y, w), ("dw", w.shape, y, x)):
            out = blank(*shape, dtype=storage)
            cost = Cost(
                2.0 * B * T * K * N, float(a.nbytes + b.nbytes), float(out.nbytes), (2, 1, 0),
                float(a.nbytes + b.nbytes + out.nbytes),
            )  # fmt: skip
            size = f"{name} {K} -> {N}, {B}x{T}"
            yield Case(f"product_{use}", size, dtype, cost, backend.product, (use, out, a, b))
            del out

    def embedding() -> Iterator[Case]:
        x, dout, i = new(B, T, C), new(B, T, C), ids()
        wte, wpe, dwte, dwpe = new(Vp, C, scale=0.02), new(maxT, C), new(Vp, C), new(maxT, C)
        yield case("embedding_forward", tokens, x, i, starts(B), wte, wpe, V, 1.0)
        yield case("embedding_backward", tokens, dwte, dwpe, dout, i, 1.0, False)

    def rows() -> Iterator[Case]:
        x, dx, dout, total = new(B, T, C), new(B, T, C), new(B, T, C), new(B, T, C)
        w, b, dw, db = new(C), new(C), new(C), new(C)
        mean, rstd = blank(B, T), blank(B, T)
        rstd[...] = 1.0
        yield case("layernorm_forward", tokens, dx, mean, rstd, x, w, b, LAYERNORM_EPS)
        yield case("layernorm_backward", tokens, dx, dw, db, dout, x, mean, rstd, w, False)
        yield case("residual_forward", tokens, dx, x, dx)  # in place, as decoding does it
        yield case("residual_layernorm_forward", tokens, total, dx, mean, rstd, x, total, w, b, LAYERNORM_EPS)

        yield case("rmsnorm_forward", tokens, dx, rstd, x, w, LAYERNORM_EPS, 0.0)
        yield case("rmsnorm_backward", tokens, dx, dw, dout, x, rstd, w, 0.0, False)
        yield case("residual_rmsnorm_forward", tokens, total, dx, rstd, x, total, w, LAYERNORM_EPS, 0.0)

    def turning() -> Iterator[Case]:
        qkv, table = new(B, T, (H + 2 * G) * D), blank(maxT, D)
        table[...] = 0.5**0.5  # an eighth of a turn for each pair: numbers stay as large as they are
        yield case("rope_forward", grouped, qkv, starts(B), table, H + G)
        yield case("rope_backward", grouped, qkv, table, H + G)

    def gelu() -> Iterator[Case]:
        pre, act, dact = new(B, T, 4 * C), new(B, T, 4 * C), new(B, T, 4 * C)
        yield case("gelu_forward", wide, act, pre)
        yield case("gelu_backward", wide, dact, dact, pre)

    def gates() -> Iterator[Case]:
        both, dboth, one = new(B, T, 8 * C), new(B, T, 8 * C), new(B, T, 4 * C)
        for op in ("swiglu", "geglu"):
            yield case(f"{op}_forward", wide, one, both)
            yield case(f"{op}_backward", wide, dboth, one, both)

    def linear(name: str) -> Iterator[Case]:
        K, N = layers[name]
        x, y, w, b = new(B, T, K), new(B, T, N), new(N, K), new(N)
        yield case("linear_forward", f"{K} -> {N}, {B}x{T}", y, x, w, b)
        dx, dw, db = new(B, T, K), new(N, K), new(N)
        yield case("linear_backward", f"{K} -> {N}, {B}x{T}", dx, dw, db, y, x, w, False)
        yield case("linear_backward", f"{K} -> {N}, {B}x{T}, w untrained", dx, None, None, y, x, w, False)

    def adapter() -> Iterator[Case]:
        K, N = layers["qkv"]
        x, y, hidden, dhidden = new(B, T, K), new(B, T, N), new(B, T, RANK), new(B, T, RANK)
        a, b, da, db, dx = new(RANK, K), new(N, RANK), new(RANK, K), new(N, RANK), new(B, T, K)
        size = f"{K} -> {RANK} -> {N}, {B}x{T}"
        yield case("lora_forward", size, y, hidden, x, a, b, 1.0, 0)
        yield case("lora_backward", size, da, db, dhidden, y, hidden, x, b, 1.0, 0, False)
        yield case("lora_backward_input", size, dx, dhidden, a)

    def linear_gelu() -> Iterator[Case]:
        x, pre, act, w, b = new(B, T, C), new(B, T, 4 * C), new(B, T, 4 * C), new(4 * C, C), new(4 * C)
        yield case("linear_gelu_forward", f"{C} -> {4 * C}, {B}x{T}", act, pre, x, w, b)
        back, dw, db = new(C, 4 * C), new(C, 4 * C), new(C)  # the layer that reads what GELU gives
        yield case("gelu_linear_backward", f"{4 * C} -> {C}, {B}x{T}", act, dw, db, x, pre, act, back, False)

    def attention() -> Iterator[Case]:
        out, dout, lse = new(B, T, C), new(B, T, C), blank(B, H, T)
        plain = (heads, 3 * C, 0, 0.0)  # GPT-2's; and all that others add to it
        for size, width, window, softcap in (plain, (variant, (H + 2 * G) * D, T // 2, SOFTCAP)):
            qkv, dqkv = new(B, T, width), new(B, T, width)
            yield case("attention_forward", size, out, lse, qkv, D**-0.5, window, softcap)
            yield case("attention_backward", size, dqkv, dout, qkv, out, lse, D**-0.5, window, softcap)
            del qkv, dqkv

    def decoding() -> Iterator[Case]:
        out, last, size = new(1, 1, C), starts(1, maxT - 1), f"1 token after {maxT - 1}"
        for groups, what in ((H, size), (G, f"{size}, {H}/{G} heads")):
            keys, values, qkv = new(1, maxT, groups * D), new(1, maxT, groups * D), new(1, 1, (H + 2 * groups) * D)
            yield case("attention_decode", what, out, keys, values, qkv, last, H, D**-0.5, 0, 0.0)
            del keys, values, qkv
        x, y, w = new(1, 1, C), new(1, 1, 4 * C), new(4 * C, C)
        yield case("linear_forward", f"{C} -> {4 * C}, 1x1", y, x, w, None)
        if storage == "float32" and backend.info()["device"] == "cpu":
            yield case("linear_forward", f"{C} -> {4 * C}, 1x1, w bfloat16", y, x, narrow(w), None)

    def head() -> Iterator[Case]:
        losses, x, wte, i = blank(B, T), new(B, T, C), new(Vp, C, scale=0.02), ids()
        yield case("head_loss", f"{tokens}, loss alone", losses, None, None, x, wte, i, V, 1.0, 0.0, False)
        dx, dwte = new(B, T, C), new(Vp, C)
        each = 1.0 / (B * T)
        yield case("head_loss", f"{tokens}, with gradients", losses, dx, dwte, x, wte, i, V, each, 0.0, False)
        yield case("head_loss", f"{tokens}, soft-cap", losses, dx, dwte, x, wte, i, V, each, SOFTCAP, False)
        yield case("sum_losses", f"{B}x{T}", number(0.0), losses, each, False)
        if hasattr(backend, "classifier"):  # of a GPU, where memory bounds it
            rows = new(B * T, Vp)
            cost = Cost(0.0, float(rows.nbytes), float(rows.nbytes), (0, 0, 1), float(rows.nbytes))
            args = (rows, losses, i, V, each)
            yield Case("classifier", f"{B * T}x{Vp}", dtype, cost, backend.classifier, args)
            del rows, args
        logits, one = blank(1, 1, V, dtype=storage), new(1, 1, C)
        yield case("head_logits", f"1x1x{C}, V={V}", logits, one, wte, V, 0.0)
        if storage == "float32" and backend.info()["device"] == "cpu":
            yield case("head_logits", f"1x1x{C}, V={V}, w bfloat16", logits, one, narrow(wte), V, 0.0)

    def update() -> Iterator[Case]:
        n = Vp * C
        w, dw = blank(n), new(n)  # w: the masters, where what layers read is a copy of them
        backend.normal(w, 0, next(streams), 0.02)
        m, v = blank(n), blank(n)
        copy = None if storage == "float32" else blank(n, dtype=storage)
        norm, scale, spans = number(0.0), number(1.0), ((0, n, RECIPE["weight_decay"]),)
        yield case("global_norm", f"{Vp}x{C}", norm, dw)
        yield case("clip_scale", "1", scale, norm, number(1.0), 1.0)
        yield case(
            "adamw_step", f"{Vp}x{C}", w, m, v, dw, copy, number(LEARNING_RATE, 10.0), scale, spans, RECIPE["beta1"],
            RECIPE["beta2"], RECIPE["eps"], 0,
        )  # fmt: skip
        yield case("copy", f"{Vp}x{C}", m if copy is None else copy, w)
        yield case("zero", f"{Vp}x{C}", dw)
        yield case("normal", f"{Vp}x{C}", dw, 0, 0, 0.02)

    for name in layers:
        yield from products(name)
    yield from embedding()
    yield from rows()
    yield from turning()
    yield from gelu()
    yield from gates()
    for name in ("qkv", "attproj", "fcproj"):
        yield from linear(name)
    yield from linear_gelu()
    yield from adapter()
    yield from attention()
    yield from decoding()
    yield from head()
    yield from update()
