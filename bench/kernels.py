"""Every op, forward and backward, on each instruction set this CPU has, at the shapes of GPT-2 124M.

    python bench/kernels.py                                    # B=4, T=64
    python bench/kernels.py --init d1 --seconds 0 --repeats 1  # does it run?

Products are given in GFLOP/s, everything else in GB/s of the arrays it must at least read and write.  The
instruction sets take turns; each figure is the median over the turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import machine
import numpy as np

from llmc import loading, ops
from llmc.errors import LlmcError
from llmc.gpt2 import Config, preset

Array = np.ndarray[Any, Any]
EPS = 1e-5


class Case(NamedTuple):
    """One op at one shape: what a call costs, and the call."""

    op: str
    shape: str
    amount: float  # of `unit`, per call
    unit: str  # "FLOP" or "B"
    call: Callable[[], None]


def cases(cpu: Any, config: Config, B: int, T: int) -> Iterator[Case]:
    """Each in turn, so that only one's arrays exist at a time."""
    random = np.random.default_rng(0)
    C, H, V, Vp, maxT = (
        config.channels, config.num_heads, config.vocab_size, config.padded_vocab_size, config.max_seq_len
    )  # fmt: skip
    N = B * T

    def new(*shape: int, scale: float = 1.0) -> Array:
        return scale * random.standard_normal(shape, dtype=np.float32)

    ids = random.integers(V, size=(B, T)).astype(np.int32)
    x, dx, dout, w, b, dw, db = new(B, T, C), new(B, T, C), new(B, T, C), new(C), new(C), new(C), new(C)
    tokens = f"{B}x{T}x{C}"

    def floats(op: str, shape: str, count: float, *args: Any) -> Case:
        return Case(op, shape, 4.0 * count, "B", lambda: getattr(cpu, op)(*args))

    def product(op: str, shape: str, count: float, *args: Any) -> Case:
        return Case(op, shape, count, "FLOP", lambda: getattr(cpu, op)(*args))

    # Reads and writes: C per token unless a factor says more.
    wte, wpe, dwte, dwpe = new(Vp, C, scale=0.02), new(maxT, C), np.zeros((Vp, C), np.float32), new(maxT, C)
    yield floats("embedding_forward", tokens, 3 * N * C, x, ids, wte, wpe, V, 0)
    yield floats("embedding_backward", tokens, (3 * N + maxT) * C, dwte, dwpe, dout, ids, False)
    mean, rstd = np.zeros((B, T), np.float32), np.ones((B, T), np.float32)
    yield floats("layernorm_forward", tokens, 2 * N * C, dx, mean, rstd, x, w, b, EPS)
    yield floats("layernorm_backward", tokens, 4 * N * C, dx, dw, db, dout, x, mean, rstd, w, False)
    yield floats("residual_forward", tokens, 3 * N * C, dx, x, dout)
    wide, dwide, pre = new(B, T, 4 * C), new(B, T, 4 * C), new(B, T, 4 * C)
    yield floats("gelu_forward", f"{B}x{T}x{4 * C}", 8 * N * C, dwide, wide)
    yield floats("gelu_backward", f"{B}x{T}x{4 * C}", 12 * N * C, dwide, pre, wide)

    for inputs, outputs in ((C, 3 * C), (C, C), (4 * C, C)):
        a, y, m, bias = new(B, T, inputs), new(B, T, outputs), new(outputs, inputs), new(outputs)
        shape, work = f"{inputs} -> {outputs}", 2.0 * N * inputs * outputs
        yield product("linear_forward", shape, work, y, a, m, bias)
        da, dm, dbias = np.empty_like(a), np.empty_like(m), np.empty_like(bias)
        yield product("linear_backward", shape, 2 * work, da, dm, dbias, y, a, m, False)
    m, bias = new(4 * C, C), new(4 * C)
    dm, dbias, shape, work = np.empty_like(m), np.empty_like(bias), f"{C} -> {4 * C}", 8.0 * N * C * C
    yield product("linear_gelu_forward", shape, work, wide, pre, x, m, bias)
    yield product(
        "linear_gelu_backward", shape, 2 * work, dx, dm, dbias, dwide, wide, pre, x, m, False
    )  # fmt: skip

    # A causal product has T (T + 1) / 2 of the T T scores; two such products forward, five backward.
    qkv, dqkv, out, lse = new(B, T, 3 * C), new(B, T, 3 * C), new(B, T, C), np.zeros((B, H, T), np.float32)
    causal = float(B * T * (T + 1) * C)
    yield product("attention_forward", f"{tokens}, {H} heads", 2 * causal, out, lse, qkv)
    yield product("attention_backward", f"{tokens}, {H} heads", 5 * causal, dqkv, dout, qkv, out, lse)
    keys, values, one, o = new(1, maxT, C), new(1, maxT, C), new(1, 1, 3 * C), new(1, 1, C)
    at = f"1 token after {maxT - 1}"
    yield floats("attention_decode", at, 2 * maxT * C, o, keys, values, one, H, maxT - 1)

    losses, small = np.zeros((B, T), np.float32), 1.0 / N
    head = 2.0 * N * C * V
    yield product("head_loss", f"{tokens}, loss alone", head, losses, None, None, x, wte, ids, V, 1.0, False)
    yield product(
        "head_loss", f"{tokens}, with gradients", 3 * head, losses, dx, dwte, x, wte, ids, V, small, False
    )  # fmt: skip
    logits = np.zeros((1, 1, V), np.float32)
    yield floats("head_logits", f"1x1x{C}, V={V}", V * C, logits, o, wte, V)

    moments, squares = np.zeros_like(wte), np.zeros_like(wte)
    yield floats("global_norm", f"{Vp}x{C}", Vp * C, dwte)
    yield floats(
        "adamw_step", f"{Vp}x{C}", 7 * Vp * C,
        wte, moments, squares, dwte, 1e-4, 0.9, 0.999, 1e-8, 0.01, 10, 1.0,
    )  # fmt: skip
    yield floats("zero", f"{Vp}x{C}", Vp * C, dwte)


