"""GPT-2 training steps, forward, backward and update, in llmc and in PyTorch, on the CPU or on a GPU.

    python bench/training.py --json-out run.json                # all of it: an hour or more
    python bench/training.py --configs d12:4x64=9 --dtypes fp32
    python bench/training.py --configs d2:2x64=1 --starts 1     # does it run?
    python bench/training.py --device cuda                      # on a GPU: 124M at two batch sizes, 350M, 774M
    python bench/training.py --device cuda --only-forward --configs d12:4x1024 --dtypes fp32,tf32

Each program is a process of its own (bench/programs.py), so that its memory and its start are its own and no two OpenMP
runtimes meet.  They start from the same weights (one model file), see the same batches, and take turns, step by step
(on a GPU some steps each), so that whatever else the machine does falls on all of them; the peaks have their turn too.
Where the programs' losses do not agree, the times say so, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import report
from programs import Settings
from simulate import cpu_info, simulate

from llmc import loading, machine, memory, ops
from llmc.benchmark import LEARNING_RATE, RECIPE, flops_per_token, gpu_facts
from llmc.errors import LlmcError
from llmc.gpt2 import preset

CONFIGURATIONS = {
    "cpu": "d12:4x64=9,d12:4x1024=3,stories:4x256=25",
    "cuda": "d12:4x1024,d12:maxx1024,d24:8x1024,d36:4x1024",
}
DTYPES = {"cpu": "fp32,bf16", "cuda": "bf16"}
PROGRAMS = {"llmc": "llmc", "llmc-block": "llmc, recompute block", "eager": "PyTorch eager", "compile": "torch.compile"}
TRAINED = {"lr": LEARNING_RATE, **RECIPE}
LONG = 512  # tokens from which on activations are worth recomputing
LARGEST_DIFFERENCE = 1e-4  # of two fp32 losses of the same step
BF16_DIFFERENCE = 1e-2  # of a bf16 loss from fp32's: see bench/README.md
TF32_DIFFERENCE = 2e-3  # of a tf32 loss from another program's
# Steps whose losses are compared on a GPU, where turns make hundreds: the weights of two trainings that round otherwise
# drift apart, and the limits are those of a step.
COMPARED = 50
ROUNDS_SECONDS = 15.0  # that are kept for taking turns, however long a program's start takes
LEAVING = 5.0  # seconds that writing results and ending programs may take
TURN_FLOPS = 2e14  # that a GPU's turn holds, about half a second on an H100
TOGETHER = 4  # times llmc's memory that all programs of a comparison take, PyTorch's logits in fp32 among it
LONG_START = 15.0  # seconds; a start that took longer is not repeated
HERE = Path(__file__).resolve().parent


class Configuration(NamedTuple):
    """A preset, B sequences of T tokens (0: as many as fit), and the number of turns that are timed."""

    init: str
    B: int
    T: int
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.init}:{self.B}x{self.T}"

    @classmethod
    def parse(cls, text: str, rounds: int) -> Configuration:
        """From INIT:BxT or INIT:BxT=ROUNDS, B a number or `max`; ValueError, or ConfigError for a preset that does not
        fit."""
        place, _, number = text.partition("=")
        init, _, shape = place.partition(":")
        B, T = shape.removeprefix("max").rsplit("x", 1)
        largest = shape.startswith("max")
        made = cls(init, 0 if largest else int(B), int(T), int(number) if number else rounds)
        if not loading.is_preset(init):
            raise ValueError(f"{init!r} is no preset with random weights: d12, d2, stories, tiny ...")
        if min(made.B or largest, made.T, made.rounds) < 1:
            raise ValueError(f"{text}: sizes and rounds must be at least 1")
        if made.T > preset(init).max_seq_len:
            raise ValueError(f"{text}: {init} has {preset(init).max_seq_len} positions")
        return made


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- processes -------------------------------------------------------------------------------------


class ProgramFailed(Exception):
    """A process ended before its time."""


class Worker:
    """A process of bench/programs.py.  Made, it has done step 0, and `start` says how many seconds that took."""

    def __init__(self, name: str, settings: Settings, cache: Path, until: float = math.inf) -> None:
        self.name, self.settings, self.until = name, settings, until
        self.answers: list[dict[str, Any]] = []
        self.memory: dict[str, float] = {}
        # Compiled code of an earlier start would make this one look quicker than it is.
        compiled = tempfile.mkdtemp(dir=cache)
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "programs.py"), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled},
        )  # fmt: skip
        try:
            self.answers.append(self._receive())
        except BaseException:
            self.kill()
            raise
        self.start = time.perf_counter() - began

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if math.isfinite(self.until):
            left = max(0.0, self.until - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise ProgramFailed(f"{self.name}: there was no time left for it")
        line = self.process.stdout.readline()
        if not line:
            raise ProgramFailed(f"{self.name} ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            self.process.wait()
            raise ProgramFailed(f"{self.name}: {answer['failed']}")
        return answer

    def turn(self, number: int) -> float:
        """One turn; the seconds it took, for this process as a whole."""
        assert self.process.stdin is not None
        began = time.perf_counter()
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._receive()  # why, if it said so
            raise ProgramFailed(f"{self.name} ended with status {self.process.wait()}") from None
        self.answers.append(self._receive())
        return time.perf_counter() - began

    def finish(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.memory = self._receive()
        self.process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def losses(self) -> list[float]:
        return [loss for answer in self.answers for loss in answer["losses"]]


class Run:
    """What all measurements share: the options, the model files, and what cannot be measured here, with the reason."""

    def __init__(self, args: argparse.Namespace, threads: int, folder: Path, gpu_name: str = "") -> None:
        self.args, self.threads, self.folder = args, threads, folder
        self.gpu = args.device != "cpu"
        self.gpu_name = gpu_name
        self.until = args.began + args.seconds - LEAVING

    def machine(self, c: Configuration, dtype: str) -> Settings:
        """What every process is told."""
        steps = 1
        if self.gpu:
            passes = 3 if self.args.only_forward else 1
            steps = self.args.turn or round(TURN_FLOPS * passes / (c.B * c.T * flops_per_token(preset(c.init), c.T)))
        return {
            "device": self.args.device, "threads": self.threads, "dtype": dtype, "attention": self.args.attention,
            "only_forward": self.args.only_forward, "steps": min(max(steps, 1), 100),
        }  # fmt: skip

    def fitting(self, c: Configuration, dtype: str) -> Configuration:
        """With the batch size that it stands for: the largest power of two with which all programs fit into the
        device's memory together."""
        if c.B:
            return c
        backend = ops.load(self.args.device, dtype=dtype, attention=self.args.attention)
        found = backend.memory()
        free = memory.machine().available if found is None else found[0]
        share = free // (1 if len(self.args.programs) == 1 else TOGETHER)
        B = 1
        storage = backend.info()["storage"]
        while memory.plan(preset(c.init), backend, 2 * B, c.T, dtype=storage).total <= share:
            B *= 2
        return c._replace(B=B)

    def weights(self, init: str) -> Path:
        """A model file, written on first use."""
        path = self.folder / f"{init}.bin"
        if not path.exists():
            say(f"{path.name}: random weights, seed {self.args.seed}")
            # On a GPU, since its machine may have no kernels for the CPU.
            where = {"device": self.args.device} if self.gpu else {"threads": self.threads}
            loading.save_bin(loading.load(init, seed=self.args.seed, dtype="fp32", **where), path)
        return path

    def settings(self, program: str, c: Configuration, dtype: str) -> Settings:
        common = {
            **self.machine(c, dtype), "weights": str(self.weights(c.init)), "seed": self.args.seed, "B": c.B, "T": c.T,
        }
        if program.startswith("llmc"):
            return {"kind": "llmc", "recompute": "block" if program == "llmc-block" else None, **common}
        config = preset(c.init)
        rows = [(row.name, row.shape, row.layers) for row in config.parameter_rows()]
        return {
            "kind": "torch", "compiled": program == "compile", "config": asdict(config), "rows": rows,
            "recipe": TRAINED, **common,
        }  # fmt: skip

    def missing(self, program: str) -> str:
        """Why a program cannot run; empty where it can."""
        if program in ("eager", "compile") and machine.installed("torch") == "not installed":
            return "PyTorch is not installed: pip install '.[reference]'"
        if program == "compile" and not shutil.which(os.environ.get("CXX", "g++")):
            return "torch.compile needs a C++ compiler (g++, or CXX)"
        return ""

    def start(self, program: str, settings: Settings) -> Worker:
        worker = Worker(program, settings, self.folder, self.until - ROUNDS_SECONDS)
        worker.until = self.until
        say(f"  {program}: {worker.start:.1f} s to the end of its first step")
        return worker


