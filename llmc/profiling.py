"""Where a training step's time goes: a backend whose calls are timed, and the ceilings to compare them with.

    ops = Profiled(load("cpu"), steps=20)
    with ops.step():
        ...
    print(ops.report())

The results are the backend's own, to the bit: `Profiled` passes arguments through and sets stamps between the ops.
Seconds are the device's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from llmc import costs
from llmc.arena import Array
from llmc.costs import PARAMETERS, Cost
from llmc.ops import Ops

PARTS = ("forward", "head (forward and backward)", "backward", "update")
PART_OF = {
    "head_loss": PARTS[1], "sum_losses": PARTS[1], "zero": PARTS[2], "global_norm": PARTS[3], "clip_scale": PARTS[3],
    "adamw_step": PARTS[3], "copy": PARTS[3],
}  # fmt: skip
DECISIVE = {"V", "H", "heads", "window", "accumulate", "spans"}  # beside shapes, what a call's cost depends on

HEAD_START = 0.1  # seconds that a GPU is kept busy before a step, at most
RESOLUTION = 1e-9  # seconds; an op that launches nothing may take 0 by a device's clock
ROUNDS = 5  # times that the ceilings are measured in a run, about
PEAK_SECONDS = 0.01  # per ceiling and time
SMALLEST, LARGEST = 1 << 12, 1 << 27  # bytes of a stream; 128 MiB are beyond the caches, and more run no slower

# What to measure: on a CPU fma, dot, or a stream's arrays (read, written, updated) and bytes; on a GPU product, copy.
Ceiling = tuple[str, int, int, int, int]

REGISTERS: dict[str, Ceiling] = {"fp32": ("fma", 0, 0, 0, 0), "bf16": ("dot", 0, 0, 0, 0)}
PRODUCT: Ceiling = ("product", 0, 0, 0, 0)  # a large one, in the type in use
COPY: Ceiling = ("copy", 0, 0, 0, 0)  # whose rate that of any other traffic comes near, on a GPU


def ceiling(cost: Cost, dtype: str, gpu: bool = False) -> Ceiling:
    """What bounds a call of this cost, as `measure` takes it, where products are taken in `dtype` (fp32, bf16; a GPU
    has one ceiling for the type in use).  A stream's bytes are rounded to three binary digits, so that few differ."""
    if gpu:
        return PRODUCT if cost.products else COPY
    if cost.products:
        return REGISTERS[dtype]
    size = min(max(round(cost.footprint), SMALLEST), LARGEST)
    step = 1 << (size.bit_length() - 3)
    return ("stream", *cost.arrays, (size + step // 2) // step * step)


def products(dtype: str, gpu: bool = False) -> Ceiling:
    """What bounds products in `dtype`."""
    return PRODUCT if gpu else REGISTERS[dtype]


def is_gpu(ops: Any) -> bool:
    """Whether a backend's ceilings are those of a GPU."""
    return bool(ops.info().get("device") == "cuda")


def has_ceilings(ops: Any) -> bool:
    """Whether a backend can measure its own."""
    return is_gpu(ops) or hasattr(ops, "measure_fma")


def memory_nbytes(ops: Any) -> int:
    """Bytes that a profile allocates: the memory that its ceilings are measured in."""
    if is_gpu(ops):
        return int(ops.peak_nbytes())
    return 4 * int(ops.stream_floats(LARGEST)) if has_ceilings(ops) else 0


def stream_memory(ops: Any, nbytes: int = LARGEST) -> Array:
    """What `measure` needs, on a CPU for streams of up to `nbytes`; made once, so that a measurement allocates
    nothing."""
    if is_gpu(ops):
        return cast(Array, ops.empty((ops.peak_nbytes(),), "uint8"))
    return cast(Array, ops.empty((ops.stream_floats(nbytes),), "float32"))


def measure(ops: Any, what: Ceiling, memory: Array | None = None, seconds: float = PEAK_SECONDS) -> float:
    """FLOP/s, or B/s of a stream or a copy through `memory`, over `seconds` on the kernels and threads in use."""
    kind, reads, writes, updates, nbytes = what
    if kind == "stream":
        return float(ops.measure_stream(memory, reads, writes, nbytes, seconds, updates))
    if kind in ("product", "copy"):
        return float(getattr(ops, f"measure_{kind}")(memory, seconds))
    return float(ops.measure_dot(seconds) if kind == "dot" else ops.measure_fma(seconds))


def read_bandwidth(ops: Any, seconds: float = 0.05) -> float | None:
    """B/s with which the threads in use read memory, on a GPU those of a copy; None where a backend cannot measure
    it."""
    if not has_ceilings(ops):
        return None
    memory = stream_memory(ops)
    if is_gpu(ops):
        return measure(ops, COPY, memory, seconds)
    memory[...] = 1.0  # what was never written to may not be there to be read
    return measure(ops, ("stream", 1, 0, 0, LARGEST), memory, seconds)


@dataclass(frozen=True)
class OpTime:
    """An op's share of a step; calls that differ in the size of a layer are apart."""

    op: str
    size: str
    part: str  # of PARTS
    calls: float  # per step
    seconds: float  # per step
    rate: float  # 10^9 per second of `unit`
    unit: str  # GFLOP/s or GB/s
    fraction: float | None  # of the ceiling: the time its work takes there / the time it took; None: unknown


@dataclass(frozen=True)
class Profile:
    """The mean step of a run.  The first one touches new memory, and is left out where there are others."""

    steps: int  # that the figures are of
    seconds: float  # per step
    rows: tuple[OpTime, ...]  # longest first
    parts: dict[str, float]  # seconds per step
    outside: float  # seconds per step that no op accounts for
    peaks: dict[str, float]  # medians: FLOP/s, B/s of a GPU's copy


class _Calls:
    """The calls of one op at one cost."""

    def __init__(self, op: str, size: str, cost: Cost) -> None:
        self.op, self.size, self.cost = op, size, cost
        self.count = 0
        self.seconds = 0.0


class Profiled:
    """The backend `ops`, its calls timed while a `step` is on.  Whatever is no op goes to the backend as it is."""

    def __init__(self, ops: Ops, steps: int) -> None:
        """`steps` is the expected number of steps, over which measurements of the ceilings are spread.  Their memory,
        `memory_nbytes`, is allocated here."""
        self._ops = ops
        self._memory = stream_memory(ops) if has_ceilings(ops) else None
        self._dtype, self._gpu = ops.info()["dtype"], is_gpu(ops)
        self._every = max(1, -(-steps // ROUNDS))
        self._on = False
        self._host = 0.0  # seconds that calling a step's ops takes, and some
        self._steps: list[float] = []
        self._stamps: list[tuple[_Calls, Any, Any]] = []  # of the step that is on: elapsed() would wait
        self._calls: dict[tuple[Any, ...], _Calls] = {}
        self._first: dict[tuple[Any, ...], _Calls] = {}
        self._ceilings: dict[Ceiling, list[float]] = {}
        for op in costs.ROLES:
            setattr(self, op, self._timed(op, getattr(ops, op)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_ops"], name)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """`function` itself, so that every op in it is called, and seen."""
        return function

    def _timed(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        names, stamp = PARAMETERS[op], self._ops.stamp
        deciding = [i for i, name in enumerate(names) if name in costs.ROLES[op] or name in DECISIVE]

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._on:
                return function(*args, **kwargs)
            began = stamp()
            result = function(*args, **kwargs)
            ended = stamp()
            if kwargs:
                args += tuple(kwargs[name] for name in names[len(args) :])
            key = (op, *[_key(args[i]) for i in deciding])
            calls = self._calls.get(key)
            if calls is None:
                given = dict(zip(names, args, strict=True))
                calls = self._calls[key] = _Calls(op, costs.shape(op, given), costs.cost(op, given))
            self._stamps.append((calls, began, ended))
            return result

        return call

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step: what is called within is counted.  Afterwards, now and then, the ceilings are measured."""
        if self._gpu:
            # Ahead of the GPU, as it is where steps are replayed: else the time of a short op is that of its launch.
            cast(Any, self._ops).hold(self._memory, min(self._host, HEAD_START))
        self._stamps, self._on = [], True
        began, called = self._ops.stamp(), time.perf_counter()
        try:
            yield
        finally:
            self._on = False
        ended = self._ops.stamp()
        self._host = 1.25 * (time.perf_counter() - called)
        self._steps.append(self._ops.elapsed(began, ended))
        for calls, began, ended in self._stamps:
            calls.count += 1
            calls.seconds += self._ops.elapsed(began, ended)
        if len(self._steps) == 1:
            self._first, self._calls = self._calls, {}
        if len(self._steps) % self._every == 0:
            self._measure()

    def _counted(self) -> list[_Calls]:
        return list((self._calls if len(self._steps) > 1 else self._first).values())

    def _ceiling(self, cost: Cost) -> Ceiling:
        return ceiling(cost, self._dtype, self._gpu)

    def _measure(self) -> None:
        if has_ceilings(self._ops):
            needed = {self._ceiling(calls.cost) for calls in self._counted()}
            for what in sorted(needed | {products(self._dtype, self._gpu)}):
                self._ceilings.setdefault(what, []).append(measure(self._ops, what, self._memory))

    def report(self) -> Profile:
        """The steps so far; RuntimeError before the first."""
        if not self._steps:
            raise RuntimeError("a profile needs a step")
        counted = self._counted()
        if has_ceilings(self._ops) and {self._ceiling(calls.cost) for calls in counted} - self._ceilings.keys():
            self._measure()
        peaks = {what: statistics.median(values) for what, values in self._ceilings.items()}
        steps = max(1, len(self._steps) - 1)
        seconds = sum(self._steps[-steps:]) / steps
        groups: dict[tuple[str, str], list[_Calls]] = {}
        for calls in counted:
            groups.setdefault((calls.op, calls.size), []).append(calls)
        rows = []
        for (op, size), group in groups.items():
            took = max(sum(calls.seconds for calls in group), RESOLUTION)
            products = group[0].cost.products
            work = sum(calls.count * (calls.cost.flops if products else calls.cost.nbytes) for calls in group)
            fraction = None
            if peaks:
                ideal = sum(calls.count * calls.cost.amount / peaks[self._ceiling(calls.cost)] for calls in group)
                fraction = ideal / took
            rows.append(
                OpTime(
                    op, size, _part(op), sum(calls.count for calls in group) / steps, took / steps, work / took / 1e9,
                    group[0].cost.unit, fraction,
                )
            )  # fmt: skip
        rows.sort(key=lambda row: -row.seconds)
        parts = {part: sum(row.seconds for row in rows if row.part == part) for part in PARTS}
        return Profile(
            steps, seconds, tuple(rows), parts, seconds - sum(parts.values()),
            {what[0]: value for what, value in peaks.items() if what[0] != "stream"},
        )  # fmt: skip


def _key(value: Any) -> Any:
    """What of an argument may decide a call's cost."""
    return tuple(value) if isinstance(value, list) else getattr(value, "shape", value)


def _part(op: str) -> str:
    if op in PART_OF:
        return PART_OF[op]
    return PARTS[2] if op.endswith("_backward") else PARTS[0]
