"""One GPT-2 training step, forward, backward and update, in llmc and in PyTorch, fp32 on the CPU.

    python bench/training.py                       # GPT-2 124M, B=4, T=64
    python bench/training.py --init d2 --repeats 1 # does it run?

Each program is a process of its own, so that its peak memory is its own and no two OpenMP runtimes meet.
They start from the same weights (one model file), see the same batches, and take turns step by step, so
that whatever else the machine does falls on all of them.  Nothing is printed unless their losses agree.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import machine
import numpy as np

from llmc import loading, ops
from llmc.adamw import AdamW
from llmc.errors import LlmcError
from llmc.gpt2 import LAYERNORM_EPS, Config, parameter_rows, preset

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_DIFFERENCE = 1e-4  # of two losses of the same step
HEADER_BYTES = 1024  # of the model file
RECIPE = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}  # decay on matrices


class Settings(NamedTuple):
    """What a worker is told."""

    init: str
    B: int
    T: int
    threads: int
    seed: int
    weights: str
    compiled: bool = False

    def batch(self, step: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Tokens and targets (B, T) int32 of one step: random, and the same for every program."""
        random = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 0, step]))
        ids = random.integers(preset(self.init).vocab_size, size=(self.B, self.T + 1)).astype(np.int32)
        return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


class Program(Protocol):
    """Something that trains."""

    def step(self, number: int) -> tuple[float, list[float]]:
        """One step: its loss, and the times at which it began, and had done forward, backward and update."""


# ---- llmc ------------------------------------------------------------------------------------------


class Llmc:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = loading.load(settings.weights, threads=settings.threads)
        self.model.prepare(settings.B, settings.T)
        assert self.model.grads is not None
        others = {name: value for name, value in RECIPE.items() if name != "lr"}
        self.optimizer = AdamW(
            self.model.params.table, self.model.params, self.model.grads, self.model.ops, **others
        )

    def step(self, number: int) -> tuple[float, list[float]]:
        x, y = self.settings.batch(number)
        times = [time.perf_counter()]
        loss = self.model.forward(x, y)
        times.append(time.perf_counter())
        self.model.backward(x)
        times.append(time.perf_counter())
        self.optimizer.step(RECIPE["lr"])
        times.append(time.perf_counter())
        return loss, times


# ---- PyTorch ---------------------------------------------------------------------------------------