# ---- measuring -------------------------------------------------------------------------------------


def take_turns(run: Run, c: Configuration, dtype: str, programs: list[str], failures: list[str]) -> list[Worker]:
    """Workers after all their steps; every round begins with another one of them.  Those that failed are not among
    them, but in `failures`."""
    workers: list[Worker] = []
    try:
        for program in programs:  # one after another: a start is measured too
            try:
                workers.append(run.start(program, run.settings(program, c, dtype)))
            except ProgramFailed as error:
                failures.append(str(error))
        try:
            workers.append(Worker("peaks", {"kind": "peaks", **run.machine(c, dtype)}, run.folder, run.until))
        except ProgramFailed as error:
            failures.append(str(error))

        def each(workers: list[Worker], act: Callable[[Worker], float | None]) -> list[str]:
            told = []
            for worker in list(workers):
                try:
                    seconds = act(worker)
                    told.append(f"{worker.name} {seconds:.2f} s" if seconds is not None else worker.name)
                except ProgramFailed as error:
                    failures.append(str(error))
                    workers.remove(worker)
            return told

        took = LEAVING
        for number in range(1, run.args.warmup + c.rounds):
            if number > run.args.warmup and time.monotonic() + took > run.until:
                break  # with fewer rounds than were asked for, and not without a result
            began = time.monotonic()
            workers[:] = workers[1:] + workers[:1]
            told = each(workers, lambda worker: worker.turn(number))  # noqa: B023  called at once
            what = f"round {number - run.args.warmup + 1}/{c.rounds}" if number >= run.args.warmup else "warm-up"
            say(f"  {what}: {', '.join(told)}")
            took = time.monotonic() - began + LEAVING
        each(workers, lambda worker: worker.finish())
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.kill()
    order = [*programs, "peaks"]
    return sorted(workers, key=lambda worker: order.index(worker.name))


