"""How threads wait between parallel regions: a moment's spinning, then sleep, and the environment is left alone.

In processes of their own, since OpenMP's library reads its policy once, when it is loaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

from llmc import ops

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SHOW = "from llmc import ops; print(ops.load('cpu', threads=2).info()['waiting'])"


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(autouse=True)
def with_openmp() -> None:
    if not ops.load("cpu", threads=1).info()["openmp"]:  # type: ignore[attr-defined]
        pytest.skip("built without OpenMP")


def displayed(variable: str, program: str, **environment: str) -> str | None:
    """What OpenMP's library says it has read, or None where it does not tell (only GNU's has the name)."""
    shown = python(program, OMP_DISPLAY_ENV="VERBOSE", **environment).stderr
    assert "OPENMP DISPLAY ENVIRONMENT BEGIN" in shown
    found = re.search(rf"{variable} *= *'(.*)'", shown)
    return found and found[1]


def test_the_library_reads_our_policy() -> None:
    """What `info` says is what the library has read when it was loaded."""
    done = python(SHOW, OMP_DISPLAY_ENV="VERBOSE")
    said = re.fullmatch(r"spin for 1.5 ms \((\d+) turns\), then sleep", done.stdout.strip())
    assert said, done.stdout
    read = re.search(r"(GOMP_SPINCOUNT|KMP_BLOCKTIME) *= *'(\d+)", done.stderr)
    assert read, done.stderr
    assert read[2] == (said[1] if read[1] == "GOMP_SPINCOUNT" else "2")


@pytest.mark.parametrize("variable, value", [
    ("OMP_WAIT_POLICY", "ACTIVE"), ("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "1234"), ("KMP_BLOCKTIME", "77"),
])  # fmt: skip
def test_the_user_wins(variable: str, value: str) -> None:
    """One variable of the user's own is enough for us to set none."""
    assert python(SHOW, **{variable: value}).stdout.strip() == f"as {variable}={value} says"
    ours = displayed("GOMP_SPINCOUNT", SHOW)
    if ours is None:
        pytest.skip("the policy in effect is shown by GNU's library alone")
    assert displayed("GOMP_SPINCOUNT", SHOW, **{variable: value}) != ours
    if variable != "KMP_BLOCKTIME":
        assert displayed(variable, SHOW, **{variable: value}) == value


def test_the_environment_is_left_alone() -> None:
    """After the import it is what it was: in Python, in C, and in a child."""
    program = (
        "import os, subprocess, sys\n"
        "before = dict(os.environ)\n"
        "import llmc._cpu\n"
        "assert dict(os.environ) == before\n"
        "show = 'import os; print({n for n in os.environ if n.startswith((\"GOMP\", \"KMP\", \"OMP\"))})'\n"
        "print(subprocess.check_output([sys.executable, '-c', show], text=True))\n"
    )
    assert python(program, OMP_NUM_THREADS="2").stdout.strip() == "{'OMP_NUM_THREADS'}"


def test_a_library_loaded_before_is_reported() -> None:
    """Then nothing can be set any more, and nothing is claimed."""
    names = {"linux": "libgomp.so.1", "darwin": "libomp.dylib"}
    load_first = f"import ctypes; ctypes.CDLL({names.get(sys.platform)!r})\n"
    try:
        done = python(load_first + SHOW, OMP_DISPLAY_ENV="VERBOSE")
    except AssertionError as error:
        if "OSError" not in str(error):
            raise
        pytest.skip("OpenMP's library is not to be had by this name")
    assert "loaded OpenMP, before llmc" in done.stdout
    assert "GOMP_SPINCOUNT = '300000'" in done.stderr or "KMP" in done.stderr


IDLE = """
import time
import numpy as np
from llmc import ops
cpu = ops.load("cpu", threads=2)
x, w = np.ones((1, 64, 64), np.float32), np.ones((64, 64), np.float32)
out = np.zeros_like(x)
cpu.linear_forward(out, x, w, None)
began = time.process_time()
time.sleep(0.3)
print(time.process_time() - began)
"""


def test_an_idle_process_sleeps() -> None:
    """0.3 s after a region: threads that spun on would have used as much; these stop after a moment.

    A tenth is far from either, whatever else the machine is doing.
    """
    assert float(python(IDLE).stdout) < 0.03


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the CPUs of a process cannot be chosen here")
def test_more_threads_than_cpus() -> None:
    """Two threads on one CPU: who spins keeps the other from what it waits for.  Two thousand regions take two thousand
    times 1.5 ms then; with a library that knows of the one CPU, and gives way, a small part of that."""
    program = (
        "import os, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import numpy as np\n"
        "from llmc import ops\n"
        "cpu = ops.load('cpu', threads=2)\n"
        "x = np.ones(64, np.float32)\n"
        "cpu.zero(x)\n"
        "began = time.process_time()\n"
        "for _ in range(2000): cpu.zero(x)\n"
        "print(time.process_time() - began)\n"
    )
    assert float(python(program).stdout) < 0.5 * 2000 * 1.5e-3


def test_spin_count(cpu: ModuleType) -> None:
    """1.5 ms for a measured turn, and never outside of what CPUs need, however odd the measurement."""
    from llmc._cpu import waiting

    assert waiting.spin_count(25.0) == 60_000
    assert waiting.spin_count(0.0) == waiting.spin_count(0.5) == 3_000_000
    assert waiting.spin_count(1e9) == waiting.spin_count(150.0) == 10_000
