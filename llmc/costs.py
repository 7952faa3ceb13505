"""What a call of an op costs at the least: floating-point operations, and bytes to and from memory.

A product of M x K and K x N counts 2 M N K, a linear layer's backward pass two such products, or one where the matrix
is not trained.  Attention counts the scores of the keys that are seen, T (T + 1) / 2 of each head where there is no
window, in two products forward and five backward.  Everything else that an op computes is not counted.  Bytes are those
of every argument once for reading and once for writing, however often an op comes back to them; of a table, the rows in
use, which sequences at one place share; of channels beside each other, those in use; of an update, the spans.  A cache
may spare an op even these, or cost it more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.arena import Array
from llmc.ops import Ops

# What each op does to its array arguments: reads (r), writes (w), updates in place (u); overwrites, or updates if
# `accumulate` (s).
ROLES: dict[str, dict[str, str]] = {
    "zero": {"x": "w"},
    "copy": {"out": "w", "x": "r"},
    "normal": {"out": "w"},
    "embedding_forward": {"out": "w", "tokens": "r", "positions": "r", "wte": "r", "wpe": "r"},
    "embedding_backward": {"dwte": "u", "dwpe": "s", "dout": "r", "tokens": "r"},
    "layernorm_forward": {"out": "w", "mean": "w", "rstd": "w", "x": "r", "w": "r", "b": "r"},
    "layernorm_backward": {
        "dx": "u", "dw": "s", "db": "s", "dout": "r", "x": "r", "mean": "r", "rstd": "r", "w": "r",
    },
    "residual_layernorm_forward": {
        "total": "w", "out": "w", "mean": "w", "rstd": "w", "x": "r", "branch": "r", "w": "r", "b": "r",
    },
    "rmsnorm_forward": {"out": "w", "rstd": "w", "x": "r", "w": "r"},
    "rmsnorm_backward": {"dx": "u", "dw": "s", "dout": "r", "x": "r", "rstd": "r", "w": "r"},
    "residual_rmsnorm_forward": {"total": "w", "out": "w", "rstd": "w", "x": "r", "branch": "r", "w": "r"},
    "rope_forward": {"qkv": "u", "positions": "r", "table": "r"},
    "rope_backward": {"dqkv": "u", "table": "r"},
    "linear_forward": {"out": "w", "x": "r", "w": "r", "b": "r"},
    "linear_backward": {"dx": "w", "dw": "s", "db": "s", "dout": "r", "x": "r", "w": "r"},
    "lora_forward": {"out": "u", "hidden": "w", "x": "r", "a": "r", "b": "r"},
    "lora_backward": {"da": "s", "db": "s", "dhidden": "w", "dout": "r", "hidden": "r", "x": "r", "b": "r"},
    "lora_backward_input": {"dx": "u", "dhidden": "r", "a": "r"},
    "linear_gelu_forward": {"out": "w", "pre": "w", "x": "r", "w": "r", "b": "r"},
    "gelu_linear_backward": {"dpre": "w", "dw": "s", "db": "s", "dout": "r", "pre": "r", "x": "r", "w": "r"},
    "gelu_forward": {"out": "w", "x": "r"},
    "gelu_backward": {"dx": "w", "dout": "r", "x": "r"},
    "residual_forward": {"out": "w", "x": "r", "branch": "r"},
    "swiglu_forward": {"out": "w", "x": "r"},
    "swiglu_backward": {"dx": "w", "dout": "r", "x": "r"},
    "geglu_forward": {"out": "w", "x": "r"},
    "geglu_backward": {"dx": "w", "dout": "r", "x": "r"},
    "attention_forward": {"out": "w", "lse": "w", "qkv": "r"},
    "attention_backward": {"dqkv": "w", "dout": "r", "qkv": "r", "out": "r", "lse": "r"},
    "attention_decode": {"out": "w", "keys": "r", "values": "r", "qkv": "r", "positions": "r"},
    "head_loss": {"losses": "w", "dx": "w", "dw": "s", "x": "r", "w": "r", "targets": "r"},
    "head_logits": {"logits": "w", "x": "r", "w": "r"},
    "sum_losses": {"total": "s", "losses": "r"},
    "global_norm": {"norm": "w", "x": "r"},
    "clip_scale": {"scale": "w", "norm": "r", "loss": "r"},
    "adamw_step": {"w": "u", "m": "u", "v": "u", "dw": "r", "copy": "w", "hyper": "r", "scale": "r"},
}  # fmt: skip

PARAMETERS = {op: tuple(inspect.signature(getattr(Ops, op)).parameters)[1:] for op in ROLES}
RIDGE = 2.0  # FLOP per byte: any CPU multiplies several times as much while it loads a byte
BIG = 0.25  # of an op's largest array: smaller ones do not shape its traffic

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """The least work of one call."""

    flops: float
    read: float  # bytes
    written: float  # bytes
    arrays: tuple[int, int, int] = (1, 1, 0)  # large ones read, written, and updated in place: an op's own traffic
    footprint: float = 0.0  # bytes of memory touched: read and written ones once

    @property
    def nbytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    @property
    def products(self) -> bool:
        """Whether arithmetic bounds the op, and not memory."""
        return self.flops >= RIDGE * self.nbytes and self.flops > 0

    @property
    def amount(self) -> float:
        """FLOPs or bytes, whichever bounds it."""
        return self.flops if self.products else self.nbytes

    @property
    def unit(self) -> str:
        """Of `amount` per second, in units of 10^9."""
        return "GFLOP/s" if self.products else "GB/s"


def _seen(T: int, window: int, start: int = 0) -> float:
    """Keys that T tokens see, all together, the first of them at `start`."""
    if window <= 0:
        return T * start + T * (T + 1) / 2
    growing = min(max(window - 1 - start, 0), T)  # tokens that see fewer than `window`
    return _seen(growing, 0, start) + (T - growing) * window


def _scores(a: Arguments) -> float:
    """FLOPs of one product of causal attention."""
    B, T, C = a["out"].shape
    return 2.0 * B * C * _seen(T, a["window"])


def _decode(a: Arguments) -> float:
    _, T, C = a["out"].shape
    return 4.0 * C * sum(_seen(T, a["window"], start) for start in _starts(a))


def _starts(a: Arguments) -> list[int]:
    """Where the sequences' new tokens begin; waits for a device."""
    return [int(start) for start in np.asarray(a["positions"])]