class PyTorch:
    """GPT-2 as one writes it in PyTorch: modules, scaled_dot_product_attention, fused AdamW.

    Its parameters are leaves per layer, not slices of stacked tensors as in llmc/torch_reference.py:
    the gradient of a slice is a tensor of the whole stack's size, which would cost PyTorch time.
    """

    def __init__(self, settings: Settings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self.settings = settings
        self.config = preset(settings.init)
        self.p = self._read(settings.weights)
        matrices = [t for t in self.p.values() if t.dim() == 2]
        others = [t for t in self.p.values() if t.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": RECIPE["weight_decay"]},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=RECIPE["lr"], betas=(RECIPE["beta1"], RECIPE["beta2"]), eps=RECIPE["eps"], fused=True,
        )  # fmt: skip
        self.loss = torch.compile(self._loss) if settings.compiled else self._loss

    def _read(self, path: str) -> dict[str, Tensor]:
        """Leaf tensors `name` or `name.layer` from llm.c's model file, the vocabulary without its padding."""
        import torch

        made = {}
        with open(path, "rb") as file:
            file.seek(HEADER_BYTES)
            for row in parameter_rows(self.config):
                for layer in range(max(1, row.layers)):
                    count = int(np.prod(row.shape))
                    values = np.fromfile(file, "<f4", count).reshape(row.shape)
                    if row.name == "wte":
                        values = values[: self.config.vocab_size]
                    name = f"{row.name}.{layer}" if row.layers else row.name
                    made[name] = torch.from_numpy(values).requires_grad_()
        return made

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        from torch.nn import functional as F

        p, C, H = self.p, self.config.channels, self.config.num_heads
        B, T = tokens.shape

        def norm(x: Tensor, name: str, layer: str = "") -> Tensor:
            return F.layer_norm(x, (C,), p[f"{name}w{layer}"], p[f"{name}b{layer}"], LAYERNORM_EPS)

        def linear(x: Tensor, name: str, layer: str) -> Tensor:
            return F.linear(x, p[f"{name}w{layer}"], p[f"{name}b{layer}"])

        x = F.embedding(tokens, p["wte"]) + p["wpe"][:T]
        for i in range(self.config.num_layers):
            at = f".{i}"
            q, k, v = linear(norm(x, "ln1", at), "qkv", at).split(C, dim=2)
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + linear(mixed.transpose(1, 2).reshape(B, T, C), "attproj", at)
            hidden = F.gelu(linear(norm(x, "ln2", at), "fc", at), approximate="tanh")
            x = x + linear(hidden, "fcproj", at)
        logits = F.linear(norm(x, "lnf"), p["wte"])
        return F.cross_entropy(logits.view(B * T, -1), targets.view(-1))

    def step(self, number: int) -> tuple[float, list[float]]:
        import torch

        x, y = (torch.from_numpy(ids.astype(np.int64)) for ids in self.settings.batch(number))
        times = [time.perf_counter()]
        loss = self.loss(x, y)
        value = loss.item()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return value, times


# ---- processes -------------------------------------------------------------------------------------


def work(kind: str, settings: Settings, pipe: Connection) -> None:
    """A worker: a number in, that step's loss and times out, until None comes; then its memory."""
    if kind == "llmc":
        ops.load("cpu")
    else:
        import torch  # noqa: F401  so that `before` holds the library
    before = machine.memory()["now"]
    program: Program = Llmc(settings) if kind == "llmc" else PyTorch(settings)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(program.step(number))
    pipe.send({"before": before, "peak": machine.memory()["peak"]})


class Worker:
    def __init__(self, name: str, kind: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(kind, settings, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is noticed
        self.losses: list[float] = []
        self.times: list[list[float]] = []
        self.memory: dict[str, float] = {}

    def receive(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            sys.exit(f"bench: {self.name} ended with status {self.process.exitcode}")

    def step(self, number: int, keep: bool) -> None:
        self.pipe.send(number)
        loss, times = self.receive()
        self.losses.append(loss)
        if keep:
            self.times.append(times)

    def finish(self) -> None:
        self.pipe.send(None)
        self.memory = self.receive()
        self.process.join()


def measure(args: argparse.Namespace, threads: int) -> list[Worker]:
    """Run all programs, in turns.  Every round begins with another one of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.bin")
        loading.save_bin(loading.load(args.init, seed=args.seed), path)
        settings = Settings(args.init, args.batch_size, args.sequence_length, threads, args.seed, path)
        kinds = [("llmc", "llmc", settings), ("PyTorch eager", "torch", settings)]
        if args.torch_compile:
            kinds.append(("PyTorch compile", "torch", settings._replace(compiled=True)))
        workers = []
        for name, kind, their in kinds:  # one after another: reading weights is work too
            workers.append(Worker(name, kind, their))
            workers[-1].receive()
    for number in range(args.warmup + args.repeats):
        first = number % len(workers)
        for worker in workers[first:] + workers[:first]:
            worker.step(number, keep=number >= args.warmup)
    for worker in workers:
        worker.finish()
    return workers


def largest_difference(workers: list[Worker]) -> float:
    """Between llmc's loss and any other program's, over all steps; nan where a loss is."""
    losses = np.array([worker.losses for worker in workers])
    return float(np.max(np.abs(losses - losses[0])))


# ---- the report ------------------------------------------------------------------------------------


def summary(worker: Worker, ours: Worker, tokens: int) -> dict[str, Any]:
    """A program's figures; times in ms."""
    parts = 1e3 * np.diff(np.array(worker.times), axis=1)
    steps, reference = parts.sum(axis=1), 1e3 * np.diff(np.array(ours.times), axis=1).sum(axis=1)
    median = float(np.median(steps))
    return {
        "program": worker.name,
        "median": median,
        "min": float(steps.min()),
        "quartiles": [float(q) for q in np.percentile(steps, [25, 75])],
        "forward": float(np.median(parts[:, 0])),
        "backward": float(np.median(parts[:, 1])),
        "update": float(np.median(parts[:, 2])),
        "tokens_per_second": 1e3 * tokens / median,
        "ratio": statistics.median(steps / reference),
        "peak_mib": worker.memory["peak"],
        "before_mib": worker.memory["before"],
        "steps_ms": [float(step) for step in steps],
        "losses": worker.losses,
    }


COLUMNS = [
    "program", "step, ms", "min", "quartiles", "forward", "backward", "update", "tok/s", "time / llmc's",
    "peak MiB", "of which libraries",
]  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    rows = [
        [
            row["program"], f"{row['median']:.1f}", f"{row['min']:.1f}",
            " to ".join(f"{q:.1f}" for q in row["quartiles"]), f"{row['forward']:.1f}",
            f"{row['backward']:.1f}", f"{row['update']:.1f}", f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}", f"{row['peak_mib']:.0f}", f"{row['before_mib']:.0f}",
        ]
        for row in report["programs"]
    ]  # fmt: skip
    run = report["run"]
    title = (
        f"{run['init']}, B={run['B']}, T={run['T']}, fp32: medians of {run['repeats']} steps after "
        f"{run['warmup']} for warming up; losses agree within {run['largest_difference']:.1e}."
    )
    facts = "; ".join(f"{name}: {value}" for name, value in report["machine"].items())
    return f"{title}\n\n{machine.table(COLUMNS, rows)}\n\n{facts}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--init", default="d12", help="a preset of llmc, weights random (d12)")
    parser.add_argument("--batch-size", "-B", type=int, default=4, metavar="N", help="sequences (4)")
    parser.add_argument("--sequence-length", "-T", type=int, default=64, metavar="N", help="tokens each (64)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="steps that are timed (15)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them (3)")
    parser.add_argument("--threads", type=int, metavar="N", help="of each program (the physical cores)")
    parser.add_argument("--torch-compile", action="store_true", help="PyTorch compiled too")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    parser.add_argument("--output", "-o", choices=("md", "json"), default="md", help="format (md)")
    args = parser.parse_args()
    for name in ("batch_size", "sequence_length", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if args.warmup < 0:
        parser.error("--warmup: must be at least 0")
    if not loading.is_preset(args.init):
        parser.error(f"--init: {args.init!r} is no preset with random weights: d12, d2, stories, tiny ...")
    return args


def main() -> None:
    args = arguments()
    if machine.installed("torch") == "not installed":
        sys.exit("bench: PyTorch is not installed: pip install '.[reference]'")
    try:
        config: Config = preset(args.init)
        facts = machine.facts(args.threads)
        if args.sequence_length > config.max_seq_len:
            sys.exit(f"bench: --sequence-length: {args.init} has {config.max_seq_len} positions")
        workers = measure(args, facts["threads"])
    except LlmcError as error:
        sys.exit(f"bench: {error}")
    difference = largest_difference(workers)
    if not difference <= LARGEST_DIFFERENCE:
        lines = [f"{worker.name}: {', '.join(f'{loss:.6f}' for loss in worker.losses)}" for worker in workers]
        sys.exit("\n".join([f"bench: the losses differ by {difference:.1e}, so no times are given", *lines]))
    tokens = args.batch_size * args.sequence_length
    report = {
        "run": {
            "init": args.init, "parameters": config.num_parameters, "B": args.batch_size,
            "T": args.sequence_length, "repeats": args.repeats, "warmup": args.warmup,
            "largest_difference": difference, **RECIPE,
        },
        "machine": facts,
        "programs": [summary(worker, workers[0], tokens) for worker in workers],
    }  # fmt: skip
    print(json.dumps(report, indent=2) if args.output == "json" else markdown(report))


if __name__ == "__main__":
    main()