def visit(call: Callable[[], None], least: float) -> tuple[float, int]:
    """Seconds per call, and calls, over at least `least` seconds; one call before them warms the caches."""
    call()
    count, began = 0, time.perf_counter()
    while True:
        call()
        count += 1
        elapsed = time.perf_counter() - began
        if elapsed >= least:
            return elapsed / count, count


def measure(case: Case, isas: list[str], threads: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per call, one value per turn.  An instruction set that has used up its time sits out."""
    found: dict[str, list[float]] = {isa: [] for isa in isas}
    spent = dict.fromkeys(isas, 0.0)
    for _ in range(args.repeats):
        for isa in isas:
            if found[isa] and spent[isa] > args.seconds:
                continue
            ops.load("cpu", isa=isa, threads=threads)
            seconds, count = visit(case.call, min(0.02, args.seconds))
            found[isa].append(seconds)
            spent[isa] += seconds * (count + 1)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--init", default="d12", help="the preset that gives the shapes (d12)")
    parser.add_argument("--batch-size", "-B", type=int, default=4, metavar="N", help="sequences (4)")
    parser.add_argument("--sequence-length", "-T", type=int, default=64, metavar="N", help="tokens each (64)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="turns of each set (15)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="X", help="per op and set; one turn at least (2)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(the physical cores)")
    parser.add_argument("--isas", metavar="A,B", help="instruction sets (all that this CPU has)")
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name holds TEXT")
    parser.add_argument("--output", "-o", choices=("md", "json"), default="md", help="format (md)")
    args = parser.parse_args()
    for name in ("batch_size", "sequence_length", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: must be at least 1")
    if not loading.is_preset(args.init):
        parser.error(f"--init: {args.init!r} is no preset: d12, d2, stories, tiny ...")
    return args


def main() -> None:
    args = arguments()
    try:
        config = preset(args.init)
        if args.sequence_length > config.max_seq_len:
            sys.exit(f"bench: --sequence-length: {args.init} has {config.max_seq_len} positions")
        facts = machine.facts(args.threads)
        cpu: Any = ops.load("cpu", threads=facts["threads"])
        isas = args.isas.split(",") if args.isas else list(cpu.info()["isas"])
        for isa in isas:
            ops.load("cpu", isa=isa, threads=facts["threads"])
    except LlmcError as error:
        sys.exit(f"bench: {error}")
    cpu.reserve(config.channels, config.vocab_size, config.padded_vocab_size * config.channels)
    facts["instruction set"] = ", ".join(isas)
    results: list[dict[str, Any]] = []
    for case in cases(cpu, config, args.batch_size, args.sequence_length):
        if args.only not in case.op:
            continue
        turns = measure(case, isas, facts["threads"], args)
        medians = {isa: float(np.median(seconds)) for isa, seconds in turns.items()}
        results.append(
            {
                "op": case.op, "shape": case.shape, "unit": f"G{case.unit}/s",
                "milliseconds": {isa: 1e3 * seconds for isa, seconds in medians.items()},
                "rate": {isa: case.amount / seconds / 1e9 for isa, seconds in medians.items()},
                "turns": {isa: len(seconds) for isa, seconds in turns.items()},
            }
        )  # fmt: skip
        if sys.stderr.isatty():
            print(f"{case.op} {case.shape}", file=sys.stderr)
    if args.output == "json":
        print(json.dumps({"machine": facts, "ops": results}, indent=2))
        return
    header = ["op", "shape", "unit", *isas, *(f"{isa}, ms" for isa in isas)]
    rows = [
        [
            row["op"], row["shape"], row["unit"], *(f"{row['rate'][isa]:.1f}" for isa in isas),
            *(f"{row['milliseconds'][isa]:.3f}" for isa in isas),
        ]
        for row in results
    ]  # fmt: skip
    print(machine.table(header, rows))
    print("\n" + "; ".join(f"{name}: {value}" for name, value in facts.items()))


if __name__ == "__main__":
    main()