def _linear(a: Arguments) -> float:
    return 2.0 * a["x"].size * a["w"].shape[0]


def _linear_backward(a: Arguments) -> float:
    return 2.0 * a["dout"].size * a["w"].shape[1] * (1 if a["dw"] is None else 2)


def _head(a: Arguments) -> float:
    """Logits, and the gradients that are wanted."""
    return 2.0 * a["x"].size * a["V"] * sum(a.get(name, None) is not None for name in ("w", "dx", "dw"))


def _adapter(a: Arguments, products: tuple[str, ...]) -> float:
    """Products of (tokens x K), (tokens x n) or both with the rank."""
    tokens = a["hidden"].shape[0] * a["hidden"].shape[1]
    widths = {"x": a["x"].shape[2], "out": a["b"].shape[0]}
    return 2.0 * tokens * a["hidden"].shape[2] * sum(widths[name] for name in products)


FLOPS: dict[str, Callable[[Arguments], float]] = {
    "linear_forward": _linear,
    "linear_backward": _linear_backward,
    "lora_forward": lambda a: _adapter(a, ("x", "out")),
    "lora_backward": lambda a: _adapter(a, ("out", "out", "x")),
    "lora_backward_input": lambda a: 2.0 * a["dx"].size * a["a"].shape[0],
    "linear_gelu_forward": _linear,
    "gelu_linear_backward": _linear_backward,
    "attention_forward": lambda a: 2 * _scores(a),
    "attention_backward": lambda a: 5 * _scores(a),
    "attention_decode": _decode,
    "head_loss": _head,
    "head_logits": _head,
}


