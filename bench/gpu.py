"""What a GPU can do, and what llmc's ops do of it: the first parts of `bench/on_gpu.sh bench`.

    python bench/gpu.py peaks                       # a copy, and a large product in each type
    python bench/gpu.py kernels                     # every op at GPT-2 124M's shapes, the goals' ops first
    python bench/gpu.py kernels --json rows.json --seconds 100

The file of --json is written whole whenever there is more to it, so a run that is cut off still counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from simulate import cpu_info, simulate

from llmc import machine, ops, profiling, results
from llmc.benchmark import GPU, KernelRow, Settings, gpu_facts, gpu_kernels, kernels_attention
from llmc.errors import DeviceMemoryError, LlmcError

PEAK_TURNS, PEAK_SECONDS = 5, 0.1
LEAVING = 5.0  # seconds for the last op and the table
DTYPES = ("bf16", "tf32", "fp32")
GOALS = "attention,layernorm,gelu_,adamw,head_loss,classifier"  # the ops that have one
STREAMED = "layernorm,gelu_,classifier"  # those that a larger batch has more to move in
# What is measured first: a type, sequences, and ops.  Small batches have small arrays, where launching counts.
ROUNDS = (("bf16", 16, GOALS), ("bf16", 64, STREAMED), ("bf16", 4, ""), ("fp32", 4, ""), ("tf32", 4, ""))

Write = Callable[[Any], None]


def peaks(args: argparse.Namespace, write: Write) -> str:
    """Medians: B/s of a copy, FLOP/s of a large product in each type; and what the data sheet says."""
    found: dict[str, Any] = {"product": {}}
    for dtype in DTYPES:
        backend: Any = ops.load(args.device, dtype=dtype)
        memory = profiling.stream_memory(backend)

        def median(what: profiling.Ceiling, backend: Any = backend, memory: Any = memory) -> float:
            return statistics.median(
                profiling.measure(backend, what, memory, PEAK_SECONDS) for _ in range(PEAK_TURNS)
            )

        if "copy" not in found:
            found |= {"GPU": backend.info()["name"], "copy": median(profiling.COPY)}
        found["product"][dtype] = median(profiling.PRODUCT)
        found["datasheet"] = {name: report.datasheet(found["GPU"], name) for name in DTYPES}
        write(found)
        del memory
    rows = [["copy", f"{found['copy'] / 1e9:.0f} GB/s", "-", "-"]]
    for dtype, rate in found["product"].items():
        stated = found["datasheet"][dtype]
        rows.append([
            f"product, {dtype}", f"{rate / 1e12:.1f} TFLOP/s", "-" if stated is None else f"{stated / 1e12:.1f}",
            report.percent(stated and rate / stated),
        ])  # fmt: skip
    return results.table(["peak", "measured", "data sheet", "of it"], rows)


def rows_of(args: argparse.Namespace, until: float) -> Iterator[KernelRow]:
    """Rows as they are measured, until the time is over; none twice."""
    seen = set()
    for dtype, B, only in ROUNDS:
        settings = Settings(
            init=args.init, batch_sizes=(B if args.batch_size is None else args.batch_size,),
            sequence_lengths=(args.sequence_length,), dtypes=(dtype,), device=args.device, isas=(GPU,),
            only=args.only or only, warmup=1, repeats=args.repeats, seconds=args.turn_seconds,
        )  # fmt: skip
        try:
            for row in gpu_kernels(settings):
                key = (row.op, row.shape, row.dtype, row.isa)
                if key not in seen:
                    seen.add(key)
                    yield row
                if time.monotonic() > until:
                    return
        except DeviceMemoryError as error:  # the next round may be smaller
            print(f"bench: {dtype}, {B} sequences: {error}", file=sys.stderr, flush=True)


def kernels(args: argparse.Namespace, write: Write) -> str:
    """Every op: its rate, and the fraction of the copy's or the product's, measured beside it."""
    until = time.monotonic() + args.seconds - LEAVING
    facts = machine.facts(cpu_info()) | gpu_facts(args.device, DTYPES) | {"attention": kernels_attention(())}
    rows: list[KernelRow] = []
    for row in rows_of(args, until):
        rows.append(row)
        facts["attention"] = kernels_attention([row.isa for row in rows])
        write({"machine": facts, "rows": [asdict(row) for row in rows]})
    return results.write(rows, facts, "md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("peaks", "kernels"))
    parser.add_argument("--device", default="cuda", metavar="NAME", help="cuda, cuda:1 ... (cuda)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results so far")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="N", help="for kernels: how long (600)")
    parser.add_argument("--init", default="d12", metavar="MODEL", help="the preset that gives the shapes (d12)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences (16, 64 and 4)")
    parser.add_argument("--sequence-length", type=int, default=1024, metavar="N", help="tokens each (1024)")
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name holds TEXT, or one of A,B,C")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of an op (5)")
    parser.add_argument("--turn-seconds", type=float, default=0.2, metavar="X", help="of an op in all its turns (0.2)")
    return parser.parse_args()


def main() -> None:
    args = arguments()

    def write(value: Any) -> None:
        if args.json:
            report.write_whole(args.json, json.dumps(value, indent=1) + "\n")

    simulate()
    try:
        print({"peaks": peaks, "kernels": kernels}[args.what](args, write))
    except LlmcError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
