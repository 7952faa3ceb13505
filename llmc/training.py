"""The training loop: a configuration in, events out.

    for event in train(TrainConfig(init="d12", train_data="data/tiny_shakespeare_train.bin")):
        print(event)

`train` prints nothing and parses nothing: the command line shows its events, tests compare them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO, cast

from llmc import evaluation, loading, lora, memory, peft, profiling, recipes, sampling, schedule
from llmc import ops as contract
from llmc.adamw import AdamW
from llmc.arena import Array
from llmc.data import Shards, find_shards
from llmc.errors import ConfigError, DivergenceError
from llmc.lora import LoRA
from llmc.model import Config, Model, check_recompute
from llmc.ops import DTYPES, Ops
from llmc.profiling import Profile, Profiled
from llmc.stories import Stories

VALIDATION_SEED = 0  # of the held-out stories: one fixed text, so losses of different runs compare


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run: the options of `llmc train` and the keys of its TOML files.

    The defaults suit short runs of GPT-2 on prepared token files; `TrainConfig.recipe("stories")` is the
    embedded run that needs no files.  ConfigError, naming the field, where a value makes no sense.
    """

    init: str = "stories"  # model .bin, Hugging Face folder or name, preset, d12
    train_data: str = ""  # token files, a name or a pattern; "": stories the package writes itself
    val_data: str = ""
    out: str = ""  # folder for the model, run.toml and metrics.jsonl; "": nothing is written
    batch_size: int = 4  # sequences per forward pass
    sequence_length: int = 64  # tokens per sequence
    total_batch: int = 0  # tokens per update, a multiple of batch_size * sequence_length; 0: that product
    steps: int = 100  # updates; -1: one pass over the training data
    lr: float = 3e-4
    schedule: str = "constant"
    warmup: int = 0  # updates over which the learning rate rises
    final_lr_fraction: float = 0.0  # of lr, where the schedule ends
    weight_decay: float = 0.0  # on matrices alone
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: off
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    val_every: int = 20  # updates; 0: never
    val_batches: int = 20
    sample_every: int = 20  # updates; 0: never
    sample_length: int = 64  # tokens
    overfit: bool = False  # the first batch again and again
    shuffle: bool = False  # the training data's windows in an order drawn from the seed
    lora_rank: int = 0  # of the adapters that are trained in place of the weights; 0: the weights are trained
    lora_alpha: float = 16.0  # alpha / rank is what an adapter's output is multiplied by
    lora_targets: str = "all"  # modules that get one: q_proj,v_proj; all: every matrix of the layers
    recompute: str = "none"  # what the backward pass makes again, to save memory: one of model.RECOMPUTE
    dtype: str = "fp32"  # of the operands of matrix products: fp32, bf16, or on a GPU tf32
    masters: bool = True  # weights in fp32 beside the bf16 that a GPU computes with; else bf16 rounded stochastically
    device: str = "cpu"  # cpu, cuda, or of several GPUs cuda:1
    gemm: str = ""  # on a GPU, who multiplies matrices: cublaslt or own; "": cublaslt
    attention: str = ""  # on a GPU: own or cudnn; "": cudnn where it is installed
    threads: int = 0  # 0: OMP_NUM_THREADS, else the physical cores
    isa: str = ""  # "": LLMC_ISA, else the best this CPU has
    seed: int = 0  # of the initial weights, the samples and the order of the data

    def __post_init__(self) -> None:
        for name, kind in TrainConfig.types().items():
            object.__setattr__(self, name, recipes.typed(name, getattr(self, name), kind))
        for name in ("batch_size", "sequence_length", "val_batches", "sample_length"):
            self._at_least(name, 1)
        for name in (
            "total_batch", "lr", "warmup", "final_lr_fraction", "weight_decay", "grad_clip", "beta1", "beta2",
            "val_every", "sample_every", "threads", "seed", "lora_rank",
        ):  # fmt: skip
            self._at_least(name, 0)
        self._at_least("steps", -1)
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(name, f"must be less than 1, got {getattr(self, name)}")
        if not self.eps > 0 or math.isinf(self.eps):
            raise ConfigError("eps", f"must be a number above 0, got {self.eps}")
        if self.total_batch % (self.batch_size * self.sequence_length):
            raise ConfigError(
                "total_batch",
                f"{self.total_batch} is not a multiple of batch_size * sequence_length = "
                f"{self.batch_size} * {self.sequence_length} = {self.batch_size * self.sequence_length}",
            )
        schedule.check(self.schedule)
        check_recompute(self.recompute)
        if self.dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ConfigError("dtype", f"{self.dtype!r} is unknown; choose from {known}")
        if self.seed >= 1 << 64:
            raise ConfigError("seed", f"must be less than 2^64, got {self.seed}")
        if not self.masters and (self.dtype != "bf16" or self.device == "cpu"):
            raise ConfigError("masters", "0 is for bf16 on a GPU; elsewhere weights are fp32 as it is: set it to 1")
        if self.lora_rank and not self.masters:
            raise ConfigError("masters", "0 is for training the weights; adapters have masters: set it to 1")
        self.lora  # noqa: B018  checked before anything is loaded
        for name in ("lora_alpha", "lora_targets"):
            if not self.lora_rank and getattr(self, name) != getattr(TrainConfig, name):
                raise ConfigError(name, "means nothing without adapters: give lora_rank")
        if self.val_data and not self.train_data:
            raise ConfigError("val_data", "is given without train_data")

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not low <= value < math.inf:
            raise ConfigError(name, f"must be at least {low}, got {value}")

    @staticmethod
    def types() -> dict[str, type]:
        """The type of every field."""
        return {field.name: type(field.default) for field in fields(TrainConfig)}

    @staticmethod
    def recipe(name_or_path: str | os.PathLike[str], **changes: Any) -> TrainConfig:
        """The recipe of that name, or a TOML file, with `changes`; ConfigError names the file and the key."""
        return TrainConfig(**{**recipes.load(name_or_path, TrainConfig.types()), **changes})

    @property
    def lora(self) -> LoRA | None:
        """The adapters to train, or None."""
        targets = tuple(target.strip() for target in self.lora_targets.split(","))
        return LoRA(self.lora_rank, self.lora_alpha, targets) if self.lora_rank else None

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per update."""
        return max(1, self.total_batch // (self.batch_size * self.sequence_length))

    @property
    def tokens_per_update(self) -> int:
        return self.micro_batches * self.batch_size * self.sequence_length


# ---- events ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """The first event: what is about to be trained, on what."""

    model: Config
    parameters: int
    trained: int  # of them, or of adapters beside them
    activations: int  # numbers kept per forward pass, all tensors together
    activation_bytes: int
    steps: int
    tokens_per_update: int
    train_batches: int | None  # of batch_size * sequence_length tokens; None: unlimited
    val_batches: int | None  # None: unlimited; 0: there is no validation data
    backend: dict[str, Any]  # what the device says of itself: isa, threads


@dataclass(frozen=True)
class Step:
    """Update number `step` (from 0) is done.  On a GPU the next one may be under way by then."""

    step: int
    loss: float  # nats per token, before the update
    norm: float  # of the gradient, before clipping
    lr: float
    seconds: float  # since the update before it was done, or since this one began
    tokens_per_second: float


@dataclass(frozen=True)
class Validation:
    """The loss on held-out text after `step` updates.

    `floor` is what a model that knew the text's grammar would have scored on the same text, where that is
    known (the embedded stories), else None.
    """

    step: int
    loss: float
    floor: float | None = None


@dataclass(frozen=True)
class Sample:
    """What the model writes from nothing after `step` updates; no `text` where no tokenizer is known."""

    step: int
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Saved:
    """The last event where there is a folder to write to: the model after `step` updates lies in `folder`."""

    step: int
    folder: str


Event = Started | Step | Validation | Sample | Profile | Saved


# ---- the loop --------------------------------------------------------------------------------------


def train(
    config: TrainConfig | None = None, model: Model | None = None, *, stop: Callable[[], bool] | None = None,
    profile: bool = False,
) -> Iterator[Event]:
    """Train as `config` says (None: the recipe `stories`), yielding events.

    `model`, if given, is trained in place with the backend it has: `config.init`, `device`, `threads`, `isa`, `gemm`,
    `attention` and `masters` are only noted, and another `dtype` than the backend's is a ConfigError.  Else it is
    loaded.  `stop` is asked before every update whether to end the run early, which then saves its model like any
    other.  With `profile` the ops are timed, which changes no result, and after the last update comes a `Profile`.

    Validation and sampling happen when the number of updates done is a multiple of their interval:
    validation at 0 too, and both after the last update only if its count is such a multiple.

    Raises ConfigError or another LlmcError before the first update for whatever cannot work, and before anything
    is allocated where the machine has less memory than the run takes (`memory_plan`);
    DivergenceError when a loss or a norm is not finite.  That update is not applied, and the model in
    `config.out`, if there was one, is left as it was.  On a GPU the update after it may have been on its way, and is
    applied to the model in memory if its own numbers are finite.
    """
    if config is None:
        config = TrainConfig.recipe("stories")
    return _run(config, model, stop or (lambda: False), profile)


def _run(config: TrainConfig, model: Model | None, stop: Callable[[], bool], profile: bool) -> Iterator[Event]:
    _check_inputs(config)
    adapters = _adapters(config, model)
    if model is not None:
        _require_dtype(config, model)
        if model.frozen and adapters is None:
            raise ConfigError("lora_rank", "the model's matrices are kept in bfloat16: train adapters, or load it anew")
    if adapters is not None and config.out:
        if loading.is_preset(config.init) if model is None else not model.source:
            raise ConfigError("lora_rank", "adapters belong to a model that can be loaded again; this one is random")
        peft.check_place(config.out)
    require_memory(config, model, profile)
    if model is None:
        model = loading.load(
            config.init, ops=_backend(config), seed=config.seed, masters=config.masters and adapters is None,
            narrow=config.dtype == "bf16" and adapters is not None,
        )  # fmt: skip
    if config.lora is not None and model.adapters is None:
        lora.attach(model, config.lora, config.seed)
    if config.lora is not None and config.lora != model.adapters.lora:
        raise ConfigError("lora_rank", f"{config.init} has adapters already: {model.adapters.lora}; leave it out")
    B, T = config.batch_size, config.sequence_length
    if samples := _sample_length(config):  # recordings hold on to the workspace they were made with
        longest = max(B * T, sampling.longest(model.config, samples))
        model.ops.reserve(**model.config.workspace(1, longest))
        sampling.end_of_text(model)  # a tokenizer that cannot be had, or has none, is told before the first update
        if model.adapters is not None:
            model.adapters.grow(longest)
    elif config.out and model.folder:
        model.tokenizer  # noqa: B018  so is one that is damaged: it would be in the way when the model is saved
    model.prepare(B, T, config.recompute)
    data, held_out = _open_data(config, model)
    steps = _steps(config, data)
    trained = model if model.adapters is None else model.adapters
    if trained is model:
        model.source = ""  # these are other weights from the first update on
    assert trained.grads is not None and model.acts is not None
    profiled = Profiled(model.ops, steps) if profile else None
    ops = model.ops if profiled is None else cast(Ops, profiled)
    optimizer = AdamW(
        trained.params.table, trained.params, trained.grads, ops, weights=trained.weights, loss=model.total,
        beta1=config.beta1, beta2=config.beta2, eps=config.eps, weight_decay=config.weight_decay,
        grad_clip=config.grad_clip, seed=config.seed,
    )
    ahead = 0 if profile else ops.info()["ahead"]
    under_way: deque[_Update] = deque()
    with _Output(config) as output, _using(model, ops):
        yield Started(
            model=model.config,
            parameters=model.config.num_parameters,
            trained=sum(row.size for row in trained.params.table) if model.adapters else model.config.num_parameters,
            activations=sum(row.size for row in model.acts.table),
            activation_bytes=model.acts.nbytes,
            steps=steps,
            tokens_per_update=config.tokens_per_update,
            train_batches=data.num_batches,
            val_batches=0 if held_out is None else held_out.num_batches,
            backend=model.ops.info(),
        )
        step, done = 0, 0.0

        def finished(most: int) -> Iterator[Step]:
            """The results of all updates but the last `most`, as they come."""
            nonlocal done
            while len(under_way) > most:
                event, done = under_way.popleft().finish(config, done)
                output.log(asdict(event))
                yield event

        while True:
            if config.val_every and step % config.val_every == 0 and held_out is not None:
                event = _validate(config, model, held_out, step)
                output.log({"step": step, "val_loss": event.loss})
                yield event
            if config.sample_every and step > 0 and step % config.sample_every == 0:
                yield _sample(config, model, step)
            if step == steps or stop():
                break
            with contextlib.nullcontext() if profiled is None else profiled.step():
                under_way.append(_update(config, model, optimizer, data, step, steps))
            step += 1
            yield from finished(0 if _looks(config, step, steps) else ahead)
        yield from finished(0)
        if profiled is not None and step > 0:
            yield profiled.report()
        if config.out:
            ops.global_norm(optimizer.norm, trained.params.flat)
            _require_finite(float(ops.fetch(optimizer.norm)()[0]), "weights' norm", step, "not saved")
            output.save(model)
            yield Saved(step, config.out)


@contextlib.contextmanager
def _using(model: Model, ops: Ops) -> Iterator[None]:
    before, model.ops = model.ops, ops
    try:
        yield
    finally:
        model.ops = before


def _looks(config: TrainConfig, step: int, steps: int) -> bool:
    """Whether the model is looked at after `step` updates: by a validation, a sample, or because it was the last."""
    intervals = (config.val_every, config.sample_every)
    return step == steps or any(interval and step % interval == 0 for interval in intervals)


@dataclass(frozen=True)
class _Update:
    """An update that the device has been given, and what it will tell."""

    step: int
    lr: float
    began: float
    loss: Callable[[], Array]
    norm: Callable[[], Array]

    def finish(self, config: TrainConfig, before: float) -> tuple[Step, float]:
        """Wait for it, `before` being when the update before it was done; and when this one was.  DivergenceError where
        its loss or norm is not finite: the device has not applied it."""
        loss = float(self.loss()[0])
        norm = float(self.norm()[0])
        done = time.perf_counter()
        _require_finite(loss, "loss", self.step, "the update was not applied")
        _require_finite(norm, "gradient norm", self.step, "the update was not applied")
        seconds = done - max(self.began, before)
        return Step(self.step, loss, norm, self.lr, seconds, config.tokens_per_update / seconds), done


def _update(
    config: TrainConfig, model: Model, optimizer: AdamW, data: evaluation.Batches, step: int, steps: int
) -> _Update:
    """Update number `step`: gradients of the mean loss over all micro batches, clipped, applied."""
    began = time.perf_counter()
    _require_dtype(config, model)
    if config.overfit:
        data.reset()
    scale = 1.0 / config.tokens_per_update
    for micro in range(config.micro_batches):
        model.gradients(*data.next(), scale=scale, accumulate=micro > 0)
    lr = schedule.learning_rate(
        step, kind=config.schedule, lr=config.lr, warmup=config.warmup, steps=steps,
        final_fraction=config.final_lr_fraction,
    )  # fmt: skip
    optimizer.step(lr)
    return _Update(step, lr, began, model.ops.fetch(model.total), model.ops.fetch(optimizer.norm))


def _require_dtype(config: TrainConfig, model: Model) -> None:
    """The precision is the process's: a caller who loads another model between two events may have changed it."""
    found = model.ops.info()["dtype"]
    if found != config.dtype:
        detail = f"{config.dtype!r} was asked for, but this process computes in {found!r}"
        raise ConfigError("dtype", f"{detail}: llmc.load(..., dtype={config.dtype!r}) would load a model for it")


