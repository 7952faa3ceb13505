"""`llmc bench`: how fast each op is, and a training step, on this machine, now.

Times mean little on their own where the clock moves and others share the machine.  So whatever is compared takes
turns within one run, and every turn has a measurement of its own ceiling right before and after it; a fraction of the
peak is the median of the turns' ratios.
"""

from __future__ import annotations

import itertools
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc import costs, data, loading, machine, ops
from llmc.adamw import AdamW
from llmc.arena import Array
from llmc.costs import Cost
from llmc.errors import ConfigError, LlmcError
from llmc.gpt2 import LAYERNORM_EPS, Config, preset, workspace
from llmc.ops import DTYPES
from llmc.profiling import PEAK_SECONDS, REGISTERS, ceiling, measure, stream_memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

TURN_SECONDS = 0.02  # that an op is called again and again in one turn, at least
# How every benchmark trains, those of bench/ too: AdamW with decay on matrices.
LEARNING_RATE = 1e-4
RECIPE = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

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
    isas: tuple[str, ...] = ()  # (): for kernels all that this CPU has (shared ones once), for training the best
    only: str = ""  # ops whose name holds this
    threads: int | None = None
    warmup: int = 1  # calls before each turn; steps before the first
    repeats: int = 15  # turns
    seconds: float = 2.0  # after so long an op on one instruction set, or a configuration, has no more turns

    def __post_init__(self) -> None:
        if not loading.is_preset(self.init):
            raise ConfigError("init", f"{self.init!r} is no preset with random weights: d12, d2, stories, tiny ...")
        longest = preset(self.init).max_seq_len
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
    isa: str
    unit: str  # of rate and peak: GFLOP/s or GB/s
    ms: Spread  # per call, over the turns
    rate: float  # at the median time
    peak: float  # median of what was measured beside it
    fraction: float  # of the peak: the median of the turns' ratios
    turns: int


@dataclass(frozen=True)
class Case:
    """One op at one shape: a call, and what it costs."""

    op: str
    shape: str
    dtype: str
    cost: Cost
    call: Callable[[], Any] = field(repr=False)