def _nbytes(op: str, name: str, a: Arguments) -> float:
    """Bytes of an argument that the op touches."""
    value = a[name]
    if name in ("wte", "dwte"):
        return a["tokens"].size * value.shape[1] * value.itemsize
    if name == "wpe" or (name == "dwpe" and a["accumulate"]):
        return a["tokens"].shape[1] * value.shape[1] * value.itemsize
    if "heads" in a:
        turned, table = a["qkv" if "qkv" in a else "dqkv"], a["table"]
        if name == "table":
            return turned.shape[1] * table.shape[1] * value.itemsize
        if value is turned:
            return turned.shape[0] * turned.shape[1] * a["heads"] * table.shape[1] * value.itemsize
    if "column" in a and name in ("out", "dout"):
        return a["hidden"].shape[0] * a["hidden"].shape[1] * a["b"].shape[0] * value.itemsize
    if name == "w" and "V" in a:
        return a["V"] * value.shape[1] * value.itemsize
    if "spans" in a and name not in ("hyper", "scale"):
        return sum(stop - start for start, stop, _ in a["spans"]) * value.itemsize
    if name in ("keys", "values"):  # tokens of before that the first of the new ones sees
        before = (start if a["window"] <= 0 else min(start, a["window"] - 1) for start in _starts(a))
        return sum(before) * value.shape[2] * value.itemsize
    return float(value.nbytes)


def _overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory, wherever it is."""
    begin, other = (array.ptr if hasattr(array, "ptr") else array.ctypes.data for array in (a, b))
    return bool(begin < other + b.nbytes and other < begin + a.nbytes)


def cost(op: str, arguments: Arguments) -> Cost:
    """The cost of `op` called with `arguments`, by name and all of them.  KeyError for no op of the contract.

    An output that shares its memory with an input counts as an update in place.
    """
    roles = ROLES[op]
    given = {name: role for name, role in roles.items() if arguments[name] is not None}
    if not arguments.get("accumulate", True):
        given = {name: "w" if role == "s" else role for name, role in given.items()}
    sizes = {name: _nbytes(op, name, arguments) for name in given}
    for name, role in list(given.items()):
        if role != "w" or name not in given:
            continue
        for other in [o for o, r in given.items() if r == "r"]:
            if _overlap(arguments[name], arguments[other]):
                given[name] = "u"
                del given[other]
    if op == "attention_decode":  # the new tokens' keys and values go to the cache
        B, T, _ = arguments["out"].shape
        given["new"], sizes["new"] = "w", 2.0 * B * T * arguments["keys"].shape[2] * arguments["keys"].itemsize
    largest = max(sizes[name] for name in given)
    kinds = [("u" if role == "s" else role) for name, role in given.items() if sizes[name] >= BIG * largest]
    read = sum(sizes[name] for name, role in given.items() if role != "w")
    written = sum(sizes[name] for name, role in given.items() if role != "r")
    flops = FLOPS[op](arguments) if op in FLOPS else 0.0
    return Cost(
        flops, read, written, (kinds.count("r"), kinds.count("w"), kinds.count("u")),
        sum(sizes[name] for name in given),
    )  # fmt: skip


def shape(op: str, arguments: Arguments) -> str:
    """The size by which calls of one op differ: K -> N of a layer, K -> r -> n of an adapter, else ""."""
    if "linear" in op:
        N, K = arguments["w"].shape
        return f"{K} -> {N}"
    if op == "lora_backward_input":
        r, K = arguments["a"].shape
        return f"{K} -> {r}"
    if "lora" in op:
        n, r = arguments["b"].shape
        return f"{arguments['x'].shape[2]} -> {r} -> {n}"
    return ""
