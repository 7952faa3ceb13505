"""What a figure must be read with: the machine, the versions, the commit, the memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from llmc import __version__

ROOT = Path(__file__).resolve().parent.parent


def facts(backend: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values, in the order in which they are printed; `backend` is what the CPU's `info` says."""
    return {
        "processor": processor(),
        "logical CPUs": os.cpu_count(),
        "threads": backend["threads"],
        "instruction set": backend["isa"],
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "llmc": __version__,
        "commit": commit(),
        "numpy": installed("numpy"),
        "torch": installed("torch"),
        "waiting threads": backend["waiting"],
    }


def gpu_facts(backend: Mapping[str, Any]) -> dict[str, Any]:
    """What a GPU's figure must be read with, from its backend's `info`."""
    return {
        "GPU": backend["name"],
        "driver": backend["driver"],
        "compiler": backend["compiler"],
        "gemm": backend["gemm"],
        "attention": backend["attention"],
        "pycuda": installed("pycuda"),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("model name", "Model", "cpu model"):
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def installed(name: str) -> str:
    """The version of a package, found without importing it."""
    try:
        return package_version(name)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; "unknown" for an installed package."""
    if not (ROOT / ".git").exists():  # the folder it is installed in may belong to a checkout of something else
        return "unknown"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def memory() -> dict[str, float]:
    """MiB that this process holds now, and the most it ever held.

    From /proc where there is one.  Elsewhere getrusage knows the largest value alone, and it may count what
    the parent held before the process became this one.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        return {"now": most, "peak": most}
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {"now": int(lines["VmRSS"].split()[0]) / 1024, "peak": int(lines["VmHWM"].split()[0]) / 1024}
