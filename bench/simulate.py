"""What the programs of this folder run on.  With LLMC_TEST_CUDA=simulation the GPU is that of tests/simulation: slow,
and there to see that they run, since no time that they tell means anything then."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any


def cpu_info(threads: int | None = None, required: bool = False) -> dict[str, Any]:
    """What the CPU's backend says; on a GPU's machine, where nothing may have been compiled for it, not `required`."""
    from llmc import ops

    try:
        return ops.load("cpu", threads=threads).info()
    except ImportError:
        if required:
            raise
        return {"threads": threads or os.cpu_count(), "isa": "not built", "waiting": "not built"}


def simulated() -> bool:
    return os.environ.get("LLMC_TEST_CUDA") == "simulation"


def simulate() -> None:
    """Put the simulation in the GPU's place, where the environment says so; before PyCUDA is imported."""
    if simulated():
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        importlib.import_module("simulation").load()