def _validate(config: TrainConfig, model: Model, held_out: Shards | Stories, step: int) -> Validation:
    batches = min(config.val_batches, held_out.num_batches or config.val_batches)
    loss = evaluation.mean_loss(model, held_out, batches)
    _require_finite(loss, "validation loss", step, "training stopped")
    return Validation(step, loss, held_out.floor(batches) if isinstance(held_out, Stories) else None)


def _sample(config: TrainConfig, model: Model, step: int) -> Sample:
    tokens = sampling.generate(model, [], config.sample_length, seed=config.seed + step)
    return Sample(step, model.tokenizer.decode(tokens) if model.tokenizer else "", tuple(tokens))


def _require_finite(value: float, what: str, step: int, consequence: str) -> None:
    if not math.isfinite(value):
        raise DivergenceError(f"step {step}: the {what} is {value}; {consequence}")


# ---- memory ----------------------------------------------------------------------------------------


def memory_plan(config: TrainConfig, profile: bool = False) -> memory.Plan:
    """What `train(config, profile=profile)` will allocate, to the byte.

    No arena is made, and of models and token files only headers are read.  Raises the errors of `train`, as far
    as they show by then.
    """
    _check_inputs(config)
    ops = _backend(config)
    return _plan(config, loading.read_config(config.init), ops, ops.info()["storage"], profile, None)


