"""`llmc bench`: how fast each op is, and a training step, on this machine, now.

Times mean little on their own where the clock moves and others share the machine.  So whatever is compared takes
turns within one run, and every turn has a measurement of its own ceiling right before and after it; a fraction of the
peak is the median of the turns' ratios.
"""

from __future__ import annotations

import itertools
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llmc import data, gpt2, loading, machine, ops
from llmc.adamw import AdamW
from llmc.arena import Array
from llmc.cases import LEARNING_RATE, RECIPE, Case, cases
from llmc.errors import ConfigError, LlmcError
from llmc.model import Config
from llmc.ops import DTYPES, Ops
from llmc.profiling import PEAK_SECONDS, ceiling, is_gpu, measure, products, stream_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TURN_SECONDS = 0.02  # that an op is called again and again in one turn, at least
TURN_STEPS = 10  # that a GPU takes in one turn
CACHES = 3.0  # sizes of a GPU's cache that an op's arguments take, all sets of them
MOST_SETS = 32
LEAST_CALLS = 16  # in a recording, so that what lies between two replays is nothing beside them

GPU = "cuda"  # the name of a GPU among instruction sets
CUDNN = "cudnn"  # and of its attention by cuDNN

Progress = Callable[[str], None]


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Spread:
    """Quartiles."""

    lower: float
    median: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(*(float(q) for q in np.percentile(values, [25, 50, 75])))


@dataclass(frozen=True)
class Settings:
    """What to measure, and for how long.  ConfigError, naming the field, for what makes no sense."""

    init: str = "d12"  # a preset with random weights
    batch_sizes: tuple[int, ...] = (4,)
    sequence_lengths: tuple[int, ...] = (64,)
    dtypes: tuple[str, ...] = ("fp32",)
    device: str = "cpu"  # or a GPU, whose kernels are measured beside the CPU's
    # (): for kernels all that this CPU has (shared ones once), for training the best.  "cuda" among them is the GPU,
    # which needs no name where the device is one; alone it leaves the CPU out.
    isas: tuple[str, ...] = ()
    only: str = ""  # ops whose name holds this, or one of several, separated by commas
    threads: int | None = None
    warmup: int = 1  # calls before each turn; steps before the first
    repeats: int = 15  # turns
    seconds: float = 2.0  # after so long an op on one instruction set, or a configuration, has no more turns

    def __post_init__(self) -> None:
        if not loading.is_preset(self.init):
            raise ConfigError("init", f"{self.init!r} is no preset with random weights: d12, d2, stories, tiny ...")
        longest = loading.preset(self.init).max_seq_len
        for name, values, low, high in (
            ("batch_size", self.batch_sizes, 1, 1 << 20), ("sequence_length", self.sequence_lengths, 1, longest),
            ("warmup", (self.warmup,), 0, 1 << 20), ("repeats", (self.repeats,), 1, 1 << 20),
            ("seconds", (self.seconds,), 0, float("inf")),
        ):  # fmt: skip
            if not values:
                raise ConfigError(name, "is empty")
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(name, f"must be from {low} to {high}, got {value}")
        if not self.dtypes:
            raise ConfigError("dtype", "is empty")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ConfigError("dtype", f"{dtype!r} is unknown; choose from {', '.join(DTYPES)}")
        if GPU in self.isas and not self.gpu:
            raise ConfigError("isas", f"{GPU!r} is there with --device {GPU} alone")

    @property
    def gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def cpu(self) -> Settings | None:
        """What of it is the CPU's; None where that is nothing."""
        isas = tuple(isa for isa in self.isas if isa != GPU)
        dtypes = tuple(dtype for dtype in self.dtypes if not self.gpu or dtype != "tf32")
        if not dtypes or (self.isas and not isas):
            return None
        return replace(self, device="cpu", isas=isas, dtypes=dtypes)


