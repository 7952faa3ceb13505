"""Tables and plots of bench/training.py's results, and what its figures are fractions of.

    python bench/report.py run.json                 # the file of --json-out, complete or cut off
    python bench/report.py run.json -o csv --plot run.png
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmc.benchmark import flops_per_token
from llmc.errors import LlmcError
from llmc.gpt2 import Config
from llmc.results import PARTS, draw_steps, require_matplotlib, table

ADAMW_BYTES = 28  # per parameter: read w, m, v and the gradient, write w, m and v


# ---- what could be ---------------------------------------------------------------------------------


def ceiling(config: Config, B: int, T: int, dtype: str, peaks: list[dict[str, float]]) -> dict[str, Any]:
    """A configuration's FLOPs, the medians of the peaks, and the roofline in ms: the products at the peak of their
    type, and AdamW's traffic at the bandwidth of a stream of its shape."""
    flops, traffic = B * T * flops_per_token(config, T), ADAMW_BYTES * config.num_parameters
    found: dict[str, Any] = {"parameters": config.num_parameters, "flops": flops, "adamw_bytes": traffic}
    if peaks:
        peak = statistics.median(p[dtype] for p in peaks)
        stream = statistics.median(p["stream"] for p in peaks)
        roofline = 1e3 * (flops / peak + traffic / stream)
        found |= {"peak": peak, "stream": stream, "peaks": peaks, "roofline_ms": roofline}
    return found


# ---- what was --------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A program's answers, those of llmc in the same rounds (None where it failed), memory and starts."""

    name: str
    answers: list[dict[str, Any]]
    ours: list[dict[str, Any]] | None
    memory: dict[str, float]
    starts: list[float]
    warmup: int


def step_times(answers: list[dict[str, Any]], warmup: int) -> np.ndarray[Any, Any]:
    """(rounds, 3): ms of each part."""
    return 1e3 * np.array([[answer[part] for part in PARTS] for answer in answers[warmup:]])


def summary(measured: Measured, section: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A program's figures; times in ms, starts in seconds."""
    times = step_times(measured.answers, measured.warmup)
    steps = times.sum(axis=1)
    median = float(np.median(steps))
    ratio = None
    if measured.ours is not None:
        ratio = float(np.median(steps / step_times(measured.ours, measured.warmup).sum(axis=1)))
    known = "peak" in section
    return {
        "program": measured.name,
        "step": median,
        "min": float(steps.min()),
        "quartiles": [float(q) for q in np.percentile(steps, [25, 75])],
        **{part: float(np.median(times[:, i])) for i, part in enumerate(PARTS)},
        "tokens_per_second": 1e3 * tokens / median,
        "ratio": ratio,
        "mfu": section["flops"] / (1e-3 * median) / section["peak"] if known else None,
        "roofline": section["roofline_ms"] / median if known else None,
        "peak_mib": measured.memory["peak"],
        "library_mib": measured.memory["libraries"],
        "start": statistics.median(measured.starts),
        "starts": measured.starts,
        "steps_ms": [float(step) for step in steps],
    }


# ---- tables ----------------------------------------------------------------------------------------

COLUMNS = [
    "program", "step, ms", "quartiles", "forward", "backward", "update", "tok/s", "time / llmc's", "MFU", "of roofline",
    "peak MiB", "of which libraries", "start, s",
]  # fmt: skip


def digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def markdown_row(row: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f} %"

    return [
        row["program"], digits(row["step"]), " to ".join(map(digits, row["quartiles"])),
        *(digits(row[part]) for part in PARTS), f"{row['tokens_per_second']:.0f}",
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}", percent(row["mfu"]), percent(row["roofline"]),
        f"{row['peak_mib']:.0f}", f"{row['library_mib']:.0f}", f"{row['start']:.1f}",
    ]  # fmt: skip


