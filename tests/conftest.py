"""Fixtures for all tests.

`ops` is a backend: the CPU's, once for each instruction set, and CUDA's, on a GPU or a simulated one (on_device.py).
Those that this machine cannot run are reported as skipped, with the reason.  Tests find data through LLMC_TEST_DATA
alone; LLMC_TEST_LIGHT=1 leaves out the tests marked `heavy`, for emulators.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import on_device
import pytest

# Threads that wait must not spin: test machines are shared, and the ops under test are short.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "amx", "neon", "neonbf16")
BACKENDS = (*(f"cpu-{isa}" for isa in ISAS), "cuda")

# What the op tests may need of the workspace: the widest row, the largest vocabulary and tensor in them, the most
# tokens of a call, the most heads.
WORKSPACE = {
    "channels": 4096, "vocab_size": 8192, "parameters": 1 << 21, "tokens": 1 << 14, "heads": 64, "head_size": 256,
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("LLMC_TEST_LIGHT", "0") in ("", "0"):
        return
    for item in items:
        if item.get_closest_marker("heavy"):
            item.add_marker(pytest.mark.skip(reason="heavy, and LLMC_TEST_LIGHT is set"))


def configured(isa: str | None, threads: int, dtype: str = "fp32") -> Iterator[ModuleType]:
    """The CPU backend set to one instruction set and precision, and set back afterwards."""
    from llmc import _cpu

    if isa is not None and isa not in _cpu.all_isas():
        pytest.skip(f"{isa} is not compiled in on this architecture")
    if isa is not None and isa not in _cpu.isas():
        pytest.skip(f"this CPU cannot run {isa}")
    before = _cpu.info()
    _cpu.configure(isa=isa or before["isa"], threads=threads, dtype=dtype)
    _cpu.reserve(**WORKSPACE)
    try:
        yield _cpu
    finally:
        _cpu.configure(isa=before["isa"], threads=before["threads"], dtype=before["dtype"])


def backend(name: str, dtype: str) -> Iterator[Any]:
    """One of BACKENDS, set up with two threads (on a CPU) and a workspace large enough for any op test."""
    if name == "cuda":
        yield from on_device.configured(dtype, WORKSPACE)
    else:
        yield from configured(name.removeprefix("cpu-"), threads=2, dtype=dtype)


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A backend; arrays are NumPy's on all of them."""
    yield from backend(request.param, "fp32")


@pytest.fixture(params=BACKENDS)
def ops_bf16(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The same, with the operands of matrix products rounded to bf16, and on a GPU all that is stored."""
    yield from backend(request.param, "bf16")


@pytest.fixture(params=[f"cpu-{isa}" for isa in ISAS])
def each_isa(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The CPU's backend with each instruction set, for what a GPU does not have or is tested for elsewhere."""
    yield from backend(request.param, "fp32")


@pytest.fixture(params=[f"cpu-{isa}" for isa in ISAS])
def each_isa_bf16(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The same, with the operands of matrix products rounded to bf16."""
    yield from backend(request.param, "bf16")


@pytest.fixture(params=["cpu", "cuda"])
def each_device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The CPU's backend on the instruction set in use, and CUDA's; arrays are NumPy's on both."""
    yield from configured(None, threads=2) if request.param == "cpu" else backend("cuda", "fp32")


@pytest.fixture
def cuda() -> Iterator[ModuleType]:
    """llmc._cuda itself, in fp32, on a GPU or a simulated one; arrays are its own."""
    yield from on_device.opened("fp32", WORKSPACE)


@pytest.fixture
def cpu() -> Iterator[ModuleType]:
    """The CPU backend on the instruction set in use: for what does not depend on it."""
    yield from configured(None, threads=2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240520)


@pytest.fixture
def test_data() -> Path:
    """The folder of test data (tinyshakespeare.txt, tiktoken_cache)."""
    folder = os.environ.get("LLMC_TEST_DATA")
    if not folder:
        pytest.skip("LLMC_TEST_DATA is not set")
    return Path(folder)