def repeat_starts(run: Run, c: Configuration, workers: list[Worker], failures: list[str]) -> dict[str, list[float]]:
    """Seconds from a process' start to the end of its first step, by program; `llmc random` makes its weights."""
    settings = {worker.name: worker.settings for worker in workers if worker.name != "llmc-block"}
    starts = {worker.name: [worker.start] for worker in workers if worker.name != "llmc-block"}
    if "llmc" in settings:
        settings["llmc random"] = {**settings["llmc"], "weights": c.init}
        starts["llmc random"] = []
    for _ in range(run.args.starts):
        for program, seconds in starts.items():
            wanted = len(seconds) < run.args.starts and max(seconds, default=0.0) <= LONG_START
            if wanted and time.monotonic() < run.until:
                try:
                    worker = run.start(program, settings[program])
                    worker.finish()
                except ProgramFailed as error:
                    failures.append(str(error))
                else:
                    seconds.append(worker.start)
    return {program: seconds for program, seconds in starts.items() if seconds}


def largest_difference(losses: dict[str, list[float]], reference: list[float], most: int | None = None) -> float:
    """Between the reference and any program, over the first `most` of the steps that both did; nan where a loss of
    any step is."""
    n = min(len(reference), *map(len, losses.values()))
    apart = np.abs(np.array([their[:n] for their in losses.values()]) - np.array(reference[:n]))
    return math.nan if np.isnan(apart).any() else float(np.max(apart[:, :most]))


