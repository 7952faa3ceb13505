"""Results do not depend on the number of threads, to the bit; scratch is reserved, never grown on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from guard import OUTPUTS, Sizes, example, number
from numpy.random import Generator

from llmc.errors import ConfigError

# Past the edges of every chunk, block and panel, with an odd rest: rows of a batch, tokens of a head
# chunk, a GEMM's three blocks, several attention blocks.
LARGE = Sizes(B=3, T=211, C=144, H=3, N=389, V=1201, Vp=1280, maxT=300, r=19)
# One row, or fewer rows than threads.
SMALL = Sizes(B=1, T=1, C=8, H=1, N=5, V=3, Vp=4, maxT=2)
THREADS = (1, 2, 3, 4)


def run(ops: ModuleType, op: str, sizes: Sizes, threads: int, accumulate: bool) -> dict[str, bytes]:
    """What the op writes, as bytes."""
    ops.configure(isa=ops.info()["isa"], threads=threads, dtype=ops.info()["dtype"])
    assert ops.info()["threads"] == threads or not ops.info()["openmp"]
    given = example(op, np.random.default_rng(7), sizes, accumulate)
    getattr(ops, op)(*given.values())
    return {name: given[name].tobytes() for name in OUTPUTS[op]}


@pytest.mark.parametrize("sizes", [pytest.param(LARGE, marks=pytest.mark.heavy, id="large"), SMALL])
@pytest.mark.parametrize("op", OUTPUTS)
def test_same_bits(each_isa: ModuleType, op: str, sizes: Sizes) -> None:
    for accumulate in (False, True):
        results = [run(each_isa, op, sizes, threads, accumulate) for threads in THREADS]
        for threads, result in zip(THREADS, results, strict=True):
            for name, content in result.items():
                assert content == results[0][name], f"{op}: {name} differs between 1 and {threads} threads"


@pytest.mark.parametrize("sizes", [pytest.param(LARGE, marks=pytest.mark.heavy, id="large"), SMALL])
@pytest.mark.parametrize("op", ["linear_forward", "linear_backward", "head_loss", "head_logits"])
def test_same_bits_of_bfloat16(each_isa: ModuleType, op: str, sizes: Sizes) -> None:
    """Matrices that are widened as they are read."""
    results = []
    for threads in THREADS:
        each_isa.configure(isa=each_isa.info()["isa"], threads=threads)
        given = example(op, np.random.default_rng(7), sizes, False)
        given["w"] = given["w"].astype(ml_dtypes.bfloat16)
        given.update({gradient: None for gradient in ("dw", "db") if gradient in given})
        getattr(each_isa, op)(**given)
        results.append([given[output].tobytes() for output in OUTPUTS[op] if given[output] is not None])
    assert all(result == results[0] for result in results)


PRODUCTS = [op for op in OUTPUTS if op.startswith(("linear", "lora", "attention", "head"))]


@pytest.mark.parametrize("sizes", [pytest.param(LARGE, marks=pytest.mark.heavy, id="large"), SMALL])
@pytest.mark.parametrize("op", PRODUCTS)
def test_same_bits_in_bf16(each_isa_bf16: ModuleType, op: str, sizes: Sizes) -> None:
    test_same_bits(each_isa_bf16, op, sizes)


@pytest.mark.heavy
def test_norm_of_many_chunks(each_isa: ModuleType, rng: Generator) -> None:
    """The one long sum of the contract: hundreds of chunks, shared out in every way."""
    x = rng.standard_normal(1_500_007).astype(np.float32)
    values = set()
    for threads in THREADS:
        each_isa.configure(isa=each_isa.info()["isa"], threads=threads)
        for _ in range(3):
            norm = number()
            each_isa.global_norm(norm, x)
            values.add(norm[0])
    assert len(values) == 1


def test_thread_count_is_obeyed(cpu: ModuleType) -> None:
    for threads in (1, 3, 2):
        cpu.configure(threads=threads)
        assert cpu.info()["threads"] == (threads if cpu.info()["openmp"] else 1)


@pytest.mark.parametrize("threads", [0, -1])
def test_wrong_thread_count(cpu: ModuleType, threads: int) -> None:
    """Refused, and what goes with it is not done either."""
    cpu.configure(isa=cpu.isas()[-1], threads=2)
    before = cpu.info()
    with pytest.raises(ConfigError, match="threads"):
        cpu.configure(isa="scalar", threads=threads)
    assert cpu.info() == before


@pytest.mark.parametrize("value", ["0", "many", "-3"])
def test_wrong_thread_count_in_the_environment(value: str) -> None:
    done = python("from llmc import ops; ops.load('cpu')", OMP_NUM_THREADS=value)
    assert done.returncode == 1
    assert "ConfigError: OMP_NUM_THREADS" in done.stderr


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)


def test_default_threads() -> None:
    """OMP_NUM_THREADS, and without it no more than the CPUs this process may use."""
    program = "from llmc import ops; i = ops.load('cpu').info(); print(i['threads'], bool(i['openmp']))"
    done = python(program, OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    threads, openmp = done.stdout.split()
    assert threads == ("3" if openmp == "True" else "1")
    done = python(program)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert 1 <= int(done.stdout.split()[0]) <= available


RESERVED = """
import numpy as np
from llmc import ops
cpu = ops.load("cpu", threads=2)
x = np.ones((1, 300, 2000), np.float32)
w, stat, b = np.ones((3000, 2000), np.float32), np.zeros((1, 300), np.float32), np.ones(2000, np.float32)
targets = np.zeros((1, 300), np.int32)
big, scalar = np.ones(5_000_000, np.float32), np.zeros(1)
calls = {
    "layernorm": lambda: cpu.layernorm_backward(x.copy(), b.copy(), b.copy(), x, x, stat, stat, b, False),
    "head": lambda: cpu.head_loss(stat, x.copy(), w.copy(), x, w, targets, 2900, 1.0, 0.0, False),
    "norm": lambda: cpu.global_norm(scalar, big),
}
def attempt(name):
    try:
        calls[name]()
        return "ran"
    except RuntimeError as error:
        return "reserve" if "reserve" in str(error) else f"unclear: {error}"
