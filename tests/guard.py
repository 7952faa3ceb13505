"""Calling an op so that whatever it does wrong shows.

`flush` puts an array against a page that may be neither read nor written, at its end or at its start: one
element too far, even in a masked lane that faults, and the process dies with the test's name on the
screen.  What is left of the array's own pages holds a bit pattern that is checked afterwards, and that is
a NaN to a kernel that reads it.  Flush at the end, a float32 array is aligned to whatever its length
leaves, down to 4 bytes; the kernels must take that.

`check` calls one op of a backend with every argument placed like this, in both ways, and compares it
with the reference: outputs within a given elementwise bound, overwritten outputs filled with NaN before
so that a gap shows, inputs unmodified to the bit, nothing touched outside.

Bounds are derived, not tuned: `UNIT` is half the distance from 1 to the next float32, `summed(n)` bounds
the relative error of a sum of n products, relative to the sum of absolute values.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import reference
from numpy.random import Generator

Array = np.ndarray[Any, Any]
Arguments = dict[str, Any]

UNIT = 2.0**-24
TINY = 2.0**-148  # two of the smallest subnormal float32: what underflow may cost

FLUSHED = 2.0**-125  # what an exponential may lose absolutely: kernels need not produce subnormals there

PLACES = ("end", "start")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_PAGE = mmap.PAGESIZE
_FORBIDDEN = 0  # PROT_NONE
_FILL = 0xFF  # a NaN in every float format; -1 as a token


class Guarded:
    """An array alone on its pages, between two forbidden ones."""

    def __init__(self, array: Array, place: str) -> None:
        pages = max(-(-array.nbytes // _PAGE), 1)
        self._map = mmap.mmap(-1, (pages + 2) * _PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        for page in (0, pages + 1):
            if _libc.mprotect(whole.ctypes.data + page * _PAGE, _PAGE, _FORBIDDEN):
                raise OSError(ctypes.get_errno(), "mprotect")
        slack = pages * _PAGE - array.nbytes
        begin = _PAGE + (slack if place == "end" else 0)
        rest = _PAGE if place == "end" else begin + array.nbytes
        self.array: Array = np.ndarray(array.shape, array.dtype, self._map, begin)
        self.array[...] = array
        self._rest = whole[rest : rest + slack]
        self._rest[...] = _FILL

    def intact(self) -> bool:
        """Whether the remainder of the array's pages is as it was."""
        return bool((self._rest == _FILL).all())


def flush(array: Array, place: str) -> Array:
    """A copy of `array` that ends (or starts) where a forbidden page starts (or ends)."""
    return Guarded(array, place).array


def summed(n: int) -> float:
    """Relative error bound of a float32 sum of n terms or products, in units of `UNIT`.

    In any order and with or without FMA it is at most n (Higham 2002, section 3.1); and for rounding
    errors of mean zero at most 6 sqrt(n) in all but 1 of 10^7 cases (Higham & Mary 2019).  One more for
    the final rounding or the addition of a bias.
    """
    return min(n, 6.0 * n**0.5) + 1.0