def gpu_facts(device: str, dtypes: Sequence[str], attention: str | None = None) -> dict[str, Any]:
    """A GPU's `machine.gpu_facts`.  Whose attention it is depends on the type, so each is asked."""
    used: dict[str, list[str]] = {}
    for dtype in dtypes:
        info = ops.load(device, dtype=dtype, attention=attention).info()
        used.setdefault(info["attention"], []).append(dtype)
    named = [name if len(used) == 1 else f"{name} in {' and '.join(types)}" for name, types in used.items()]
    return machine.gpu_facts(info) | {"attention": ", ".join(named)}


def _backend(isa: str | None, threads: int | None, dtype: str) -> Any:
    return ops.load("cpu", isa=isa, threads=threads, dtype=dtype)


@contextmanager
def _checked(settings: Settings) -> Iterator[Any]:
    """The backend, once every instruction set and type asked for has turned out to be there; set back afterwards."""
    backend = _backend(None, settings.threads, "fp32")
    before = backend.info()
    try:
        for isa in settings.isas:
            _backend(isa, settings.threads, "fp32")
        for dtype in settings.dtypes:
            _backend(None, settings.threads, dtype)
        yield backend
    finally:
        _backend(before["isa"], before["threads"], before["dtype"])


# ---- kernels ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelRow:
    """One op at one shape on one instruction set."""

    op: str
    shape: str
    dtype: str
    isa: str  # GPU and CUDNN are names here
    unit: str  # of rate and peak: GFLOP/s or GB/s
    ms: Spread  # per call, over the turns
    rate: float  # at the median time
    peak: float  # median of what was measured beside it
    fraction: float  # of the peak: the median of the turns' ratios
    turns: int


def _visit(call: Callable[[], Any], warmup: int, least: float) -> tuple[float, float]:
    """Seconds of a median call over at least `least` seconds, after `warmup` calls; and seconds in all."""
    clock = time.perf_counter
    began = clock()
    for _ in range(warmup):
        call()
    times: list[float] = []
    start = now = clock()
    while not times or now - start < least:
        before, _, now = clock(), call(), clock()
        times.append(now - before)
    return statistics.median(times), now - began


def kernels(settings: Settings, progress: Progress = _silent) -> list[KernelRow]:
    """Every op, on each instruction set in turn, and on the GPU.  ConfigError for a set that this CPU lacks.

    An instruction set with a product of bf16 pairs shares all other kernels with the one it extends; unless
    `settings.isas` names it, nothing but products in bf16 is measured on it.
    """
    rows = [] if settings.cpu is None else _cpu_kernels(settings.cpu, progress)
    return rows + (list(gpu_kernels(settings, progress)) if settings.gpu else [])


def _cpu_kernels(settings: Settings, progress: Progress) -> list[KernelRow]:
    config = loading.preset(settings.init)
    rows = []
    with _checked(settings) as backend:
        isas = settings.isas or backend.info()["isas"]
        distinct = settings.isas or tuple(isa for isa in isas if not _multiplies_pairs(isa, settings.threads))
        memory = stream_memory(backend)
        for dtype in settings.dtypes:
            for case in _wanted(backend, settings, config, dtype, progress):
                products = case.cost.products
                if products or dtype == settings.dtypes[0]:
                    chosen = isas if products and dtype == "bf16" else distinct
                    rows += _take_turns(case, chosen, settings, memory)
                del case  # with its arrays, before the next one's are made
    return rows


def _wanted(backend: Any, settings: Settings, config: Config, dtype: str, progress: Progress) -> Iterator[Case]:
    """The cases of all shapes, if the name fits."""
    if not isinstance(config, gpt2.Config):
        raise ConfigError("init", f"the ops' shapes are a GPT-2's, and {settings.init!r} is none; d12 has all ops")
    backend.reserve(**config.workspace(max(settings.batch_sizes), max(settings.sequence_lengths)))
    for B, T in itertools.product(settings.batch_sizes, settings.sequence_lengths):
        for case in cases(backend, config, B, T, dtype):
            if any(part in case.op for part in settings.only.split(",")):
                progress(f"{case.op} {case.shape} {dtype}")
                yield case
            del case


