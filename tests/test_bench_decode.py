"""bench/decode.py: its arithmetic, and a small run of the real thing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "bench" / "decode.py"


@pytest.fixture(scope="module")
def decode() -> Any:
    spec = importlib.util.spec_from_file_location("decode", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worker(decode: Any, kind: str, answers: list[dict[str, Any]]) -> Any:
    made = SimpleNamespace(kind=kind, answers=answers)
    made.median = lambda name: decode.Worker.median(made, name)
    return made


def test_lines(decode: Any) -> None:
    """Fractions and ratios are those of each round; the fewest equal tokens of all rounds count."""
    ours = worker(decode, "llmc", [
        {"rate": 100.0, "nbytes": 2e8, "bandwidth": 4e10, "ids": [1, 2, 3]},
        {"rate": 50.0, "nbytes": 2e8, "bandwidth": 1.25e10, "ids": [1, 2, 3]},
        {"rate": 80.0, "nbytes": 2e8, "bandwidth": 2e10, "ids": [1, 2, 3]},
    ])  # fmt: skip
    theirs = worker(decode, "fp32", [
        {"rate": 20.0, "ids": [1, 2, 3]}, {"rate": 25.0, "ids": [1, 9, 3]}, {"rate": 20.0, "ids": [1, 2, 4]},
    ])  # fmt: skip
    assert decode._line(2, ours, ours)[1:] == ["80.0", "12.50", "16.0", "20.0", "0.80", "1", ""]
    assert decode._line(2, theirs, ours) == ["2: transformers, fp32", "20.0", "50.00", "", "", "", "4.00", "1 of 3"]
    assert decode._line(2, theirs, None)[3:] == [""] * 5


@pytest.mark.heavy
def test_a_small_run() -> None:
    pytest.importorskip("transformers")
    words = "--init d1 --threads 1 --prompt 4 --tokens 6 --rounds 1 --programs llmc,fp32".split()
    done = subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [line[0] for line in lines[2:]] == ["1: llmc, matrices in bf16", "1: transformers, fp32"]
    assert lines[3][-1] == "6 of 6", "the same weights"
    assert all(float(cell) > 0 for cell in lines[2][1:7])
    assert re.search(r"processor: .*; transformers: \d", done.stdout)


def test_what_it_does_not_take() -> None:
    for words, message in (("--programs llmc,x", "x is none of llmc, bf16, fp32"), ("--tokens 2", "at least 3")):
        command = [sys.executable, str(PROGRAM), *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr
