"""The instruction set that is asked for is the one that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import ISAS
from numpy.random import Generator

from llmc.errors import ConfigError
from llmc.ops import load

SHOW = "from llmc import ops; print(ops.load('cpu').info()['isa'])"
REFUSAL = """
from llmc import ops
from llmc.errors import ConfigError
try:
    ops.load("cpu")
except ConfigError as error:
    print(error.field, "|", error)
"""


def python(program: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "LLMC_ISA"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names(cpu: ModuleType) -> None:
    """scalar runs everywhere; what runs is compiled in; the fixture `ops` knows every name."""
    assert "scalar" in cpu.isas()
    assert set(cpu.isas()) <= set(cpu.all_isas()) <= set(ISAS)
    assert len(set(cpu.all_isas())) == len(cpu.all_isas())
    assert {"isa", "threads", "openmp"} <= set(cpu.info())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/cpuinfo")
def test_isas_are_what_the_kernel_says(cpu: ModuleType) -> None:
    """Detection against the flags that the operating system lists."""
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    if "avx2" in cpu.all_isas():
        assert ("avx2" in cpu.isas()) == ({"avx2", "fma"} <= flags)
    if "avx512" in cpu.all_isas():
        assert ("avx512" in cpu.isas()) == ({"avx512f", "avx512vl", "avx512dq", "avx512bw"} <= flags)
    if "avx512bf16" in cpu.all_isas():
        assert ("avx512bf16" in cpu.isas()) == ("avx512" in cpu.isas() and "avx512_bf16" in flags)
    if "amx" in cpu.all_isas():
        assert ("amx" in cpu.isas()) == ("avx512bf16" in cpu.isas() and {"amx_tile", "amx_bf16"} <= flags)
    if "neon" in cpu.all_isas():
        assert "neon" in cpu.isas()
    if "neonbf16" in cpu.all_isas():
        assert ("neonbf16" in cpu.isas()) == ("bf16" in flags)


def test_forced_by_argument(each_isa: ModuleType) -> None:
    isa = each_isa.info()["isa"]
    assert load("cpu", isa=isa, threads=1).info()["isa"] == isa


def test_forced_by_environment(each_isa: ModuleType) -> None:
    isa = each_isa.info()["isa"]
    assert python(SHOW, LLMC_ISA=isa) == isa


def test_the_argument_outweighs_the_environment(cpu: ModuleType) -> None:
    best = python(SHOW)
    program = f"from llmc import ops; print(ops.load('cpu', isa={best!r}).info()['isa'])"
    assert python(program, LLMC_ISA="scalar") == best
    assert python(program, LLMC_ISA="none such") == best


def test_best_by_default(cpu: ModuleType) -> None:
    """Without being told, the fastest that this CPU can run."""
    best_first = ("avx512bf16", "avx512", "avx2", "neonbf16", "neon", "scalar")  # never amx, which nobody has run
    expected = next(isa for isa in best_first if isa in cpu.isas())
    assert python(SHOW) == expected
    assert python(SHOW, LLMC_ISA="") == expected


@pytest.mark.parametrize("name", ["sse9", "AVX2 ", "scalar,avx2", " "])
def test_unknown_name(cpu: ModuleType, name: str) -> None:
    before = cpu.info()
    with pytest.raises(ConfigError) as caught:
        cpu.configure(isa=name)
    for isa in cpu.isas():
        assert isa in str(caught.value), "the message lists what may be chosen"
    assert cpu.info() == before, "a refusal changes nothing"
    shown = python(REFUSAL, LLMC_ISA=name)
    assert "LLMC_ISA" in shown or shown.startswith("isa |")
    assert "scalar" in shown


def test_isa_this_machine_lacks(cpu: ModuleType) -> None:
    """Names we know but cannot run here, compiled in or not, are refused with the list too."""
    lacking = set(ISAS) - set(cpu.isas())
    assert lacking, "no machine has both AVX-512 and NEON"
    for isa in sorted(lacking):
        with pytest.raises(ConfigError, match="scalar") as caught:
            cpu.configure(isa=isa)
        assert isa in str(caught.value)


def test_the_tables_really_differ(cpu: ModuleType, rng: Generator) -> None:
    """Sums of different widths, or of pairs, round differently: no two instruction sets give the same thousand sums.

    Were the choice ignored, all would agree to the bit.  Those that differ in products of bf16 alone agree in fp32.
    """
    x, w = rng.standard_normal((1, 200, 500)), rng.standard_normal((300, 500))
    x32, w32 = x.astype(np.float32), w.astype(np.float32)
    results = {}
    for isa in cpu.isas():
        cpu.configure(isa=isa, dtype="bf16")
        out, pre = np.zeros((1, 200, 300), np.float32), np.zeros((1, 200, 300), np.float32)
        cpu.linear_gelu_forward(out, pre, x32, w32, None)
        dx, dw, db = np.zeros_like(x32), np.zeros(500, np.float32), np.zeros(500, np.float32)
        stat = np.ones((1, 200), np.float32)
        cpu.layernorm_backward(dx, dw, db, x32, x32, stat, stat, w32[0], False)
        results[isa] = pre.tobytes() + dx.tobytes()
    if len(results) == 1:
        pytest.skip("one instruction set alone runs here")
    assert len(set(results.values())) == len(results)