def _multiplies_pairs(isa: str, threads: int | None) -> bool:
    return bool(_backend(isa, threads, "fp32").info()["bf16_products"])


def _take_turns(case: Case, isas: Sequence[str], settings: Settings, memory: Array | None) -> list[KernelRow]:
    """One case's rows; `memory` is for the streams beside it."""
    took: dict[str, list[float]] = {isa: [] for isa in isas}
    peaks: dict[str, list[float]] = {isa: [] for isa in isas}
    spent = dict.fromkeys(isas, 0.0)
    what = ceiling(case.cost, case.dtype)
    turn, beside = min(TURN_SECONDS, settings.seconds), min(PEAK_SECONDS, settings.seconds)
    for _ in range(settings.repeats):
        for isa in isas:
            if took[isa] and spent[isa] >= settings.seconds:
                continue
            backend = _backend(isa, settings.threads, case.dtype)
            first = measure(backend, what, memory, beside)
            seconds, whole = _visit(case.call, settings.warmup, turn)
            peaks[isa].append((first + measure(backend, what, memory, beside)) / 2)
            took[isa].append(seconds)
            spent[isa] += whole
    dtype = case.dtype if case.cost.products else "fp32"
    return [_kernel_row(case, dtype, isa, took[isa], peaks[isa]) for isa in isas]


def kernels_attention(isas: Collection[str]) -> str:
    """Whose attention is in a table of kernels: a column `cuda` is llmc's own, whatever training would use."""
    return f"own, {CUDNN}" if CUDNN in isas else "own"


# ---- kernels of a GPU ------------------------------------------------------------------------------


def gpu_kernels(settings: Settings, progress: Progress = _silent) -> Iterator[KernelRow]:
    """Every op on the GPU, in each type; what has no products is the same in fp32 and tf32."""
    config = loading.preset(settings.init)
    stored: set[str] = set()
    for dtype in settings.dtypes:
        backend: Any = ops.load(settings.device, dtype=dtype)
        fast, storage = backend.info()["attention"], backend.info()["storage"]
        memory = stream_memory(backend)
        for case in _wanted(backend, settings, config, dtype, progress):
            if case.cost.products or storage not in stored:
                ops.load(settings.device, dtype=dtype, attention="own")
                yield _gpu_row(backend, case, settings, memory, GPU)
                plain = case.op in ("attention_forward", "attention_backward") and not any(case.args[-2:])
                if fast == CUDNN and plain:  # without window and soft-cap
                    ops.load(settings.device, dtype=dtype, attention=CUDNN)
                    yield _gpu_row(backend, case, settings, memory, CUDNN)
            del case
        stored.add(storage)
        del memory


def _gpu_row(backend: Any, case: Case, settings: Settings, memory: Array, name: str) -> KernelRow:
    """One case's figures by the GPU's clock.  Its calls are recorded, so that Python's share of a call is in no figure,
    and go through several sets of arguments, so that none is in the cache when its turn comes."""
    count = min(MOST_SETS, max(1, math.ceil(CACHES * backend.cache_nbytes() / max(1.0, case.cost.footprint))))
    sets = case.copies(backend, count)
    rounds = math.ceil(LEAST_CALLS / count)

    def round_of_calls() -> None:
        for args in sets * rounds:
            case.function(*args)

    replay = backend.record(round_of_calls)
    for _ in range(2 + settings.warmup):  # the first runs the ops, the second records them
        replay()
    what = ceiling(case.cost, case.dtype, gpu=True)
    turn, beside = min(TURN_SECONDS, settings.seconds), min(PEAK_SECONDS, settings.seconds)
    took: list[float] = []
    peaks: list[float] = []
    spent, replays = 0.0, 1
    while len(took) < settings.repeats and (not took or spent < settings.seconds):
        first = measure(backend, what, memory, beside)
        while True:
            begin = backend.stamp()
            for _ in range(replays):
                replay()
            seconds = max(backend.elapsed(begin, backend.stamp()), 1e-9)
            spent += seconds
            if seconds >= turn:
                break
            replays = min(4 * replays, math.ceil(1.2 * replays * turn / seconds)) + 1
        peaks.append((first + measure(backend, what, memory, beside)) / 2)
        took.append(seconds / replays / (rounds * count))
    own_type = case.cost.products or backend.info()["storage"] != "float32"
    return _kernel_row(case, case.dtype if own_type else "fp32", name, took, peaks)


