"""The adapter between tests and GPU: what it takes there and brings back, and what it notices.

A backend of NumPy functions over the simulated device's memory stands in for llmc._cuda, so that an op can do wrong.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import on_device
import pytest
import simulation
from guard import Array, flush
from on_device import Adapter

TESTS = Path(__file__).parent
WORKSPACE = {"channels": 64, "vocab_size": 64, "parameters": 64, "tokens": 64, "heads": 1, "head_size": 64}


@pytest.fixture(autouse=True)
def opened() -> Iterator[None]:
    if on_device.require() != "simulation":
        pytest.skip("a real GPU is in use, whose memory the host cannot touch")
    for _ in on_device.opened("fp32", WORKSPACE):
        yield


def host(x: Any, before: int = 0, after: int = 0) -> Array:
    """The simulated device's memory as it lies there, with `before` and `after` elements more."""
    size = x.size + before + after
    raw = (ctypes.c_char * (size * x.itemsize)).from_address(x.ptr - before * x.itemsize)
    whole = np.frombuffer(raw, x.dtype)
    return whole if before or after else whole.reshape(x.shape)


def adapter(bf16: bool, simulated: bool, **ops: Callable[..., None]) -> Adapter:
    storage = "bfloat16" if bf16 else "float32"
    return Adapter(SimpleNamespace(info=lambda: {"storage": storage}, **ops), simulated)


WAYS = [(False, True), (False, False), (True, True), (True, False)]


@pytest.mark.parametrize("bf16, simulated", WAYS)
def test_there_and_back(bf16: bool, simulated: bool) -> None:
    """Types by the contract, bits of the rest unchanged; statistics stay float32."""
    kinds: dict[str, Any] = {}

    def layernorm_forward(out: Any, mean: Any, rstd: Any, x: Any, w: Any, b: Any, eps: float) -> None:
        kinds.update(out=out.dtype, mean=mean.dtype, x=x.dtype)
        host(out)[...] = 2 * host(x).astype(np.float32)
        host(mean)[...] = 1 / 3

    ops = adapter(bf16, simulated, layernorm_forward=layernorm_forward)
    x = np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)
    before = x.copy()
    out, mean = np.full_like(x, np.nan), np.full((2, 3), np.nan, np.float32)
    ops.layernorm_forward(out, mean, mean.copy(), x, np.ones(5, np.float32), np.ones(5, np.float32), 1e-5)
    storage = np.dtype(ml_dtypes.bfloat16 if bf16 else np.float32)
    assert kinds == {"out": storage, "mean": np.float32, "x": storage}
    assert (out == 2 * x.astype(storage).astype(np.float32)).all()
    assert (mean == np.float32(1 / 3)).all()
    assert x.tobytes() == before.tobytes()


@pytest.mark.parametrize("bf16, simulated", WAYS)
@pytest.mark.parametrize("same", ["one object", "views of one", "neighbours"])
def test_shared_memory(bf16: bool, simulated: bool, same: str) -> None:
    """Arrays that share memory share it there, as far apart; those that only touch do not run into each other."""
    gaps = []

    def residual_forward(out: Any, x: Any, branch: Any) -> None:
        gaps.append((out.ptr - x.ptr) // x.itemsize)
        host(out)[...] = host(x).astype(np.float32) + host(branch).astype(np.float32)

    whole = np.arange(24, dtype=np.float32)
    x = whole[4:12].reshape(1, 2, 4)
    start = {"one object": 4, "views of one": 8, "neighbours": 12}[same]
    out = x if same == "one object" else whole[start : start + 8].reshape(1, 2, 4)
    branch = np.full((1, 2, 4), 100, np.float32)
    expected = x + branch
    adapter(bf16, simulated, residual_forward=residual_forward).residual_forward(out, x, branch)
    assert (out == expected).all()
    if same != "neighbours":
        assert gaps == [{"one object": 0, "views of one": 4}[same]]
    outside = np.ones(24, bool)
    outside[start : start + 8] = False
    assert (whole[outside] == np.arange(24)[outside]).all()


@pytest.mark.parametrize("bf16, simulated, what", [
    *((bf16, False, what) for bf16 in (False, True) for what in ("an input", "before", "after")),
    (True, True, "an input"),  # before and after are forbidden pages
])
def test_wrong_writes_are_noticed(bf16: bool, simulated: bool, what: str) -> None:
    """To an input, or next to an output."""

    def gelu_forward(out: Any, x: Any) -> None:
        if what == "an input":
            host(x)[0, 0, 1] += 1
        elif what == "before":
            host(out, before=1)[0] = 1
        else:
            host(out, after=1)[-1] = 1

    out, x = np.zeros((1, 2, 8), np.float32), np.ones((1, 2, 8), np.float32)
    where = "x" if what == "an input" else "out"
    with pytest.raises(AssertionError, match=f"gelu_forward wrote outside its outputs, near {where}"):
        adapter(bf16, simulated, gelu_forward=gelu_forward).gelu_forward(out, x)


def test_simulated_memory_is_the_tests_own() -> None:
    """float32 is not copied, so forbidden pages of the test are the kernel's; bfloat16 ends at one of its own."""
    seen = []

    def gelu_forward(out: Any, x: Any) -> None:
        seen.append((out.ptr, (x.ptr + x.nbytes) % 4096))

    x, out = flush(np.ones((1, 1, 5), np.float32), "end"), np.zeros((1, 1, 5), np.float32)
    for bf16 in (False, True):
        adapter(bf16, True, gelu_forward=gelu_forward).gelu_forward(out, x)
    assert seen[0] == (out.ctypes.data, 0)
    assert seen[1][0] != out.ctypes.data and seen[1][1] == 0


def test_errors_are_the_backends_own() -> None:
    """What is no array, or too many arguments, is for the op to refuse."""
    from llmc import _cuda

    ops = Adapter(_cuda, True)
    x = np.ones((1, 1, 4), np.float32)
    with pytest.raises(TypeError, match="out: expected an array of the GPU, got list"):
        ops.gelu_forward([1.0], x)
    with pytest.raises(ValueError, match="x: expected dtype float32, got float64"):
        ops.gelu_forward(x, x.astype(np.float64))
    with pytest.raises(TypeError):
        ops.gelu_forward(x, x, x)
    with pytest.raises(TypeError):
        ops.gelu_forward(x)


# ---- which GPU -------------------------------------------------------------------------------------


def mode(**environment: str) -> str:
    """What another process would run on."""
    done = subprocess.run(
        [sys.executable, "-c", "import on_device; print(on_device.mode())"], cwd=TESTS,
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_mode() -> None:
    assert mode(LLMC_TEST_CUDA="simulation") == "('simulation', '')"
    assert mode(LLMC_TEST_CUDA="device") == "('device', '')"
    assert mode(LLMC_TEST_CUDA="off") == "('off', 'LLMC_TEST_CUDA is off')"
    assert "needs g++" in mode(LLMC_TEST_CUDA="simulation", SIMULATION_CXX="no-such-compiler")
    assert mode(LLMC_TEST_CUDA="maybe").startswith("ValueError: LLMC_TEST_CUDA=maybe: choose from")


def test_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(simulation.Unavailable, match="needs Linux on x86-64, and this is linux on aarch64"):
        simulation.compiler()


def test_load_comes_first() -> None:
    """A process that PyCUDA has been imported into already cannot get a simulated GPU any more."""
    program = "import sys, simulation\nsys.modules['pycuda._driver'] = sys\nsimulation.load()"
    done = subprocess.run([sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True)
    assert "PyCUDA has been imported before the simulated GPU was loaded" in done.stderr