def measure(run: Run, c: Configuration, dtype: str, fp32_losses: list[float] | None) -> dict[str, Any]:
    """One configuration in one type: its section of the report."""
    c = run.fitting(c, dtype)
    say(f"{c.name} {dtype}: {c.rounds} rounds after {run.args.warmup} for warming up")
    failures: list[str] = []
    skipped: dict[str, str] = {}
    wanted = []
    for program in run.args.programs:
        if program == "llmc-block" and (c.T < LONG or run.gpu) and not run.args.programs_given:
            continue
        if reason := run.missing(program):
            skipped[PROGRAMS[program]] = reason
        else:
            wanted.append(program)
    section: dict[str, Any] = {
        "name": c.name, **c._asdict(), "dtype": dtype, "device": run.args.device,
        "only_forward": run.args.only_forward, "steps": run.machine(c, dtype)["steps"], "warmup": run.args.warmup,
        "skipped": skipped, "failures": failures, "programs": [], "losses": {},
    }  # fmt: skip
    if not wanted:
        return section
    # Recomputing is about memory, so its process shares the machine with one llmc alone, not with PyTorch's.
    blocks = "llmc-block" in wanted
    workers = take_turns(run, c, dtype, [program for program in wanted if program != "llmc-block"], failures)
    groups = [workers]
    if blocks:
        groups.append(take_turns(run, c, dtype, ["llmc", "llmc-block"], failures))
    peaks = [answer for group in groups for worker in group if worker.name == "peaks" for answer in worker.answers]
    trained = [worker for worker in workers if worker.name != "peaks"]
    block = [worker for group in groups[1:] for worker in group if worker.name == "llmc-block"]
    losses = section["losses"] = {worker.name: worker.losses for worker in trained + block}
    if not losses:
        return section
    limit = {"fp32": LARGEST_DIFFERENCE, "tf32": TF32_DIFFERENCE, "bf16": BF16_DIFFERENCE}[dtype]
    if run.gpu:  # where PyTorch's softmax goes over the padded vocabulary, whose logits are 0, about the mean
        limit += 2 * math.log(preset(c.init).padded_vocab_size / preset(c.init).vocab_size)
    if dtype == "bf16" and fp32_losses is not None:
        apart, reference = "llmc's in fp32", fp32_losses
    else:
        first = "llmc" if "llmc" in losses else next(iter(losses))
        apart, reference = f"{PROGRAMS[first]}'s", losses[first]
    difference = largest_difference(losses, reference, COMPARED if run.gpu else None)
    section |= {"difference": difference, "limit": limit, "compared_with": apart}
    if not difference <= limit:
        failures.append(f"the losses differ by {difference:.1e} from {apart}, more than {limit:.1e}")
    section["starts"] = repeat_starts(run, c, trained, failures)
    config = preset(c.init)
    section["rounds"] = min(len(worker.answers) for worker in trained) - run.args.warmup
    section |= report.ceiling(config, c.B, c.T, dtype, peaks, only_forward=run.args.only_forward)
    for group, rows in ((groups[0], trained), (groups[-1], block)):
        ours = next((worker.answers for worker in group if worker.name == "llmc"), None)
        for worker in rows:
            seconds = section["starts"].get(worker.name, [worker.start])
            title = PROGRAMS[worker.name]
            mine = report.Measured(title, worker.answers, ours, worker.memory, seconds, run.args.warmup)
            section["programs"].append(report.summary(mine, section, c.B * c.T, run.gpu_name))
    return section