def _kernel_row(case: Case, dtype: str, isa: str, took: Sequence[float], peaks: Sequence[float]) -> KernelRow:
    ms = Spread.of([1e3 * seconds for seconds in took])
    ratios = [case.cost.amount / s / peak for s, peak in zip(took, peaks, strict=True)]
    return KernelRow(
        case.op, case.shape, dtype, isa, case.cost.unit, ms, case.cost.amount / ms.median / 1e6,
        statistics.median(peaks) / 1e9, statistics.median(ratios), len(took),
    )  # fmt: skip


# ---- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRow:
    """A training step of one configuration, in a process of its own."""

    init: str
    B: int
    T: int
    dtype: str
    isa: str  # or GPU
    threads: int
    ms: Spread  # a step; on a GPU one of several that follow each other
    forward_ms: float  # medians; the head's backward belongs to the forward pass.  On a GPU those of a step alone
    backward_ms: float
    update_ms: float
    tokens_per_second: float  # at the median
    mfu: float  # the step's products at the peak measured beside it / the step: the median of the turns' ratios
    peak_gflops: float
    peak_mib: float  # the most memory that the process ever held; on a GPU, of the GPU's, its context left out
    first_step_seconds: float  # from the start of the process to the end of its first step
    steps: int  # timed; on a GPU turns of TURN_STEPS
    busy: float | None = None  # the part of a step in which the GPU had work, the median of the turns'


@dataclass(frozen=True)
class Configuration:
    """What one process trains."""

    init: str  # as `loading.load` takes it
    B: int
    T: int
    dtype: str
    isa: str | None
    threads: int | None
    seed: int = 0  # of weights and batches
    recompute: str = "none"
    device: str = "cpu"
    attention: str | None = None  # a GPU's, as `ops.load` takes it


def flops_per_token(config: Config, T: int) -> float:
    """Of a training step's products: 6 N for the N weights that multiply (the head and the layers' matrices), and
    6 L H D T for causal attention without windows, whose scores backward computes once more and which is not
    counted."""
    rows = config.parameter_rows()
    matrices = sum(row.size for row in rows if row.layers and len(row.shape) == 2)
    attention = config.num_layers * config.num_heads * config.head_size
    return 6.0 * (config.vocab_size * config.channels + matrices) + 6.0 * attention * T