def cases(backend: Any, config: Config, B: int, T: int, dtype: str) -> Iterator[Case]:
    """Every op of the contract at the shapes of a training step (decoding ops at theirs), and a linear layer's three
    products one by one.

    Only the arrays of a few related ops exist at a time, if the caller lets go of a case before it asks for the next:
    these ops are a generator of their own, and its locals end with it.
    """
    random = np.random.default_rng(0)
    C, H, V, Vp, maxT = (
        config.channels, config.num_heads, config.vocab_size, config.padded_vocab_size, config.max_seq_len
    )  # fmt: skip
    layers = {"qkv": (C, 3 * C), "attproj": (C, C), "fc": (C, 4 * C), "fcproj": (4 * C, C), "head": (C, V)}
    tokens, wide, heads = f"{B}x{T}x{C}", f"{B}x{T}x{4 * C}", f"{B}x{T}x{C}, {H} heads"

    def new(*shape: int, scale: float = 1.0) -> Array:
        """In the memory that arenas have: in huge pages where there are any, without which a large table waits for
        page tables more than for itself."""
        out: Array = backend.empty(shape, "float32")
        random.standard_normal(dtype=np.float32, out=out)
        np.multiply(out, np.float32(scale), out=out)
        return out

    def blank(*shape: int) -> Array:
        out: Array = backend.empty(shape, "float32")
        return out

    def number(*values: float) -> Array:
        out: Array = backend.empty((len(values),), "float64")
        out[...] = values
        return out

    def case(op: str, size: str, *args: Any) -> Case:
        cost = costs.cost(op, dict(zip(costs.PARAMETERS[op], args, strict=True)))
        return Case(op, size, dtype, cost, _bound(getattr(backend, op), *args))

    def ids() -> Array:
        out: Array = backend.empty((B, T), "int32")
        out[...] = random.integers(V, size=(B, T))
        return out

    def products(name: str) -> Iterator[Case]:
        K, N = layers[name]
        x, w, y = new(B * T, K), new(N, K), new(B * T, N)
        for use, shape, a, b in (("forward", y.shape, x, w), ("dx", x.shape, y, w), ("dw", w.shape, y, x)):
            out = backend.empty(shape, "float32")
            cost = Cost(
                2.0 * B * T * K * N, float(a.nbytes + b.nbytes), float(out.nbytes), (2, 1, 0),
                float(a.nbytes + b.nbytes + out.nbytes),
            )  # fmt: skip
            # Bound now: a closure would see the loop's last arrays.
            yield Case(
                f"product_{use}", f"{name} {K} -> {N}, {B}x{T}", dtype, cost, _bound(backend.product, use, out, a, b)
            )
            del out

    def embedding() -> Iterator[Case]:
        x, dout, i = new(B, T, C), new(B, T, C), ids()
        wte, wpe, dwte, dwpe = new(Vp, C, scale=0.02), new(maxT, C), new(Vp, C), new(maxT, C)
        yield case("embedding_forward", tokens, x, i, wte, wpe, V, 0)
        yield case("embedding_backward", tokens, dwte, dwpe, dout, i, False)

    def rows() -> Iterator[Case]:
        x, dx, dout, total = new(B, T, C), new(B, T, C), new(B, T, C), new(B, T, C)
        w, b, dw, db = new(C), new(C), new(C), new(C)
        mean, rstd = blank(B, T), new(B, T)
        yield case("layernorm_forward", tokens, dx, mean, rstd, x, w, b, LAYERNORM_EPS)
        yield case("layernorm_backward", tokens, dx, dw, db, dout, x, mean, rstd, w, False)
        yield case("residual_forward", tokens, dx, x, dx)  # in place, as decoding does it
        yield case("residual_layernorm_forward", tokens, total, dx, mean, rstd, x, total, w, b, LAYERNORM_EPS)

    def gelu() -> Iterator[Case]:
        pre, act, dact = new(B, T, 4 * C), new(B, T, 4 * C), new(B, T, 4 * C)
        yield case("gelu_forward", wide, act, pre)
        yield case("gelu_backward", wide, dact, dact, pre)

    def linear(name: str) -> Iterator[Case]:
        K, N = layers[name]
        x, y, w, b = new(B, T, K), new(B, T, N), new(N, K), new(N)
        yield case("linear_forward", f"{K} -> {N}, {B}x{T}", y, x, w, b)
        dx, dw, db = new(B, T, K), new(N, K), new(N)
        yield case("linear_backward", f"{K} -> {N}, {B}x{T}", dx, dw, db, y, x, w, False)

    def linear_gelu() -> Iterator[Case]:
        x, pre, act, w, b = new(B, T, C), new(B, T, 4 * C), new(B, T, 4 * C), new(4 * C, C), new(4 * C)
        yield case("linear_gelu_forward", f"{C} -> {4 * C}, {B}x{T}", act, pre, x, w, b)
        back, dw, db = new(C, 4 * C), new(C, 4 * C), new(C)  # the layer that reads what GELU gives
        yield case("gelu_linear_backward", f"{4 * C} -> {C}, {B}x{T}", act, dw, db, x, pre, act, back, False)

    def attention() -> Iterator[Case]:
        qkv, dqkv, out, dout = new(B, T, 3 * C), new(B, T, 3 * C), new(B, T, C), new(B, T, C)
        lse = blank(B, H, T)
        yield case("attention_forward", heads, out, lse, qkv)
        yield case("attention_backward", heads, dqkv, dout, qkv, out, lse)

    def decoding() -> Iterator[Case]:
        keys, values, qkv, out = new(1, maxT, C), new(1, maxT, C), new(1, 1, 3 * C), new(1, 1, C)
        yield case("attention_decode", f"1 token after {maxT - 1}", out, keys, values, qkv, H, maxT - 1)

    def head() -> Iterator[Case]:
        losses, x, wte, i = blank(B, T), new(B, T, C), new(Vp, C, scale=0.02), ids()
        yield case("head_loss", f"{tokens}, loss alone", losses, None, None, x, wte, i, V, 1.0, False)
        dx, dwte = new(B, T, C), new(Vp, C)
        yield case("head_loss", f"{tokens}, with gradients", losses, dx, dwte, x, wte, i, V, 1.0 / (B * T), False)
        yield case("sum_losses", f"{B}x{T}", number(0.0), losses, 1.0 / (B * T), False)
        logits, one = blank(1, 1, V), new(1, 1, C)
        yield case("head_logits", f"1x1x{C}, V={V}", logits, one, wte, V)

    def update() -> Iterator[Case]:
        n = Vp * C
        w, dw = new(n, scale=0.02), new(n)
        m, v = blank(n), blank(n)
        norm, scale, spans = number(0.0), number(1.0), ((0, n, RECIPE["weight_decay"]),)
        yield case("global_norm", f"{Vp}x{C}", norm, dw)
        yield case("clip_scale", "1", scale, norm, number(1.0), 1.0)
        yield case(
            "adamw_step", f"{Vp}x{C}", w, m, v, dw, None, number(LEARNING_RATE, 10.0), scale, spans, RECIPE["beta1"],
            RECIPE["beta2"], RECIPE["eps"], 0,
        )  # fmt: skip
        yield case("copy", f"{Vp}x{C}", m, w)
        yield case("zero", f"{Vp}x{C}", dw)
        yield case("normal", f"{Vp}x{C}", dw, 0, 0, 0.02)

    for name in layers:
        yield from products(name)
    yield from embedding()
    yield from rows()
    yield from gelu()
    for name in ("qkv", "attproj", "fcproj"):
        yield from linear(name)
    yield from linear_gelu()
    yield from attention()
    yield from decoding()
    yield from head()
    yield from update()