# ---- options ---------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--configs", metavar="LIST",
        help="INIT:BxT=ROUNDS, separated by commas; INIT is a preset, B a number or `max`, =ROUNDS may be left out "
        f"({CONFIGURATIONS['cpu']}; on a GPU {CONFIGURATIONS['cuda']})",
    )  # fmt: skip
    parser.add_argument("--programs", metavar="LIST", help=f"of {','.join(PROGRAMS)}; llmc must be among them (all)")
    parser.add_argument("--dtypes", metavar="LIST", help="of fp32, bf16 (both); on a GPU also tf32 (bf16)")
    parser.add_argument("--only-forward", action="store_true", help="on a GPU: losses alone, without gradients")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="where a configuration has no =ROUNDS (9)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them, the first included (2)")
    parser.add_argument(
        "--starts", type=int, default=3, metavar="N",
        help=f"how often each program is started; one that takes over {LONG_START:.0f} s only once (3)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="of each program (the physical cores)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1 ... (cpu)")
    parser.add_argument("--attention", metavar="NAME", help="llmc's on a GPU: own or cudnn (cudnn where installed)")
    parser.add_argument("--turn", type=int, default=0, metavar="N", help="steps of a turn on a GPU (half a second's)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="N",
        help="after which no round begins; the results so far are given (no limit)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and tokens (0)")
    parser.add_argument("--json-out", type=Path, metavar="FILE", help="results, written after each configuration")
    report.add_output_options(parser)
    args = parser.parse_args()
    kind = args.device.partition(":")[0]
    if kind not in CONFIGURATIONS:
        parser.error(f"--device: {args.device!r} is unknown; choose from cpu, cuda, cuda:1 ...")
    if kind == "cpu" and (args.only_forward or args.attention or args.turn):
        parser.error("--only-forward, --attention and --turn are for GPUs")
    args.configs, args.dtypes = args.configs or CONFIGURATIONS[kind], args.dtypes or DTYPES[kind]
    args.began = time.monotonic()
    args.programs_given = args.programs is not None
    args.programs = (args.programs or ",".join(PROGRAMS)).split(",")
    args.dtypes = args.dtypes.split(",")
    for name, known in (("programs", PROGRAMS), ("dtypes", ops.DTYPES)):
        if wrong := [one for one in getattr(args, name) if one not in known]:
            parser.error(f"--{name}: {wrong[0]!r} is unknown; choose from {', '.join(known)}")
    if "llmc" not in args.programs:
        parser.error("--programs: llmc must be among them, since the others are compared with it")
    for name in ("rounds", "warmup", "starts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    try:
        args.configs = [Configuration.parse(text, args.rounds) for text in args.configs.split(",")]
    except (ValueError, LlmcError) as error:
        parser.error(f"--configs: {error}; INIT:BxT=ROUNDS is wanted, such as d12:4x64=9")
    # fp32 first: its losses judge bf16's.
    args.dtypes.sort(key=ops.DTYPES.index)
    return args


def main() -> None:
    args = arguments()
    try:
        facts = machine.facts(cpu_info(args.threads, required=args.device == "cpu"))
        if args.device != "cpu":
            simulate()
            facts |= gpu_facts(args.device, args.dtypes, args.attention)
    except LlmcError as error:
        sys.exit(f"bench: {error}")
    result: dict[str, Any] = {"machine": facts, "recipe": TRAINED, "seed": args.seed, "configurations": []}
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args, facts["threads"], Path(folder), facts.get("GPU", ""))
        for c in args.configs:
            fp32_losses = None
            for dtype in args.dtypes:
                if time.monotonic() > run.until:
                    say(f"{c.name} {dtype}: no time was left")
                    continue
                section = measure(run, c, dtype, fp32_losses)
                if dtype == "fp32":
                    fp32_losses = section["losses"].get("llmc")
                result["configurations"].append(section)
                for failure in section["failures"]:
                    say(f"FAILED: {c.name} {dtype}: {failure}")
                if args.json_out:
                    report.write_whole(args.json_out, json.dumps(result, indent=2) + "\n")
    report.output(result, args)
    if any(section["failures"] for section in result["configurations"]):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        say("interrupted; --json-out holds what was done")
        sys.exit(130)