class _Watched:
    """A backend that sets stamps around what it has recorded, so that it can be told when the device was busy."""

    def __init__(self, backend: Ops) -> None:
        self._backend = backend
        self.stamps: list[tuple[Any, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_backend"], name)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        replay, stamp = self._backend.record(function), self._backend.stamp

        def stamped() -> None:
            begin = stamp()
            replay()
            self.stamps.append((begin, stamp()))

        return stamped

    def busy(self) -> float:
        """Seconds between the stamps, which are forgotten."""
        stamps, self.stamps = self.stamps, []
        return sum(self._backend.elapsed(*pair) for pair in stamps)


class Program:
    """A model in training on random batches: llmc's side of a comparison."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = c = configuration
        if c.device == "cpu":
            self.backend = ops.load("cpu", isa=c.isa, threads=c.threads, dtype=c.dtype)
        else:
            self.backend = ops.load(c.device, dtype=c.dtype, attention=c.attention)
        self.held = 0  # bytes of a GPU's memory
        with self._counted():
            self.watched = _Watched(self.backend)
            self.model = loading.load(c.init, ops=cast(Ops, self.watched), seed=c.seed)
            self.model.prepare(c.B, c.T, c.recompute)
            assert self.model.grads is not None
            self.optimizer = AdamW(
                self.model.params.table, self.model.params, self.model.grads, cast(Ops, self.watched),
                weights=self.model.weights, **RECIPE,
            )  # fmt: skip

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What is taken of a GPU's memory within; no other process takes any at that time."""
        before = self.backend.memory()
        yield
        after = self.backend.memory()
        if before is not None and after is not None:
            self.held += max(0, before[0] - after[0])

    def _batch(self, number: int) -> tuple[Array, Array]:
        c = self.configuration
        return data.random_batch(self.model.config.vocab_size, c.B, c.T, c.seed, number)

    def step(self, number: int) -> tuple[float, list[float]]:
        """One step: its loss, and the seconds after which it began (0), and had done forward, backward and update."""
        x, y = self._batch(number)
        with self._counted():
            stamps = [self.backend.stamp()]
            loss = self.model.forward(x, y)
            stamps.append(self.backend.stamp())
            self.model.backward()
            stamps.append(self.backend.stamp())
            self.optimizer.step(LEARNING_RATE)
            stamps.append(self.backend.stamp())
            self.watched.stamps.clear()
            return loss, [self.backend.elapsed(stamps[0], stamp) for stamp in stamps]

    def turn(self, numbers: Sequence[int], only_forward: bool = False) -> tuple[list[float], float, float]:
        """Steps that follow each other, as in training: their losses, the seconds of each, and the part of these in
        which the device was busy.  With `only_forward` the losses are all there is to a step."""
        batches = [self._batch(number) for number in numbers]
        ahead, total = self.backend.info()["ahead"], self.model.total
        under_way: deque[Callable[[], Array]] = deque()
        losses: list[float] = []

        def finish(most: int) -> None:
            while len(under_way) > most:
                losses.append(float(under_way.popleft()()[0]))

        with self._counted():
            self.backend.fetch(total)()  # whatever was before is done
            self.watched.stamps.clear()
            began = time.perf_counter()
            for x, y in batches:
                if only_forward:
                    self.model.begin_loss(x, y)
                else:
                    self.model.gradients(x, y)
                    self.optimizer.step(LEARNING_RATE)
                under_way.append(self.backend.fetch(total))
                finish(ahead)
            finish(0)
            seconds = time.perf_counter() - began
        return losses, seconds / len(batches), self.watched.busy() / seconds


@dataclass(frozen=True)
class _Turn:
    """What a process answers: seconds of the parts of a step and of a step, the GPU's share, FLOP/s of the ceiling."""

    parts: list[float]
    step: float
    busy: float | None
    peak: float


def _train(pipe: Connection, configuration: Configuration) -> None:
    """A process: a step (of a GPU, a turn of them) for each number received, None to end.  Ctrl-C is the parent's to
    answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = Program(configuration)
        backend: Any = program.backend
        gpu = is_gpu(backend)
        what, memory = products(configuration.dtype, gpu), None
        pipe.send(program.step(pipe.recv())[0])  # the parent looks at its clock
        if gpu:
            memory = stream_memory(backend)
        while (number := pipe.recv()) is not None:
            before = measure(backend, what, memory)
            step, busy = 0.0, None
            if gpu:
                first = number * (TURN_STEPS + 1)
                _, step, busy = program.turn(range(first, first + TURN_STEPS))
                number = first + TURN_STEPS
            parts = [b - a for a, b in itertools.pairwise(program.step(number)[1])]
            peak = (before + measure(backend, what, memory)) / 2
            pipe.send(_Turn(parts, step if gpu else sum(parts), busy, peak))
        pipe.send((program.held / 2**20 if gpu else machine.memory()["peak"], backend.info()))
    except (LlmcError, MemoryError) as error:
        pipe.send(_Failure(str(error) or "out of memory"))


@dataclass(frozen=True)
class _Failure:
    text: str


class _Process:
    def __init__(self, configuration: Configuration) -> None:
        import multiprocessing  # who only wants a Program, as bench/programs.py does, starts without it

        self.configuration = c = configuration
        self.name = f"{c.init} B={c.B} T={c.T} {c.dtype}"
        self.turns: list[_Turn] = []
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_train, args=(theirs, configuration), daemon=True)
        began = time.perf_counter()
        self.process.start()
        theirs.close()  # so that its death is noticed
        self.ask(0)
        self.first = time.perf_counter() - began

    def ask(self, message: int | None) -> Any:
        try:
            self.pipe.send(message)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            raise LlmcError(f"{self.name} ended with status {self.process.exitcode}") from None
        if isinstance(answer, _Failure):
            raise LlmcError(f"{self.name}: {answer.text}")
        return answer

    def step(self, number: int, keep: bool) -> None:
        turn = self.ask(number)
        if keep:
            self.turns.append(turn)

    def row(self) -> TrainingRow:
        peak_mib, info = self.ask(None)
        self.process.join()
        c = self.configuration
        steps = [turn.step for turn in self.turns]
        work = c.B * c.T * flops_per_token(loading.preset(c.init), c.T)
        parts = zip(*(turn.parts for turn in self.turns), strict=True)
        forward, backward, update = (1e3 * statistics.median(part) for part in parts)
        busy = [turn.busy for turn in self.turns if turn.busy is not None]
        return TrainingRow(
            c.init, c.B, c.T, c.dtype, info.get("isa", GPU), info.get("threads", 0),
            Spread.of([1e3 * step for step in steps]), forward, backward, update,
            c.B * c.T / statistics.median(steps),
            statistics.median([work / turn.step / turn.peak for turn in self.turns]),
            statistics.median(turn.peak for turn in self.turns) / 1e9, peak_mib, self.first, len(steps),
            statistics.median(busy) if busy else None,
        )  # fmt: skip


def training(settings: Settings, progress: Progress = _silent) -> list[TrainingRow]:
    """A training step of every configuration.  Those of one batch size and length take turns, step by step, and
    are in memory together."""
    from llmc.training import TrainConfig, require_memory  # not for who only wants a Program

    if settings.gpu:
        if other := [isa for isa in settings.isas if isa != GPU]:
            raise ConfigError("isas", f"{other[0]!r} means nothing to training on {settings.device!r}: leave it out")
        if settings.threads is not None:
            raise ConfigError(
                "threads", f"{settings.threads} means nothing to training on {settings.device!r}: leave it out"
            )
    else:
        with _checked(settings):
            pass
    rows: list[TrainingRow] = []
    for B in settings.batch_sizes:
        for T in settings.sequence_lengths:
            for dtype in settings.dtypes if settings.gpu else ("fp32",):
                require_memory(
                    TrainConfig(
                        init=settings.init, batch_size=B, sequence_length=T, val_every=0, sample_every=0, dtype=dtype,
                        device=settings.device,
                    )
                )  # fmt: skip
            processes: list[_Process] = []
            try:
                for dtype in settings.dtypes:
                    for isa in (None,) if settings.gpu else settings.isas or (None,):
                        configuration = Configuration(
                            settings.init, B, T, dtype, isa, settings.threads, device=settings.device
                        )
                        progress(f"{settings.init} B={B} T={T} {dtype} {isa or ''}")
                        processes.append(_Process(configuration))
                _step_by_step(processes, settings)
                rows += [process.row() for process in processes]
            finally:
                for process in processes:
                    process.process.terminate()
                    process.process.join()
    return rows


def _step_by_step(processes: Sequence[_Process], settings: Settings) -> None:
    """Each round begins with the next process, so that none is always the first; neighbours stay neighbours."""
    for number in range(1, 1 + settings.warmup + settings.repeats):
        first = number % len(processes)
        for process in [*processes[first:], *processes[:first]]:
            if not process.turns or sum(turn.step for turn in process.turns) < settings.seconds:
                process.step(number, keep=number > settings.warmup)
