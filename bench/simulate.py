"""With LLMC_TEST_CUDA=simulation the programs of this folder run on tests/simulation instead of a GPU: slowly, and to
see that they run, since no time that they tell means anything then."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


def simulated() -> bool:
    return os.environ.get("LLMC_TEST_CUDA") == "simulation"


def simulate() -> None:
    """Put the simulation in the GPU's place, where the environment says so; before PyCUDA is imported."""
    if simulated():
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
        importlib.import_module("simulation").load()
