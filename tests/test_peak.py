"""The ceilings: numbers that mean something on every instruction set, and refusals.  How large they are is no test's
business: that depends on who else uses the machine."""

from __future__ import annotations

import math
from types import ModuleType

import pytest


def test_registers(ops: ModuleType) -> None:
    for measure in (ops.measure_fma, ops.measure_dot):
        rate = measure(0.0)
        assert math.isfinite(rate) and rate > 0


@pytest.mark.parametrize("nbytes", [0, 4096, 100_000, 3 << 20])
@pytest.mark.parametrize(
    "reads, writes, updates",
    [(0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 0, 1), (2, 0, 1), (1, 0, 3), (0, 0, 1), (7, 5, 4)],
)
def test_stream(ops: ModuleType, reads: int, writes: int, updates: int, nbytes: int) -> None:
    rate = ops.measure_stream(reads, writes, nbytes, 0.0, updates)
    assert math.isfinite(rate) and rate > 0


def test_time_is_spent(cpu: ModuleType) -> None:
    """A measurement takes as long as it was told, so more time means more samples and not another unit."""
    import time

    for measure in (cpu.measure_fma, cpu.measure_dot, lambda seconds: cpu.measure_stream(1, 1, 1 << 16, seconds)):
        began = time.perf_counter()
        measure(0.05)
        assert time.perf_counter() - began >= 0.05


@pytest.mark.parametrize("arrays", [(0, 0, 0), (-1, 2, 0), (1, -1, 1), (16, 1, 0), (8, 8, 1)])
def test_impossible_streams(cpu: ModuleType, arrays: tuple[int, int, int]) -> None:
    reads, writes, updates = arrays
    with pytest.raises(ValueError, match="reads, writes, updates"):
        cpu.measure_stream(reads, writes, 4096, 0.0, updates)


def test_they_belong_to_no_contract() -> None:
    """A backend without them is a backend still."""
    from llmc.ops import Ops

    assert not [name for name in dir(Ops) if name.startswith("measure") or name == "product"]
