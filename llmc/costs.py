"""What a call of an op costs at the least: floating-point operations, and bytes to and from memory.

A product of M x K and K x N counts 2 M N K, a linear layer's backward pass two such products.  Causal attention counts
the T (T + 1) / 2 scores that are not masked, in two products forward and five backward.  Everything else that an op
computes is not counted.  Bytes are those of every argument once for reading and once for writing, however often an op
comes back to them; of a table, the rows in use; of an update, the spans.  A cache may spare an op even these, or cost
it more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.arena import Array
from llmc.ops import Ops

# What each op does to its array arguments: reads (r), writes (w), updates in place (u); overwrites, or updates if
# `accumulate` (s).
ROLES: dict[str, dict[str, str]] = {
    "zero": {"x": "w"},
    "copy": {"out": "w", "x": "r"},
    "normal": {"out": "w"},
    "embedding_forward": {"out": "w", "tokens": "r", "wte": "r", "wpe": "r"},
    "embedding_backward": {"dwte": "u", "dwpe": "s", "dout": "r", "tokens": "r"},
    "layernorm_forward": {"out": "w", "mean": "w", "rstd": "w", "x": "r", "w": "r", "b": "r"},
    "layernorm_backward": {
        "dx": "u", "dw": "s", "db": "s", "dout": "r", "x": "r", "mean": "r", "rstd": "r", "w": "r",
    },
    "residual_layernorm_forward": {
        "total": "w", "out": "w", "mean": "w", "rstd": "w", "x": "r", "branch": "r", "w": "r", "b": "r",
    },
    "linear_forward": {"out": "w", "x": "r", "w": "r", "b": "r"},
    "linear_backward": {"dx": "w", "dw": "s", "db": "s", "dout": "r", "x": "r", "w": "r"},
    "linear_gelu_forward": {"out": "w", "pre": "w", "x": "r", "w": "r", "b": "r"},
    "gelu_linear_backward": {"dpre": "w", "dw": "s", "db": "s", "dout": "r", "pre": "r", "x": "r", "w": "r"},
    "gelu_forward": {"out": "w", "x": "r"},
    "gelu_backward": {"dx": "w", "dout": "r", "x": "r"},
    "residual_forward": {"out": "w", "x": "r", "branch": "r"},
    "attention_forward": {"out": "w", "lse": "w", "qkv": "r"},
    "attention_backward": {"dqkv": "w", "dout": "r", "qkv": "r", "out": "r", "lse": "r"},
    "attention_decode": {"out": "w", "keys": "r", "values": "r", "qkv": "r"},
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


def _scores(a: Arguments) -> float:
    """FLOPs of one product of causal attention."""
    B, T, C = a["out"].shape
    return float(B * T * (T + 1) * C)


def _linear(a: Arguments) -> float:
    return 2.0 * a["x"].size * a["w"].shape[0]


def _head(a: Arguments) -> float:
    return 2.0 * a["x"].size * a["V"]


def _decode(a: Arguments) -> float:
    B, T, C = a["out"].shape
    return 4.0 * B * C * (T * a["position"] + T * (T + 1) / 2)


FLOPS: dict[str, Callable[[Arguments], float]] = {
    "linear_forward": _linear,
    "linear_backward": lambda a: 2 * _linear(a),
    "linear_gelu_forward": _linear,
    "gelu_linear_backward": lambda a: 2 * _linear(a),
    "attention_forward": lambda a: 2 * _scores(a),
    "attention_backward": lambda a: 5 * _scores(a),
    "attention_decode": _decode,
    "head_loss": lambda a: _head(a) * (1 if a["dx"] is None else 3),
    "head_logits": _head,
}


def _nbytes(op: str, name: str, a: Arguments) -> float:
    """Bytes of an argument that the op touches."""
    value = a[name]
    if name in ("wte", "dwte"):
        return a["tokens"].size * value.shape[1] * value.itemsize
    if name == "wpe":
        return a["tokens"].shape[1] * value.shape[1] * value.itemsize
    if name == "dwpe" and a["accumulate"]:
        return a["tokens"].shape[1] * value.shape[1] * value.itemsize
    if name == "w" and "V" in a:
        return a["V"] * value.shape[1] * value.itemsize
    if "spans" in a and name not in ("hyper", "scale"):
        return sum(stop - start for start, stop, _ in a["spans"]) * value.itemsize
    if name in ("keys", "values"):
        B, _, C = a["out"].shape
        return B * a["position"] * C * value.itemsize
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
        given["new"], sizes["new"] = "w", 2.0 / 3.0 * arguments["qkv"].nbytes
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
    """The size by which calls of one op differ: K -> N of a layer, else ""."""
    if "linear" in op:
        N, K = arguments["w"].shape
        return f"{K} -> {N}"
    return ""
