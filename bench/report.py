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

ADAMW_BYTES = 28  # per parameter: read w, m, v and the gradient, write w, m and v; or half a gradient and a copy

# Dense bf16 FLOP/s on NVIDIA's data sheets, by what is in a GPU's name; the first that matches.
DATASHEET = (
    ("H100 PCIe", 756.5e12), ("H100 NVL", 835.5e12), ("H100", 989.4e12), ("H200", 989.4e12), ("GH200", 989.4e12),
    ("B200", 2250e12), ("A100", 311.9e12), ("L40S", 362.1e12), ("L4", 121e12), ("RTX 4090", 165.2e12),
    ("A10", 125e12), ("RTX 3090", 71e12),
)  # fmt: skip


def datasheet(name: str, dtype: str = "bf16") -> float | None:
    """Dense FLOP/s of tensor cores that NVIDIA states for a GPU of this name, in tf32 half of bf16's; None for fp32,
    and for one that is not in the table."""
    share = {"bf16": 1.0, "tf32": 0.5}.get(dtype)
    rate = next((rate for part, rate in DATASHEET if part in name), None)
    return None if share is None or rate is None else share * rate


# ---- what could be ---------------------------------------------------------------------------------


def ceiling(
    config: Config, B: int, T: int, dtype: str, peaks: list[dict[str, float]], only_forward: bool = False
) -> dict[str, Any]:
    """A configuration's FLOPs, the medians of the peaks, and the roofline in ms: the products at the peak of their
    type, and AdamW's traffic at the bandwidth of a stream of its shape."""
    flops, traffic = B * T * flops_per_token(config, T), float(ADAMW_BYTES * config.num_parameters)
    if only_forward:
        flops, traffic = flops / 3, 0.0
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
    """(rounds,): ms of a step."""
    return 1e3 * np.array([a["step"] if "step" in a else sum(a[part] for part in PARTS) for a in answers[warmup:]])


def median_of(answers: list[dict[str, Any]], name: str) -> float | None:
    values = [answer.get(name) for answer in answers]
    return None if None in values else statistics.median(values)


def summary(measured: Measured, section: dict[str, Any], tokens: int, gpu: str = "") -> dict[str, Any]:
    """A program's figures; times in ms, starts in seconds.  On a GPU of the name `gpu` also the fraction of what its
    data sheet says; None there and elsewhere for what is not known."""
    steps, answers = step_times(measured.answers, measured.warmup), measured.answers[measured.warmup :]
    median = float(np.median(steps))
    ratio = None
    if measured.ours is not None:
        ratio = float(np.median(steps / step_times(measured.ours, measured.warmup)))
    known, stated = "peak" in section, datasheet(gpu, section.get("dtype", "bf16"))
    parts = {part: median_of(answers, part) for part in PARTS}
    return {
        "program": measured.name,
        "step": median,
        "min": float(steps.min()),
        "quartiles": [float(q) for q in np.percentile(steps, [25, 75])],
        **{part: None if seconds is None else 1e3 * seconds for part, seconds in parts.items()},
        "busy": median_of(answers, "busy"),
        "tokens_per_second": 1e3 * tokens / median,
        "ratio": ratio,
        "mfu": section["flops"] / (1e-3 * median) / section["peak"] if known else None,
        "mfu_datasheet": section["flops"] / (1e-3 * median) / stated if stated else None,
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
GPU_COLUMNS = [
    "program", "step, ms", "quartiles", "tok/s", "time / llmc's", "MFU, data sheet", "MFU, measured", "of roofline",
    "GPU busy", "GPU MiB", "start, s",
]  # fmt: skip


def digits(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def gpu_row(row: dict[str, Any]) -> list[str]:
    return [
        row["program"], digits(row["step"]), " to ".join(map(digits, row["quartiles"])),
        f"{row['tokens_per_second']:.0f}", "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        percent(row["mfu_datasheet"]), percent(row["mfu"]), percent(row["roofline"]),
        "-" if row["busy"] is None else f"{100 * row['busy']:.1f} %", f"{row['peak_mib']:.0f}", f"{row['start']:.1f}",
    ]  # fmt: skip


def markdown_row(row: dict[str, Any]) -> list[str]:
    return [
        row["program"], digits(row["step"]), " to ".join(map(digits, row["quartiles"])),
        *(digits(row[part]) for part in PARTS), f"{row['tokens_per_second']:.0f}",
        "-" if row["ratio"] is None else f"{row['ratio']:.2f}", percent(row["mfu"]), percent(row["roofline"]),
        f"{row['peak_mib']:.0f}", f"{row['library_mib']:.0f}", f"{row['start']:.1f}",
    ]  # fmt: skip


def markdown_section(section: dict[str, Any]) -> str:
    gpu, what = section["device"] != "cpu", ", forward alone" if section["only_forward"] else ""
    title = f"### {section['init']}, B={section['B']}, T={section['T']}, {section['dtype']}{what}"
    said = []
    if section["programs"]:
        turns = f"turns of {section['steps']} steps" if gpu else "steps"
        said.append(
            f"Medians of {section['rounds']} {turns} after {section['warmup']} for warming up; losses within "
            f"{section['difference']:.1e} of {section['compared_with']}."
        )
    if section["programs"] and "peak" in section:
        stream = "copy" if gpu else "AdamW's stream"
        said.append(
            f"Peak {section['peak'] / 1e9:.0f} GFLOP/s, {stream} {section['stream'] / 1e9:.1f} GB/s; roofline "
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
        columns, line = (GPU_COLUMNS, gpu_row) if gpu else (COLUMNS, markdown_row)
        parts.append(table(columns, [line(row) for row in section["programs"]]))
    return "\n\n".join(part for part in parts if part)


def markdown(result: dict[str, Any]) -> str:
    facts = "; ".join(f"{name}: {value}" for name, value in result["machine"].items())
    return "\n\n".join([*map(markdown_section, result["configurations"]), facts])


CSV_FIELDS = [
    "init", "B", "T", "dtype", "device", "only_forward", "rounds", "program", "step", "min", "quartile_25",
    "quartile_75", *PARTS, "tokens_per_second", "ratio", "mfu", "mfu_datasheet", "roofline", "busy", "peak_mib",
    "library_mib", "start", "peak", "stream", "roofline_ms", "difference", "processor", "GPU", "threads", "commit",
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