def memory_of(config: TrainConfig) -> memory.Machine:
    """The memory that a run will be in: the GPU's, or this machine's."""
    return memory.device(_backend(config))


def require_memory(config: TrainConfig, model: Model | None = None, profile: bool = False) -> None:
    """ConfigError, saying what would fit, where this machine has less memory available than `train` will take with
    the same arguments."""
    if model is None:
        ops, shape, held = _backend(config), loading.read_config(config.init), 0
        dtype = ops.info()["storage"]
    else:
        ops, shape, dtype = model.ops, model.config, model.dtype
        held = model.nbytes + sum(ops.workspace_nbytes(**shape.workspace(1, 1)).values())

    def make(B: int, recompute: str) -> memory.Plan:
        smaller = replace(config, batch_size=B, recompute=recompute, total_batch=0)
        return _plan(smaller, shape, ops, dtype, profile, model)

    sequences = config.total_batch // config.sequence_length
    memory.require(make, config.batch_size, config.recompute, memory.device(ops), sequences=sequences, held=held)


def _plan(
    config: TrainConfig, shape: Config, ops: contract.Ops, dtype: str, profile: bool, model: Model | None
) -> memory.Plan:
    B, T, adapters = config.batch_size, config.sequence_length, _adapters(config, model)
    if model is None:  # products round what is not trained to bfloat16 anyway: on a CPU it is then kept so
        narrow, masters = adapters is not None and config.dtype == "bf16", config.masters
    else:
        narrow, masters = model.params.wte.dtype.name == "bfloat16", model.weights is not model.params
    if config.train_data:
        batch, order = Shards.nbytes(config.train_data, B, T, shuffle=config.shuffle)
    else:
        batch, order = Stories.nbytes(B, T)
    return memory.plan(
        shape, ops, B, T, dtype=dtype, masters=masters or adapters is not None, recompute=config.recompute,
        lora=adapters, narrow=narrow and adapters is not None and dtype == "float32",
        sample_length=_sample_length(config),
        data=2 * batch + order,  # one batch is still held while the next is read
        profile=profiling.memory_nbytes(ops) if profile else 0,
    )  # fmt: skip


