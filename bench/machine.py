"""What a figure must be read with: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import llmc
from llmc import display, ops

ROOT = Path(__file__).resolve().parent.parent


def facts(threads: int | None = None) -> dict[str, Any]:
    """Names and values, in the order in which they are printed."""
    backend = ops.load("cpu", threads=threads).info()  # type: ignore[attr-defined]
    return {
        "processor": display.processor(),
        "logical CPUs": os.cpu_count(),
        "threads": backend["threads"],
        "instruction set": backend["isa"],
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "llmc": llmc.__version__,
        "commit": commit(),
        "numpy": installed("numpy"),
        "torch": installed("torch"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
    }


def installed(name: str) -> str:
    """The version of a package, found without importing it."""
    try:
        return package_version(name)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: list[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
