"""Results of a benchmark as Markdown, CSV, JSON, or a picture: rows of one kind, and the facts they depend on."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmc.benchmark import KernelRow, TrainingRow
from llmc.errors import ConfigError, MissingDependencyError

FORMATS = ("md", "csv", "json")
PARTS = ("forward", "backward", "update")  # of a training step
Rows = Sequence[KernelRow] | Sequence[TrainingRow]
Facts = Mapping[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def write(rows: Rows, facts: Facts, form: str) -> str:
    """The text of `form`, one of FORMATS."""
    if form == "json":
        return json.dumps({"machine": dict(facts), "rows": [asdict(row) for row in rows]}, indent=2, allow_nan=False)
    if form == "csv":
        return _csv(rows, facts)
    kernels = [row for row in rows if isinstance(row, KernelRow)]
    body = _kernels(kernels) if kernels else _training([row for row in rows if isinstance(row, TrainingRow)])
    return f"{body}\n\n" + "; ".join(f"{name}: {value}" for name, value in facts.items())


def _csv(rows: Rows, facts: Facts) -> str:
    """One line per row; a spread gives three columns, the facts are repeated in each line."""
    lines = []
    for row in rows:
        cells: dict[str, Any] = {}
        for name, value in asdict(row).items():
            if isinstance(value, dict):
                cells |= {f"{name}_{part}": number for part, number in value.items()}
            else:
                cells[name] = value
        lines.append({**cells, **facts})
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue().rstrip("\n")


def _number(value: float) -> str:
    """Four digits, and no more decimals than one."""
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _kernels(rows: Sequence[KernelRow]) -> str:
    """A line per op, shape and type; per instruction set the rate with its quartiles, and the fraction."""
    isas = list(dict.fromkeys(row.isa for row in rows))
    found: dict[tuple[str, ...], dict[str, KernelRow]] = {}
    for row in rows:
        found.setdefault((row.op, row.shape, row.dtype, row.unit), {})[row.isa] = row
    header = ["op", "shape", "dtype", "unit"]
    for isa in isas:
        header += [isa, "of peak"]
    lines = []
    for key, by_isa in found.items():
        cells = list(key)
        for isa in isas:
            at = by_isa.get(isa)
            if at is None:
                cells += ["", ""]
                continue
            # The quarter of the longest times is that of the lowest rates.
            low, high = (at.rate * at.ms.median / ms if ms > 0 else math.inf for ms in (at.ms.upper, at.ms.lower))
            cells += [f"{_number(at.rate)} ({_number(low)} to {_number(high)})", f"{100 * at.fraction:.0f} %"]
        lines.append(cells)
    return table(header, lines)


def _training(rows: Sequence[TrainingRow]) -> str:
    gpu = any(row.busy is not None for row in rows)
    header = [
        "model", "B", "T", "dtype", "isa", "step, ms", "quartiles", "forward", "backward", "update", "tok/s", "MFU",
        "peak MiB", "first step after, s", "turns" if gpu else "steps", *(["GPU busy"] if gpu else []),
    ]  # fmt: skip
    return table(
        header,
        [
            [
                row.init, str(row.B), str(row.T), row.dtype, row.isa, f"{row.ms.median:.1f}",
                f"{row.ms.lower:.1f} to {row.ms.upper:.1f}", f"{row.forward_ms:.1f}", f"{row.backward_ms:.1f}",
                f"{row.update_ms:.1f}", f"{row.tokens_per_second:.0f}", f"{100 * row.mfu:.1f} %",
                f"{row.peak_mib:.0f}", f"{row.first_step_seconds:.2f}", str(row.steps),
                *([f"{100 * row.busy:.1f} %"] if row.busy is not None else []),
            ]
            for row in rows
        ],
    )  # fmt: skip


# ---- a picture -------------------------------------------------------------------------------------


def require_matplotlib() -> Any:
    """matplotlib, which will draw without a screen.  MissingDependencyError where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("a plot needs matplotlib: pip install matplotlib") from error
    return matplotlib


def check_plot(path: str | os.PathLike[str]) -> None:
    """Before minutes of measuring: ConfigError where `plot` could not write there, or would write a PNG under another
    name."""
    place = Path(path)
    if place.suffix.lower() != ".png":
        raise ConfigError("plot", f"{os.fspath(path)}: the picture is a PNG; give a name in .png")
    if place.is_dir():
        raise ConfigError("plot", f"{os.fspath(path)} is a folder")
    if not place.parent.is_dir():
        raise ConfigError("plot", f"{os.fspath(path)} cannot be written: there is no folder {place.parent}")
    require_matplotlib()


def plot(rows: Rows, facts: Facts, path: str | os.PathLike[str]) -> None:
    """A PNG: fractions of the peak, op by op, a bar per instruction set; or the parts of a step, a bar per
    configuration.  ConfigError where it cannot be written."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kernels = [row for row in rows if isinstance(row, KernelRow)]
    groups = len({(row.op, row.shape, row.dtype) for row in kernels}) if kernels else len(rows)
    figure = Figure(figsize=(9, 1.6 + 0.36 * max(groups, 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if kernels:
        _draw_kernels(axes, kernels)
    else:
        _draw_training(axes, [row for row in rows if isinstance(row, TrainingRow)])
    axes.invert_yaxis()
    axes.margins(y=0.4 / max(groups, 1))
    figure.legend(fontsize=8, loc="outside upper center", ncols=4)
    axes.set_title(f"{facts['processor']}, threads: {facts['threads']}, commit {facts['commit']}", fontsize=9)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise ConfigError("plot", f"{os.fspath(path)} cannot be written: {error.strerror}") from error


def _draw_kernels(axes: Any, rows: Sequence[KernelRow]) -> None:
    isas = list(dict.fromkeys(row.isa for row in rows))
    labels = list(dict.fromkeys((row.op, row.shape, row.dtype) for row in rows))
    height = 0.8 / len(isas)
    for number, isa in enumerate(isas):
        mine = [row for row in rows if row.isa == isa]
        places = [labels.index((row.op, row.shape, row.dtype)) + (number + 0.5) * height - 0.4 for row in mine]
        axes.barh(places, [100 * row.fraction for row in mine], height, label=isa)
    axes.set_yticks(range(len(labels)), [" ".join(label) for label in labels], fontsize=7)
    axes.set_xlabel("% of the peak measured beside it")
    axes.axvline(100, color="black", linewidth=0.5)


def _draw_training(axes: Any, rows: Sequence[TrainingRow]) -> None:
    labels = [f"{row.init} B={row.B} T={row.T} {row.dtype} {row.isa}" for row in rows]
    draw_steps(axes, labels, [{part: getattr(row, f"{part}_ms") for part in PARTS} for row in rows])


def draw_steps(axes: Any, labels: Sequence[str], steps: Sequence[Mapping[str, Any]]) -> list[float]:
    """A bar per step, from the ms of its PARTS one after another, or of the whole `step` where they are not known;
    where each bar ends."""
    ends = [0.0] * len(steps)
    for part in PARTS if all(step[part] is not None for step in steps for part in PARTS) else ("step",):
        widths = [step[part] for step in steps]
        axes.barh(range(len(steps)), widths, 0.7, left=ends, label=part)
        ends = [a + b for a, b in zip(ends, widths, strict=True)]
    axes.set_yticks(range(len(steps)), labels, fontsize=7)
    axes.set_xlabel("ms per step")
    return ends