def _adapters(config: TrainConfig, model: Model | None) -> LoRA | None:
    """Those that a run trains: new ones, or those that its model has, or brings with it."""
    if model is not None:
        return config.lora if model.adapters is None else model.adapters.lora
    return config.lora or loading.read_adapters(config.init)


def _sample_length(config: TrainConfig) -> int:
    """Tokens of each sample; 0 for a run that takes none."""
    samples = config.sample_every > 0 and not 0 <= config.steps < config.sample_every
    return config.sample_length if samples else 0


def _backend(config: TrainConfig) -> contract.Ops:
    return contract.load(
        config.device, isa=config.isa or None, threads=config.threads or None, dtype=config.dtype,
        gemm=config.gemm or None, attention=config.attention or None,
    )  # fmt: skip


# ---- data ------------------------------------------------------------------------------------------


def _check_inputs(config: TrainConfig) -> None:
    """What can be told in no time, before a large model is read."""
    for field in ("train_data", "val_data"):
        pattern = getattr(config, field)
        if pattern:
            try:
                find_shards(pattern)
            except ConfigError:
                raise ConfigError(
                    field,
                    f"no file matches {pattern!r}; `llmc data tinyshakespeare` writes "
                    "data/tiny_shakespeare_train.bin and data/tiny_shakespeare_val.bin",
                ) from None
    if config.out:
        existing = Path(config.out).absolute()
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise ConfigError("out", f"{config.out}: {existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError("out", f"{config.out}: {existing} is not writable")


def _open_data(config: TrainConfig, model: Model) -> tuple[Shards | Stories, Shards | Stories | None]:
    """Training data and, where there is any, validation data."""
    B, T, V = config.batch_size, config.sequence_length, model.config.vocab_size
    if not config.train_data:
        if V != Stories.vocab_size or getattr(model.tokenizer, "name", "") != "bytes":
            raise ConfigError(
                "train_data",
                f"the model {config.init!r} needs text to train on; `llmc data tinyshakespeare` makes some "
                "for GPT-2, then: --train-data data/tiny_shakespeare_train.bin "
                "--val-data data/tiny_shakespeare_val.bin",
            )
        return (
            Stories(B, T, seed=config.seed, split="train"),
            Stories(B, T, seed=VALIDATION_SEED, split="val"),
        )
    seed = config.seed if config.shuffle else None
    data = Shards(config.train_data, B, T, shuffle_seed=seed, vocab_size=V)
    held_out = Shards(config.val_data, B, T, vocab_size=V) if config.val_data else None
    for shards in (data, held_out):
        if shards is not None:  # a vocabulary that does not match shows in the first batch: before anything is written
            shards.next()
            shards.reset()
    return data, held_out


def _steps(config: TrainConfig, data: Shards | Stories) -> int:
    if config.steps >= 0:
        return config.steps
    if data.num_batches is None:
        raise ConfigError("steps", "-1 means one pass over the training data; the embedded stories never end")
    return max(1, data.num_batches // config.micro_batches)


# ---- output ----------------------------------------------------------------------------------------


class _Output:
    """The folder `config.out`: run.toml and metrics.jsonl from the start, the model at the end.

    A run owns its metrics: those of an earlier run in the same folder are replaced.  An earlier model stays
    until the new one is whole.  ConfigError where the folder cannot be made or written to.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.metrics: TextIO | None = None

    def __enter__(self) -> _Output:
        if not self.config.out:
            return self
        folder = Path(self.config.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            recipes.write(folder / "run.toml", asdict(self.config))
            self.metrics = open(folder / "metrics.jsonl", "w", encoding="utf-8")
        except OSError as error:
            raise ConfigError("out", f"{self.config.out} cannot be written to: {error.strerror}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if self.metrics is not None:
            # Every line was flushed; one that could not be was reported, and would fail here once more.
            with contextlib.suppress(OSError):
                self.metrics.close()

    def log(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl, on its way to the disk before the next step begins."""
        if self.metrics is None:
            return
        try:
            self.metrics.write(json.dumps(row, allow_nan=False) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise ConfigError("out", f"cannot write {self.metrics.name}: {error.strerror}") from error

    def save(self, model: Model) -> None:
        loading.save(model, self.config.out, getattr(model.tokenizer, "name", ""))
