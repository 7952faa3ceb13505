"""The ceilings: numbers that mean something on every instruction set, and refusals.  How large they are is no test's
business: that depends on who else uses the machine."""

from __future__ import annotations

import functools
import math
from types import ModuleType

import numpy as np
import pytest
from guard import Guarded


def test_registers(each_isa: ModuleType) -> None:
    for measure in (each_isa.measure_fma, each_isa.measure_dot):
        rate = measure(0.0)
        assert math.isfinite(rate) and rate > 0


@pytest.mark.parametrize("nbytes", [0, 4096, 100_000, 3 << 20])
@pytest.mark.parametrize(
    "reads, writes, updates",
    [(0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 0, 1), (2, 0, 1), (1, 0, 3), (0, 0, 1), (7, 5, 4)],
)
def test_stream(each_isa: ModuleType, reads: int, writes: int, updates: int, nbytes: int) -> None:
    memory = np.full(each_isa.stream_floats(nbytes), np.nan, np.float32)
    rate = each_isa.measure_stream(memory, reads, writes, nbytes, 0.0, updates)
    assert math.isfinite(rate) and rate > 0


@pytest.mark.parametrize("reads, writes, updates", [(1, 0, 0), (2, 0, 1), (7, 5, 4)])
def test_a_stream_stays_in_its_memory(each_isa: ModuleType, reads: int, writes: int, updates: int) -> None:
    """Flush with forbidden pages; and what is too short is refused before it is touched."""
    nbytes = 100_000
    for place in ("start", "end"):
        guard = Guarded(np.ones(each_isa.stream_floats(nbytes), np.float32), place)
        each_isa.measure_stream(guard.array, reads, writes, nbytes, 0.0, updates)
        assert guard.intact() and np.isfinite(guard.array).all()
    short = np.ones(nbytes // 4, np.float32)
    with pytest.raises(ValueError, match="memory: 25,000 floats are too few"):
        each_isa.measure_stream(short, reads, writes, nbytes, 0.0, updates)
    with pytest.raises(TypeError, match="memory"):
        each_isa.measure_stream(None, reads, writes, nbytes, 0.0, updates)
    assert (short == 1).all()


def test_time_is_spent(cpu: ModuleType) -> None:
    """A measurement takes as long as it was told, so more time means more samples and not another unit."""
    import time

    memory = np.zeros(cpu.stream_floats(1 << 16), np.float32)
    stream = functools.partial(cpu.measure_stream, memory, 1, 1, 1 << 16)
    for measure in (cpu.measure_fma, cpu.measure_dot, stream):
        began = time.perf_counter()
        measure(0.05)
        assert time.perf_counter() - began >= 0.05


@pytest.mark.parametrize("arrays", [(0, 0, 0), (-1, 2, 0), (1, -1, 1), (16, 1, 0), (8, 8, 1)])
def test_impossible_streams(cpu: ModuleType, arrays: tuple[int, int, int]) -> None:
    reads, writes, updates = arrays
    with pytest.raises(ValueError, match="reads, writes, updates"):
        cpu.measure_stream(np.zeros(1 << 14, np.float32), reads, writes, 4096, 0.0, updates)


def test_they_belong_to_no_contract() -> None:
    """A backend without them is a backend still."""
    from llmc.ops import Ops

    assert not [name for name in dir(Ops) if name.startswith("measure") or name == "product"]
