"""The goals that were set for an H100, beside what `bench/on_gpu.sh bench` found.

    python bench/goals.py bench.json
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmc.results import table

Facts = Mapping[str, Any]
MISSING = "not measured"


class Found(NamedTuple):
    """A figure, None where there is none; what it was taken of; whether something failed beside it."""

    value: float | None
    of: str = ""
    failed: bool = False


class Goal(NamedTuple):
    """What is looked at, the figure it should reach (`more`: exceed), how one is written, and where they come from."""

    what: str
    least: float
    form: str
    found: Callable[[Sequence[Facts]], Iterable[Found]]
    more: bool = False

    def reached(self, value: float) -> bool:
        return value > self.least if self.more else value >= self.least


Finder = Callable[[Sequence[Facts]], Iterator[Found]]


def sections(parts: Sequence[Facts], **wanted: Any) -> list[Facts]:
    """Configurations of bench/training.py."""
    return [
        section
        for part in parts
        for section in part.get("results", {}).get("configurations", ())
        if all(section.get(name) == value for name, value in wanted.items())
    ]


def figure_of(section: Facts, program: str, figure: str) -> float | None:
    return next((row[figure] for row in section["programs"] if row["program"] == program), None)


def of_program(program: str, figure: str, **wanted: Any) -> Finder:
    def found(parts: Sequence[Facts]) -> Iterator[Found]:
        for section in sections(parts, **wanted):
            yield Found(figure_of(section, program, figure), failed=bool(section["failures"]))

    return found


def at_largest(program: str, figure: str, **wanted: Any) -> Finder:
    """At the largest batch that the program was measured with, B=4 not among them; a larger one that failed counts."""

    def found(parts: Sequence[Facts]) -> Iterator[Found]:
        larger = [section for section in sections(parts, **wanted) if section["B"] > SMALL["B"]]
        measured = [section for section in larger if figure_of(section, program, figure) is not None]
        B = max((section["B"] for section in measured), default=0)
        failed = any(section["failures"] for section in larger if section["B"] >= B)
        for section in [section for section in measured if section["B"] == B]:
            yield Found(figure_of(section, program, figure), f"B={B}", failed)
        if not measured and failed:
            yield Found(None, failed=True)

    return found


def fp32_forward(parts: Sequence[Facts]) -> Iterator[Found]:
    """torch.compile's time in TF32 over llmc's in fp32: two sections of one run."""
    ours, theirs = (sections(parts, dtype=dtype, **FORWARD) for dtype in ("fp32", "tf32"))
    for mine, other in itertools.product(ours, theirs):
        step, compiled = figure_of(mine, "llmc", "step"), figure_of(other, "torch.compile", "step")
        value = None if step is None or compiled is None else compiled / step
        yield Found(value, failed=bool(mine["failures"] or other["failures"]))


def kernel_rows(parts: Sequence[Facts], ops: Sequence[str]) -> Iterator[tuple[Facts, bool]]:
    """Rows of bench/gpu.py kernels in bf16, llmc's own; whether that part failed."""
    for part in parts:
        for row in part.get("results", {}).get("rows", ()):
            if row["op"] in ops and row["dtype"] == "bf16" and row["isa"] == "cuda":
                yield row, part.get("status") == "FAILED"


def fraction(*ops: str) -> Finder:
    """The lowest among the ops, each at the shape where it is best; nothing where one of them is missing."""

    def found(parts: Sequence[Facts]) -> Iterator[Found]:
        best: dict[str, Found] = {}
        for row, failed in kernel_rows(parts, ops):
            op, value = row["op"], row["fraction"]
            before = best[op].value if op in best else None
            if before is None or value > before:
                best[op] = Found(value, f"{op}, {row['shape']}", failed)
        if len(best) == len(ops):
            yield min(best.values())

    return found


def teraflops(op: str) -> Finder:
    return lambda parts: (Found(row["rate"] / 1e3, row["shape"], failed) for row, failed in kernel_rows(parts, (op,)))


TRAINING = {"init": "d12", "T": 1024, "dtype": "bf16", "only_forward": False}
SMALL = {**TRAINING, "B": 4}
FORWARD = {"init": "d12", "B": 4, "T": 1024, "only_forward": True}
GOALS = (
    Goal("124M bf16 training, B=4 T=1024: time of torch.compile / llmc's", 1.15, ".2f",
         of_program("torch.compile", "ratio", **SMALL)),
    Goal("124M bf16 training, largest B, T=1024: time of torch.compile / llmc's", 1.15, ".2f",
         at_largest("torch.compile", "ratio", **TRAINING)),
    Goal("124M bf16 training, B=4 T=1024: MFU of the data sheet's", 0.45, ".1%",
         of_program("llmc", "mfu_datasheet", **SMALL)),
    Goal("124M bf16 training, largest B, T=1024: MFU of the data sheet's", 0.45, ".1%",
         at_largest("llmc", "mfu_datasheet", **TRAINING)),
    Goal("forward, TF32, B=4 T=1024: time of torch.compile in TF32 / llmc's", 1.0, ".2f",
         of_program("torch.compile", "ratio", dtype="tf32", **FORWARD), more=True),
    Goal("forward, fp32, B=4 T=1024: time of torch.compile in TF32 / llmc's", 1.0, ".2f", fp32_forward, more=True),
    Goal("layernorm, the slowest of three: of the copy", 0.85, ".0%",
         fraction("layernorm_forward", "layernorm_backward", "residual_layernorm_forward")),
    Goal("GELU, forward and backward: of the copy", 0.85, ".0%", fraction("gelu_forward", "gelu_backward")),
    Goal("AdamW: of the copy", 0.85, ".0%", fraction("adamw_step")),
    Goal("classifier: of the copy", 0.85, ".0%", fraction("classifier")),
    Goal("own attention, forward, TFLOP/s of the causal half", 200.0, ".0f", teraflops("attention_forward")),
    Goal("own attention, backward, TFLOP/s of the causal half", 150.0, ".0f", teraflops("attention_backward")),
    Goal("the part of a training step in which the GPU is busy, B=4", 0.97, ".1%",
         of_program("llmc", "busy", **SMALL)),
    Goal("the part of a training step in which the GPU is busy, largest B", 0.97, ".1%",
         at_largest("llmc", "busy", **TRAINING)),
)  # fmt: skip


def rows(parts: Sequence[Facts]) -> list[list[str]]:
    """A line for each figure that was found for a goal, and whether that is enough."""
    made = []
    for goal in GOALS:
        wanted = f"{'> ' if goal.more else '>= '}{goal.least:{goal.form}}"
        for value, of, failed in [*goal.found(parts)] or [Found(None)]:
            text, said = MISSING, []
            if value is not None:
                text = f"{value:{goal.form}}" + (f" ({of})" if of else "")
                said.append("yes" if goal.reached(value) else "no")
            made.append([goal.what, wanted, text, ", ".join([*said, *(["with failures"] if failed else [])])])
    return made


def markdown(parts: Sequence[Facts]) -> str:
    """The table, from the parts of on_gpu's bench.json."""
    return table(["what", "goal (H100)", "found", "reached"], rows(parts))


def main() -> None:
    try:
        parts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["parts"]
    except (IndexError, OSError, ValueError, KeyError) as error:
        sys.exit(f"goals: the bench.json of bench/on_gpu.sh is wanted: {error}")
    print(markdown(parts))


if __name__ == "__main__":
    main()
