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


def one_cpu() -> str:
    """Lines of a program that leave it one of its CPUs, where that can be chosen."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the CPUs of a process cannot be chosen here")
    return "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"


@pytest.mark.parametrize("crowded", [False, True])
def test_the_library_reads_our_policy(crowded: bool) -> None:
    """What `info` says is what the library has read when it was loaded, on one CPU too: a number of turns after which
    threads sleep, within what any CPU needs for 1.5 ms."""
    done = python((one_cpu() if crowded else "") + SHOW, OMP_DISPLAY_ENV="VERBOSE")
    said = re.fullmatch(r"spin for 1.5 ms \((\d+) turns\), then sleep", done.stdout.strip())
    assert said, done.stdout
    assert 10_000 <= int(said[1]) <= 3_000_000
    read = re.search(r"(GOMP_SPINCOUNT|KMP_BLOCKTIME) *= *'(\d+)", done.stderr)
    assert read, done.stderr
    assert read[2] == (said[1] if read[1] == "GOMP_SPINCOUNT" else "2")
    policy = re.search(r"OMP_WAIT_POLICY *= *'(\w+)'", done.stderr)
    assert policy and policy[1] == "PASSIVE"  # "ACTIVE" would spin for ever


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


def test_spin_count(cpu: ModuleType) -> None:
    """1.5 ms for a measured turn, and never outside of what CPUs need, however odd the measurement."""
    from llmc._cpu import waiting

    assert waiting.spin_count(25.0) == 60_000
    assert waiting.spin_count(0.0) == waiting.spin_count(0.5) == 3_000_000
    assert waiting.spin_count(1e9) == waiting.spin_count(150.0) == 10_000