def markdown_section(section: dict[str, Any]) -> str:
    title = f"### {section['init']}, B={section['B']}, T={section['T']}, {section['dtype']}"
    said = []
    if section["programs"]:
        said.append(
            f"Medians of {section['rounds']} steps after {section['warmup']} for warming up; losses within "
            f"{section['difference']:.1e} of {section['compared_with']}."
        )
    if section["programs"] and "peak" in section:
        said.append(
            f"Peak {section['peak'] / 1e9:.0f} GFLOP/s, AdamW's stream {section['stream'] / 1e9:.1f} GB/s; roofline "
            f"{digits(section['roofline_ms'])} ms for {section['flops'] / 1e9:.1f} GFLOP and "
            f"{section['adamw_bytes'] / 1e6:.0f} MB."
        )
    if any((row["mfu"] or 0.0) > 1.0 for row in section["programs"]):
        said.append("A program was faster than the peak: the machine was not quiet, so fractions mean nothing here.")
    if random := section.get("starts", {}).get("llmc random"):
        said.append(f"llmc from random weights: {statistics.median(random):.1f} s to the end of the first step.")
    said += [f"Not measured: {name} ({reason})." for name, reason in section["skipped"].items()]
    said += [f"FAILED: {failure}." for failure in section["failures"]]
    parts = [title, " ".join(said)]
    if section["programs"]:
        parts.append(table(COLUMNS, [markdown_row(row) for row in section["programs"]]))
    return "\n\n".join(part for part in parts if part)


def markdown(result: dict[str, Any]) -> str:
    facts = "; ".join(f"{name}: {value}" for name, value in result["machine"].items())
    return "\n\n".join([*map(markdown_section, result["configurations"]), facts])


CSV_FIELDS = [
    "init", "B", "T", "dtype", "rounds", "program", "step", "min", "quartile_25", "quartile_75", *PARTS,
    "tokens_per_second", "ratio", "mfu", "roofline", "peak_mib", "library_mib", "start", "peak", "stream",
    "roofline_ms", "difference", "processor", "threads", "commit",
]  # fmt: skip


def as_csv(result: dict[str, Any]) -> str:
    """One line per program and configuration; times in ms, `start` in seconds, `peak` in FLOP/s, `stream` in B/s."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for section in result["configurations"]:
        for row in section["programs"]:
            low, high = row["quartiles"]
            writer.writerow({**result["machine"], **section, **row, "quartile_25": low, "quartile_75": high})
    return text.getvalue().rstrip("\n")


# ---- plot ------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], path: Path) -> None:
    """A PNG with a panel per configuration: each program's step, divided into its parts, and its time over llmc's."""
    require_matplotlib().use("Agg")
    import matplotlib.pyplot as plt

    sections = [section for section in result["configurations"] if section["programs"]]
    if not sections:
        return
    columns = min(2, len(sections))
    lines = -(-len(sections) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(6.5 * columns, 0.6 + 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(sections) :]:
        axis.set_visible(False)
    for axis, section in zip(axes.flat, sections, strict=False):
        rows = section["programs"]
        ends = draw_steps(axis, [row["program"] for row in rows], rows)
        for i, row in enumerate(rows):
            if row["ratio"] is not None:
                axis.annotate(f" {row['ratio']:.2f} x", (ends[i], i), va="center")
        if "roofline_ms" in section:
            axis.axvline(section["roofline_ms"], color="black", linestyle="--", linewidth=1, label="roofline")
        axis.set_xlim(0, 1.15 * max(ends))
        axis.invert_yaxis()
        axis.set_title(f"{section['init']}, B={section['B']}, T={section['T']}, {section['dtype']}", fontsize=10)
    axes.flat[0].legend(fontsize=8)
    facts = result["machine"]
    figure.suptitle(f"{facts['processor']}, {facts['threads']} threads, llmc {facts['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120, format="png")


# ---- output ----------------------------------------------------------------------------------------


def write_whole(path: Path, text: str) -> None:
    """A file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", "-o", choices=("md", "csv", "json"), default="md", help="format (md)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the steps; needs matplotlib")


def output(result: dict[str, Any], args: argparse.Namespace) -> None:
    """What the options of `add_output_options` ask for."""
    formats = {"md": markdown, "csv": as_csv, "json": lambda result: json.dumps(result, indent=2)}
    print(formats[args.output](result))
    if args.plot:
        try:
            plot(result, args.plot)
        except (LlmcError, OSError) as error:
            sys.exit(f"bench: --plot: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="what bench/training.py --json-out wrote")
    add_output_options(parser)
    args = parser.parse_args()
    try:
        result = json.loads(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"bench: {args.file}: {error}")
    output(result, args)


if __name__ == "__main__":
    main()
