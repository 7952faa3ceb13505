"""Decoding with a key-value cache on a CPU: llmc with matrices in bfloat16, beside transformers and the memory.

    python bench/decode.py                                     # GPT-2 124M, one thread and two: some minutes
    python bench/decode.py --init d2 --tokens 16 --rounds 1    # does it run?

Each program is a process of its own and takes turns with the others: a prompt, then so many tokens, always the
likeliest.  What counts is the time from the first token to the last.  llmc's process measures right before and after
each turn how fast its threads read memory.  The weights are random and rounded to bfloat16, the same for all: then
transformers in fp32 computes what llmc computes from half the bytes, and has to write the same tokens.  Figures are
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmc import loading, machine, ops
from llmc.arena import PADDED
from llmc.results import table

PROGRAMS = {
    "llmc": "llmc, matrices in bf16", "bf16": "transformers, bf16", "fp32": "transformers, fp32",
}  # fmt: skip
START_SECONDS = 300.0  # that a program may take to load

# ---- the programs ----------------------------------------------------------------------------------


class Llmc:
    def __init__(self, given: dict[str, Any]) -> None:
        from llmc import profiling

        self.given = given
        # Products in fp32: with dtype "bf16" a prompt's activations would be rounded, too, and the tokens might differ.
        self.model = loading.load(given["folder"], threads=given["threads"], dtype="fp32", masters=False, narrow=True)
        self._bandwidth = lambda: profiling.read_bandwidth(self.model.ops)

    def turn(self) -> dict[str, Any]:
        from llmc.sampling import Sampling, Speed, write

        before, speed = self._bandwidth(), Speed()
        options = Sampling(self.given["tokens"], temperature=0)
        pieces = list(write(self.model, [self.given["prompt"]], options, speed=speed))
        ids = [piece.token for piece in pieces if piece.token is not None]
        rate = speed.tokens_per_second
        bandwidth = statistics.mean((before, self._bandwidth()))
        return {"rate": rate, "ids": ids, "bandwidth": bandwidth, "nbytes": speed.nbytes / speed.decoded}


class Clock:
    """What transformers hands the prompt and then each token to, when it has made it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    def __init__(self, given: dict[str, Any], dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.given, self._torch = given, torch
        torch.set_num_threads(given["threads"])
        self.model = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=getattr(torch, dtype)).eval()

    def turn(self) -> dict[str, Any]:
        torch, clock, count = self._torch, Clock(), self.given["tokens"]
        prompt = torch.tensor([self.given["prompt"]])
        with torch.inference_mode():
            ids = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True, max_new_tokens=count,
                eos_token_id=None, pad_token_id=0, streamer=clock,
            )  # fmt: skip
        rate = (count - 1) / (clock.times[-1] - clock.times[1])
        return {"rate": rate, "ids": ids[0, prompt.shape[1] :].tolist()}


def work(given: dict[str, Any]) -> None:
    """A turn for each line of standard input, answered by a line of JSON; the first is there without being asked."""
    kind = given["kind"]
    program = Llmc(given) if kind == "llmc" else Transformers(given, {"bf16": "bfloat16", "fp32": "float32"}[kind])
    print(json.dumps(program.turn()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(program.turn()), flush=True)


# ---- taking turns ----------------------------------------------------------------------------------


class Worker:
    """One of PROGRAMS in a process of its own, which has had a turn that does not count."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.kind, self.answers = given["kind"], []  # type: ignore[var-annotated]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given["threads"]), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--work", json.dumps(given)], env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"decode: {PROGRAMS[self.kind]} ended with status {self._process.wait()}")

    def turn(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.answers.append(self._answer())

    def end(self) -> None:
        self._process.communicate(timeout=START_SECONDS)

    def median(self, name: str) -> float:
        return statistics.median(answer[name] for answer in self.answers)


def make(init: str, folder: str) -> int:
    """Random weights that bfloat16 holds exactly, as a folder; the vocabulary's size."""
    model = loading.load(init, seed=1)
    for row, tensor in model.params:
        if len(row.shape) == 2:
            # Larger than they begin: else every token would follow every other with almost one probability.
            tensor[...] = (tensor * (1 if row.name in PADDED else 2)).astype("bfloat16")
    model.tokenizer = None
    loading.save(model, folder)
    return model.config.vocab_size


def compare(given: dict[str, Any], programs: Sequence[str], rounds: int) -> list[list[str]]:
    """Lines of the table, from programs with one number of threads."""
    workers = [Worker(given | {"kind": kind}) for kind in programs]
    for n in range(rounds):
        for worker in workers if n % 2 == 0 else reversed(workers):
            worker.turn()
        print(f"decode: {given['threads']} threads, round {n + 1} of {rounds}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.end()
    ours = next((worker for worker in workers if worker.kind == "llmc"), None)
    return [_line(given["threads"], worker, ours) for worker in workers]


def _line(threads: int, worker: Worker, ours: Worker | None) -> list[str]:
    rate = worker.median("rate")
    line = [f"{threads}: {PROGRAMS[worker.kind]}", f"{rate:.1f}", f"{1e3 / rate:.2f}"]
    if worker is ours:
        speeds = [answer["rate"] * answer["nbytes"] for answer in ours.answers]
        fractions = [speed / answer["bandwidth"] for speed, answer in zip(speeds, ours.answers, strict=True)]
        line += [f"{statistics.median(speeds) / 1e9:.1f}", f"{ours.median('bandwidth') / 1e9:.1f}"]
        return [*line, f"{statistics.median(fractions):.2f}", "1", ""]
    line += ["", "", ""]
    if ours is None:
        return [*line, "", ""]
    pairs = list(zip(ours.answers, worker.answers, strict=True))
    times = statistics.median(a["rate"] / b["rate"] for a, b in pairs)
    same = min(_same(a["ids"], b["ids"]) for a, b in pairs)
    return [*line, f"{times:.2f}", f"{same} of {len(pairs[0][0]['ids'])}"]


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--init", default="d12", metavar="MODEL", help="a preset of GPT-2 (d12)")
    parser.add_argument("--threads", default="1,2", metavar="N,N", help="(1,2)")
    parser.add_argument("--prompt", type=int, default=16, metavar="N", help="tokens that are read in first (16)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="that are written in a turn (128)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns that count (9)")
    parser.add_argument("--programs", default=",".join(PROGRAMS), metavar="A,B", help=f"of {', '.join(PROGRAMS)} (all)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work))
        return
    programs = args.programs.split(",")
    if unknown := set(programs) - set(PROGRAMS):
        parser.error(f"--programs: {', '.join(sorted(unknown))} is none of {', '.join(PROGRAMS)}")
    if args.tokens < 3:
        parser.error("--tokens: must be at least 3")
    facts = machine.facts(ops.load("cpu").info()) | {"transformers": machine.installed("transformers")}
    lines: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        V = make(args.init, folder)
        prompt = np.random.default_rng(0).integers(0, V, args.prompt).tolist()
        for threads in args.threads.split(","):
            given = {"folder": folder, "threads": int(threads), "prompt": prompt, "tokens": args.tokens}
            lines += compare(given, programs, args.rounds)
    header = ["threads: program", "tokens/s", "ms", "GB/s", "memory reads", "fraction", "llmc is faster", "same tokens"]
    print(table(header, lines))
    print("\n" + "; ".join(f"{name}: {value}" for name, value in facts.items() if name != "threads"))


if __name__ == "__main__":
    main()
