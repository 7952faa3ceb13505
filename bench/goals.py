"""The goals that were set for an H100, beside what `bench/on_gpu.sh bench` found.

    python bench/goals.py bench.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmc.results import table

Facts = Mapping[str, Any]
MISSING = "not measured"


class Goal(NamedTuple):
    """What is looked at, the least that it should be, how a figure is written, and where figures come from."""

    what: str
    least: float
    form: str
    found: Callable[[Sequence[Facts]], Iterable[float | None]]


def sections(parts: Sequence[Facts], **wanted: Any) -> Iterator[Facts]:
    """Configurations of bench/training.py."""
    for part in parts:
        for section in part.get("results", {}).get("configurations", ()):
            if all(section.get(name) == value for name, value in wanted.items()):
                yield section


def program(section: Facts, name: str) -> Facts | None:
    return next((row for row in section["programs"] if row["program"] == name), None)


def of_program(name: str, figure: str, **wanted: Any) -> Callable[[Sequence[Facts]], Iterator[float | None]]:
    def found(parts: Sequence[Facts]) -> Iterator[float | None]:
        for section in sections(parts, **wanted):
            row = program(section, name)
            yield None if row is None else row[figure]

    return found


def kernel_rows(parts: Sequence[Facts], ops: Sequence[str], isa: str = "cuda") -> Iterator[Facts]:
    """Rows of bench/gpu.py kernels in bf16."""
    for part in parts:
        for row in part.get("results", {}).get("rows", ()):
            if row["op"] in ops and row["dtype"] == "bf16" and row["isa"] == isa:
                yield row


def fraction(*ops: str) -> Callable[[Sequence[Facts]], Iterator[float | None]]:
    """The lowest among the ops, each at the batch where it is best."""

    def found(parts: Sequence[Facts]) -> Iterator[float | None]:
        best: dict[str, float] = {}
        for row in kernel_rows(parts, ops):
            best[row["op"]] = max(row["fraction"], best.get(row["op"], 0.0))
        yield min(best.values(), default=None)

    return found


def teraflops(op: str) -> Callable[[Sequence[Facts]], Iterator[float | None]]:
    return lambda parts: (row["rate"] / 1e3 for row in kernel_rows(parts, (op,)))


TRAINING = {"init": "d12", "T": 1024, "dtype": "bf16", "only_forward": False}
GOALS = (
    Goal(
        "124M bf16 training, T=1024: time of torch.compile / llmc's", 1.15, ".2f",
        of_program("torch.compile", "ratio", **TRAINING),
    ),
    Goal("124M bf16 training, T=1024: MFU of the data sheet's", 0.45, ".1%",
         of_program("llmc", "mfu_datasheet", **TRAINING)),
    Goal("forward, TF32, B=4 T=1024: time of torch.compile / llmc's", 1.0, ".2f",
         of_program("torch.compile", "ratio", dtype="tf32", B=4, T=1024, only_forward=True)),
    Goal("forward, fp32, B=4 T=1024: time of torch.compile / llmc's", 1.0, ".2f",
         of_program("torch.compile", "ratio", dtype="fp32", B=4, T=1024, only_forward=True)),
    Goal("layernorm, the slowest of three: of the copy", 0.85, ".0%",
         fraction("layernorm_forward", "layernorm_backward", "residual_layernorm_forward")),
    Goal("GELU, forward and backward: of the copy", 0.85, ".0%", fraction("gelu_forward", "gelu_backward")),
    Goal("AdamW: of the copy", 0.85, ".0%", fraction("adamw_step")),
    Goal("classifier: of the copy", 0.85, ".0%", fraction("classifier")),
    Goal("own attention, forward, TFLOP/s of the causal half", 200.0, ".0f", teraflops("attention_forward")),
    Goal("own attention, backward, TFLOP/s of the causal half", 150.0, ".0f", teraflops("attention_backward")),
    Goal("the part of a training step in which the GPU is busy", 0.97, ".1%", of_program("llmc", "busy", **TRAINING)),
)  # fmt: skip


def rows(parts: Sequence[Facts]) -> list[list[str]]:
    """A goal, the best that was found for it, and whether that is enough."""
    made = []
    for goal in GOALS:
        values = [value for value in goal.found(parts) if value is not None]
        if not values:
            made.append([goal.what, f"{goal.least:{goal.form}}", MISSING, ""])
            continue
        best = max(values)
        all_of_them = ", ".join(f"{value:{goal.form}}" for value in values)
        made.append([goal.what, f"{goal.least:{goal.form}}", all_of_them, "yes" if best >= goal.least else "no"])
    return made


def markdown(parts: Sequence[Facts]) -> str:
    """The table, from the parts of on_gpu's bench.json."""
    return table(["goal (H100)", "at least", "found", "reached"], rows(parts))


def main() -> None:
    try:
        parts = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["parts"]
    except (IndexError, OSError, ValueError, KeyError) as error:
        sys.exit(f"goals: the bench.json of bench/on_gpu.sh is wanted: {error}")
    print(markdown(parts))


if __name__ == "__main__":
    main()