# Which arguments an op writes: "write" overwrites all of it, "sum" does so unless `accumulate`, "update"
# starts from what is there.
OUTPUTS: dict[str, dict[str, str]] = {
    "zero": {"x": "write"},
    "copy": {"out": "write"},
    "normal": {"out": "write"},
    "embedding_forward": {"out": "write"},
    "embedding_backward": {"dwte": "update", "dwpe": "sum"},
    "layernorm_forward": {"out": "write", "mean": "write", "rstd": "write"},
    "layernorm_backward": {"dx": "update", "dw": "sum", "db": "sum"},
    "residual_layernorm_forward": {"total": "write", "out": "write", "mean": "write", "rstd": "write"},
    "rmsnorm_forward": {"out": "write", "rstd": "write"},
    "rmsnorm_backward": {"dx": "update", "dw": "sum"},
    "residual_rmsnorm_forward": {"total": "write", "out": "write", "rstd": "write"},
    "rope_forward": {"qkv": "update"},
    "rope_backward": {"dqkv": "update"},
    "linear_forward": {"out": "write"},
    "linear_backward": {"dx": "write", "dw": "sum", "db": "sum"},
    "lora_forward": {"out": "update", "hidden": "write"},
    "lora_backward": {"da": "sum", "db": "sum", "dhidden": "write"},
    "lora_backward_input": {"dx": "update"},
    "linear_gelu_forward": {"out": "write", "pre": "write"},
    "gelu_linear_backward": {"dpre": "write", "dw": "sum", "db": "sum"},
    "gelu_forward": {"out": "write"},
    "gelu_backward": {"dx": "write"},
    "residual_forward": {"out": "write"},
    "swiglu_forward": {"out": "write"},
    "swiglu_backward": {"dx": "write"},
    "geglu_forward": {"out": "write"},
    "geglu_backward": {"dx": "write"},
    "attention_forward": {"out": "write", "lse": "write"},
    "attention_backward": {"dqkv": "write"},
    "attention_decode": {"out": "write", "keys": "update", "values": "update"},
    "head_loss": {"losses": "write", "dx": "write", "dw": "sum"},
    "head_logits": {"logits": "write"},
    "sum_losses": {"total": "sum"},
    "global_norm": {"norm": "write"},
    "clip_scale": {"scale": "write"},
    "adamw_step": {"w": "update", "m": "update", "v": "update", "copy": "update"},
}


def names(op: str) -> list[str]:
    """The op's argument names, in order."""
    return list(inspect.signature(getattr(reference, op)).parameters)


def overwritten(op: str, name: str, arguments: Arguments) -> bool:
    """Whether what is in this output before the call must not matter."""
    mode = OUTPUTS[op].get(name, "")
    return mode == "write" or (mode == "sum" and not arguments["accumulate"])


def expect(op: str, arguments: Arguments) -> dict[str, Array]:
    """What the reference writes, in float64, by output name."""
    given = dict(arguments)
    results = {}
    for name in OUTPUTS[op]:
        value = given[name]
        if value is not None:
            fresh = overwritten(op, name, arguments)
            given[name] = np.full(value.shape, np.nan) if fresh else value.astype(np.float64)
            results[name] = given[name]
    getattr(reference, op)(*(given[name] for name in names(op)))
    return results


# Float32 whatever the storage type: statistics, and the optimizer's own.
STATISTICS = {"mean", "rstd", "lse", "losses", "m", "v", "table"}
BF16_UNIT, BF16_TINY = 2.0**-8, 2.0**-134  # the most that rounding to bfloat16 costs: relatively, and of a subnormal


def stored(op: str, name: str, arguments: Arguments) -> bool:
    """Whether this float32 argument is of the storage type on a device that stores another."""
    value = arguments.get(name)
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or name in STATISTICS:
        return False
    if op == "adamw_step" and name == "w":
        return arguments["copy"] is None  # else it holds the masters
    return (op, name) != ("copy", "x")


def call(
    ops: ModuleType, op: str, arguments: Arguments, place: str, alias: dict[str, str]
) -> dict[str, Array]:
    """Run one op on guarded copies; gives what it wrote, having checked that it wrote nothing else.

    `alias` maps an output to the input whose memory it shares.
    """
    guards: dict[str, Guarded] = {}
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and name not in alias:
            if overwritten(op, name, arguments):
                value = np.full(value.shape, np.nan, value.dtype)
            guards[name] = Guarded(value, place)
    passed = dict(arguments)
    for name in arguments:
        if name in guards or name in alias:
            passed[name] = guards[alias.get(name, name)].array
    getattr(ops, op)(*(passed[name] for name in names(op)))
    for name, guard in guards.items():
        assert guard.intact(), f"{op} wrote outside {name} (flush at its {place})"
        if name not in OUTPUTS[op] and name not in alias.values():
            same = guard.array.tobytes() == arguments[name].tobytes()
            assert same, f"{op} modified its input {name}"
    return {name: passed[name] for name in OUTPUTS[op] if passed[name] is not None}