def _bound(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


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
    """Every op, on each instruction set in turn.  ConfigError for one that this CPU lacks.

    An instruction set with a product of bf16 pairs shares all other kernels with the one it extends; unless
    `settings.isas` names it, nothing but products in bf16 is measured on it.
    """
    config = preset(settings.init)
    rows = []
    with _checked(settings) as backend:
        isas = settings.isas or backend.info()["isas"]
        distinct = settings.isas or tuple(isa for isa in isas if not _multiplies_pairs(isa, settings.threads))
        memory = stream_memory(backend)
        backend.reserve(**workspace(config, max(settings.batch_sizes), max(settings.sequence_lengths)))
        for dtype in settings.dtypes:
            for B in settings.batch_sizes:
                for T in settings.sequence_lengths:
                    for case in cases(backend, config, B, T, dtype):
                        products = case.cost.products
                        if settings.only in case.op and (products or dtype == settings.dtypes[0]):
                            progress(f"{case.op} {case.shape} {dtype}")
                            chosen = isas if products and dtype == "bf16" else distinct
                            rows += _take_turns(case, chosen, settings, memory)
                        del case  # with its arrays, before the next one's are made
    return rows


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
    rows = []
    for isa in isas:
        ms = Spread.of([1e3 * seconds for seconds in took[isa]])
        ratios = [case.cost.amount / s / peak for s, peak in zip(took[isa], peaks[isa], strict=True)]
        rows.append(
            KernelRow(
                case.op, case.shape, case.dtype if case.cost.products else "fp32", isa, case.cost.unit, ms,
                case.cost.amount / ms.median / 1e6, statistics.median(peaks[isa]) / 1e9, statistics.median(ratios),
                len(took[isa]),
            )
        )  # fmt: skip
    return rows


# ---- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRow:
    """A training step of one configuration, in a process of its own."""

    init: str
    B: int
    T: int
    dtype: str
    isa: str
    threads: int
    ms: Spread  # a step
    forward_ms: float  # medians; the head's backward belongs to the forward pass
    backward_ms: float
    update_ms: float
    tokens_per_second: float  # at the median
    mfu: float  # the step's products at the peak measured beside it / the step: the median of the turns' ratios
    peak_gflops: float
    peak_mib: float  # the most memory that the process ever held
    first_step_seconds: float  # from the start of the process to the end of its first step
    steps: int  # timed


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


def flops_per_token(config: Config, T: int) -> float:
    """Of a training step's products: 6 N for the N weights that multiply (wte as the head; wpe and vectors do not),
    and 6 L C T for causal attention, whose scores backward computes once more and which is not counted."""
    C, L = config.channels, config.num_layers
    return 6.0 * (config.vocab_size * C + 12 * L * C * C) + 6.0 * L * C * T


class Program:
    """A model in training on random batches: llmc's side of a comparison."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = c = configuration
        self.model = loading.load(c.init, isa=c.isa, threads=c.threads, dtype=c.dtype, seed=c.seed)
        self.model.prepare(c.B, c.T, c.recompute)
        assert self.model.grads is not None
        self.optimizer = AdamW(self.model.params.table, self.model.params, self.model.grads, self.model.ops, **RECIPE)

    def step(self, number: int) -> tuple[float, list[float]]:
        """One step: its loss, and the times at which it began, and had done forward, backward and update."""
        c = self.configuration
        x, y = data.random_batch(self.model.config.vocab_size, c.B, c.T, c.seed, number)
        times = [time.perf_counter()]
        loss = self.model.forward(x, y)
        times.append(time.perf_counter())
        self.model.backward()
        times.append(time.perf_counter())
        self.optimizer.step(LEARNING_RATE)
        times.append(time.perf_counter())
        return loss, times


def _train(pipe: Connection, configuration: Configuration) -> None:
    """A process: a step for each number received, None to end.  Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        program = Program(configuration)
        backend: Any = program.model.ops
        what = REGISTERS[configuration.dtype]
        first = True
        while (number := pipe.recv()) is not None:
            before = 0.0 if first else measure(backend, what)
            loss, times = program.step(number)
            if first:  # the parent looks at its clock
                pipe.send(loss)
                first = False
                continue
            pipe.send((loss, times, (before + measure(backend, what)) / 2))
        pipe.send((machine.memory()["peak"], backend.info()))
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
        self.took: list[list[float]] = []
        self.peaks: list[float] = []
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
        _, times, peak = self.ask(number)
        if keep:
            self.took.append([b - a for a, b in itertools.pairwise(times)])
            self.peaks.append(peak)

    def row(self) -> TrainingRow:
        peak_mib, info = self.ask(None)
        self.process.join()
        c = self.configuration
        steps = [sum(parts) for parts in self.took]
        work = c.B * c.T * flops_per_token(preset(c.init), c.T)
        forward, backward, update = (1e3 * statistics.median(part) for part in zip(*self.took, strict=True))
        return TrainingRow(
            c.init, c.B, c.T, c.dtype, info["isa"], info["threads"], Spread.of([1e3 * step for step in steps]),
            forward, backward, update, c.B * c.T / statistics.median(steps),
            statistics.median([work / step / peak for step, peak in zip(steps, self.peaks, strict=True)]),
            statistics.median(self.peaks) / 1e9, peak_mib, self.first, len(steps),
        )  # fmt: skip


def training(settings: Settings, progress: Progress = _silent) -> list[TrainingRow]:
    """A training step of every configuration.  Those of one batch size and length take turns, step by step, and
    are in memory together."""
    from llmc.training import TrainConfig, require_memory  # not for who only wants a Program

    with _checked(settings):
        pass
    rows: list[TrainingRow] = []
    for B in settings.batch_sizes:
        for T in settings.sequence_lengths:
            require_memory(
                TrainConfig(init=settings.init, batch_size=B, sequence_length=T, val_every=0, sample_every=0)
            )  # fmt: skip
            processes: list[_Process] = []
            try:
                for dtype in settings.dtypes:
                    for isa in settings.isas or (None,):
                        configuration = Configuration(settings.init, B, T, dtype, isa, settings.threads)
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
            if not process.took or sum(map(sum, process.took)) < settings.seconds:
                process.step(number, keep=number > settings.warmup)