print(*(attempt(name) for name in calls))
cpu.reserve(channels=2000, vocab_size=2900, parameters=5_000_000, tokens=1, heads=1, head_size=1)
print(*(attempt(name) for name in calls))
cpu.reserve(channels=1, vocab_size=1, parameters=1, tokens=1, heads=1, head_size=1)
print(*(attempt(name) for name in calls))
"""


def test_workspace_must_be_reserved() -> None:
    """Before `reserve`, an op that needs more scratch than there is says so; `reserve` never shrinks it."""
    done = python(RESERVED)
    assert done.returncode == 0, done.stderr
    before, after, still = (line.split() for line in done.stdout.splitlines())
    assert set(before) <= {"ran", "reserve"} and "reserve" in before
    assert after == still == ["ran"] * 3


FORKED = """
import os, numpy as np
from llmc import ops
cpu = ops.load("cpu", threads=2)
cpu.reserve(channels=64, vocab_size=64, parameters=1 << 20, tokens=300, heads=1, head_size=64)
x, w = np.ones((1, 300, 64), np.float32), np.ones((64, 64), np.float32)
out = np.zeros_like(x)
cpu.linear_forward(out, x, w, None)
child = os.fork()
if child == 0:
    out[...] = 0
    cpu.linear_forward(out, x, w, None)
    os._exit(0 if (out == 64).all() else 1)
_, status = os.waitpid(child, 0)
cpu.linear_forward(out, x, w, None)
print(os.waitstatus_to_exitcode(status), (out == 64).all())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_after_a_parallel_region() -> None:
    """libgomp's threads do not survive a fork: without care, the child hangs in its first parallel region."""
    done = python(FORKED)
    assert done.stdout.split() == ["0", "True"], done.stderr