def compare(op: str, name: str, found: Array, expected: Array, bound: Array | float) -> None:
    """`found` lies within `bound` of `expected`, elementwise.

    A NaN fails, unless it is expected: in the part of an updated output that holds one and is left alone.
    """
    error = np.abs(reference.f64(found) - expected)
    limit = np.broadcast_to(np.asarray(bound, np.float64), error.shape)
    good = (error <= limit) | (np.isnan(found) & np.isnan(expected))
    if good.all():
        return
    badness = np.where(good, -1.0, np.nan_to_num(error, nan=np.inf))
    where = tuple(int(i) for i in np.unravel_index(int(np.argmax(badness)), error.shape))
    raise AssertionError(
        f"{op}: {name}{list(where)} of shape {list(error.shape)} is {found[where]!r}, "
        f"not {expected[where]!r}; off by {error[where]:.3g}, allowed {limit[where]:.3g}; "
        f"{int((~good).sum())} of {error.size} wrong"
    )


def check(
    ops: ModuleType, op: str, values: Sequence[Any], bounds: Mapping[str, Array | float],
    alias: dict[str, str] | None = None,
) -> dict[str, Array]:
    """Run `op` both ways and hold every output against the reference; gives the last run's outputs.

    `values` are the op's arguments in order: inputs as float32, float64 or int32 arrays, which the reference
    sees too, exactly; of an output that is overwritten only the shape and the type count.  Where storage is
    bfloat16 they are rounded to it first, and results may be off by one rounding more.
    """
    arguments = dict(zip(names(op), values, strict=True))
    rounds = ops.info()["storage"] == "bfloat16"
    narrow = {name for name in arguments if rounds and stored(op, name, arguments)}
    for name in narrow:
        arguments[name] = arguments[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = expect(op, arguments)
    bounds = {
        name: BF16_UNIT * np.abs(expected[name]) + (1 + BF16_UNIT) * bound + BF16_TINY if name in narrow else bound
        for name, bound in bounds.items()
    }
    assert set(bounds) == set(expected), f"bounds for {set(expected)}"
    for name, exact in expected.items():
        finite = np.isfinite(exact).all() or not overwritten(op, name, arguments)
        assert finite, f"the reference leaves {name} without a value"
    found: dict[str, Array] = {}
    for place in PLACES:
        found = call(ops, op, arguments, place, alias or {})
        for name, exact in expected.items():
            compare(f"{op}, flush at the {place}", name, found[name], exact, bounds[name])
    return found


def floats(rng: Generator, *shape: int, scale: float = 1.0) -> Array:
    """Standard normal float32 values times `scale`."""
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def blank(*shape: int) -> Array:
    """The shape of a float32 output."""
    return np.zeros(shape, np.float32)


def number(*values: float) -> Array:
    """Scalars on the device; without values one that is to be written."""
    return np.array(values or [0.0], np.float64)


class Sizes(NamedTuple):
    """The letters of the contract; N is the width of a linear layer's output, r the rank of its adapter."""

    B: int = 2
    T: int = 3
    C: int = 8
    H: int = 2
    N: int = 12
    V: int = 11
    Vp: int = 16
    maxT: int = 7
    G: int = 1
    r: int = 3


def example(op: str, rng: Generator, s: Sizes, accumulate: bool = True) -> Arguments:
    """Valid arguments for any op, of the given sizes; outputs hold numbers too."""
    B, T, C, H, N, V = s[:6]
    token, channels, wide, double = (B, T), (B, T, C), (B, T, N), (B, T, 2 * C)
    D = C // H
    heads, cache, scale, window, softcap = (B, T, C + 2 * s.G * D), (B, s.maxT, s.G * D), 0.3, 2, 5.0
    places = np.full(B, s.maxT - T, np.int32)
    half, column = D - D % 2, N // 3  # channels that can be turned; where an adapter's part begins
    ids = rng.integers(0, V, token).astype(np.int32)

    def new(*shape: int) -> Array:
        return floats(rng, *shape)

    table, positions, matrix, n = (s.Vp, C), (s.maxT, C), (N, C), N * C
    if op == "attention_backward":
        qkv, out, lse = new(*heads), blank(*channels), blank(B, H, T)
        reference.attention_forward(out, lse, qkv, scale, window, softcap)
        return dict(
            zip(names(op), (new(*heads), new(*channels), qkv, out, lse, scale, window, softcap), strict=True)
        )
    values: dict[str, Callable[[], tuple[Any, ...]]] = {
        "zero": lambda: (new(*channels),),
        "copy": lambda: (new(*channels), new(*channels)),
        "normal": lambda: (new(*channels), 3, 5, 0.5),
        "embedding_forward": lambda: (new(*channels), ids, places, new(*table), new(*positions), V, 1.5),
        "embedding_backward": lambda: (new(*table), new(*positions), new(*channels), ids, 1.5, accumulate),
        "layernorm_forward": lambda: (
            new(*channels), new(*token), new(*token), new(*channels), new(C), new(C), 1e-5,
        ),
        "layernorm_backward": lambda: (
            new(*channels), new(C), new(C), new(*channels), new(*channels), new(*token), new(*token), new(C),
            accumulate,
        ),
        "residual_layernorm_forward": lambda: (
            new(*channels), new(*channels), new(*token), new(*token), new(*channels), new(*channels), new(C), new(C),
            1e-5,
        ),
        "rmsnorm_forward": lambda: (new(*channels), new(*token), new(*channels), new(C), 1e-5, 1.0),
        "rmsnorm_backward": lambda: (
            new(*channels), new(C), new(*channels), new(*channels), new(*token), new(C), 1.0, accumulate,
        ),
        "residual_rmsnorm_forward": lambda: (
            new(*channels), new(*channels), new(*token), new(*channels), new(*channels), new(C), 1e-5, 1.0,
        ),
        "rope_forward": lambda: (new(*channels), places, new(s.maxT, half), 1),
        "rope_backward": lambda: (new(*channels), new(s.maxT, half), 1),
        "linear_forward": lambda: (new(*wide), new(*channels), new(*matrix), new(N)),
        "linear_backward": lambda: (
            new(*channels), new(*matrix), new(N), new(*wide), new(*channels), new(*matrix), accumulate,
        ),
        "lora_forward": lambda: (
            new(*wide), new(B, T, s.r), new(*channels), new(s.r, C), new(N - column, s.r), 0.5, column,
        ),
        "lora_backward": lambda: (
            new(s.r, C), new(N - column, s.r), new(B, T, s.r), new(*wide), new(B, T, s.r), new(*channels),
            new(N - column, s.r), 0.5, column, accumulate,
        ),
        "lora_backward_input": lambda: (new(*channels), new(B, T, s.r), new(s.r, C)),
        "linear_gelu_forward": lambda: (new(*wide), new(*wide), new(*channels), new(*matrix), new(N)),
        "gelu_linear_backward": lambda: (
            new(*channels), new(*matrix), new(N), new(*wide), new(*channels), new(*channels), new(*matrix), accumulate,
        ),
        "gelu_forward": lambda: (new(*channels), new(*channels)),
        "gelu_backward": lambda: (new(*channels), new(*channels), new(*channels)),
        "residual_forward": lambda: (new(*channels), new(*channels), new(*channels)),
        "swiglu_forward": lambda: (new(*channels), new(*double)),
        "swiglu_backward": lambda: (new(*double), new(*channels), new(*double)),
        "geglu_forward": lambda: (new(*channels), new(*double)),
        "geglu_backward": lambda: (new(*double), new(*channels), new(*double)),
        "attention_forward": lambda: (new(*channels), new(B, H, T), new(*heads), scale, window, softcap),
        "attention_decode": lambda: (
            new(*channels), new(*cache), new(*cache), new(*heads), places, H, scale, window, softcap,
        ),
        "head_loss": lambda: (
            new(*token), new(*channels), new(*table), new(*channels), new(*table), ids, V, 0.5, 30.0, accumulate,
        ),
        "head_logits": lambda: (new(B, T, V), new(*channels), new(*table), V, 30.0),
        "sum_losses": lambda: (number(2.5), new(*token), 0.5, accumulate),
        "global_norm": lambda: (number(1.5), new(*channels)),
        "clip_scale": lambda: (number(1.5), number(4.0), number(3.0), 1.0),
        "adamw_step": lambda: (
            new(n), new(n), new(n) ** 2, new(n), new(n), number(0.01, 2.0), number(0.5),
            ((0, n // 3, 0.1), (n // 2, n, 0.0)), 0.9, 0.999, 1e-8, 7,
        ),
    }
    return dict(zip(names(op), values[op](), strict=True))
