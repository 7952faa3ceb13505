"""What a user reads where a GPU, or what it takes, is missing, and when a kernel fails.

Each in a process of its own, with a simulated GPU that is made to be so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from llmc._cuda import gpu
from llmc.errors import DeviceError

TESTS = Path(__file__).parent

PRELUDE = """
import os, sys
import simulation
simulation.load()
import numpy as np
from llmc import ops
from llmc._cuda import compiler, cublaslt, device, driver
from llmc._cuda.compiler import Kernel
from llmc.errors import LlmcError
def attempt(function, *given, **named):
    try:
        return function(*given, **named)
    except LlmcError as error:
        print(type(error).__name__, error, sep=": ")
"""


@pytest.fixture
def child(cuda: ModuleType, tmp_path: Path) -> Callable[..., list[str]]:
    """Lines that a program writes in a process with a GPU of its own: `environment` says what it is like."""
    if not os.environ.get("LLMC_CUDA_LIBRARIES"):
        pytest.skip("a GPU that can be made to fail is a simulated one")

    def run(program: str, prelude: str = PRELUDE, **environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", prelude + program], cwd=TESTS, capture_output=True, text=True, timeout=120,
            env={**os.environ, "LLMC_CUDA_CHECK": "", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        noise = [line for line in done.stderr.splitlines() if not line.startswith("simulation: ")]
        assert noise == []
        return done.stdout.splitlines()

    return run


def test_a_driver_that_starts_without_a_gpu() -> None:
    cuda = SimpleNamespace(Device=SimpleNamespace(count=lambda: 0))
    with pytest.raises(DeviceError, match="there is no GPU to use"):
        gpu.find(cuda, 0)


def test_importing_needs_nothing() -> None:
    """No GPU, no driver, no PyCUDA; so what is missing can be told."""
    program = "import sys; sys.modules['pycuda'] = None; import llmc._cuda, llmc._cuda.found"
    subprocess.run([sys.executable, "-c", program], cwd=TESTS, check=True, timeout=120)


LOAD = "attempt(ops.load, 'cuda')"
MISSING = [
    ("", {"SIMULATION_DRIVER": "12040"}, "DeviceError: the NVIDIA driver is too old: it runs CUDA 12.4, and what "
     "NVRTC 13.0 compiles needs CUDA 13.0, which is driver 580 or newer"),
    ("", {"SIMULATION_DEVICES": "0"}, "DeviceError: there is no GPU to use: "),
    ("os.environ['CUDA_VISIBLE_DEVICES'] = ''", {"SIMULATION_DEVICES": "0"},
     "DeviceError: there is no GPU to use: CUDA_VISIBLE_DEVICES is ''"),
    ("attempt(ops.load, 'cuda:3')", {}, "DeviceError: there is no cuda:3: cuda:0 is the only GPU"),
    ("attempt(ops.load, 'cuda:2')", {"SIMULATION_DEVICES": "2"},
     "DeviceError: there is no cuda:2: the GPUs are cuda:0 to cuda:1"),
    ("", {"SIMULATION_CAPABILITY": "7.0", "SIMULATION_NAME": "Tesla V100"},
     "DeviceError: cuda:0 (Tesla V100) is of compute capability 7.0; llmc needs 7.5 or newer"),
    ("attempt(ops.load, 'cuda', dtype='bf16')", {"SIMULATION_CAPABILITY": "7.5", "SIMULATION_NAME": "Tesla T4"},
     "ConfigError: dtype: 'bf16' needs a GPU of compute capability 8.0, and cuda:0 (Tesla T4) is of 7.5: take fp32"),
    ("attempt(ops.load, 'cuda', dtype='tf32')", {"SIMULATION_CAPABILITY": "7.5"},
     "ConfigError: dtype: 'tf32' needs a GPU of compute capability 8.0"),
    ("", {"SIMULATION_CAPABILITY": "99.0"}, "DeviceError: NVRTC 13.0 cannot compile for sm_990: "),
    ("driver.libraries = lambda *names: iter(()); compiler._nvcc_paths = list", {},
     "DeviceError: there is no compiler for CUDA, neither NVRTC nor nvcc: pip install nvidia-cuda-nvrtc"),
    ("libraries = driver.libraries\n"
     "driver.libraries = lambda name, package: iter(()) if name == 'cublasLt' else libraries(name, package)", {},
     "DeviceError: libcublasLt was not found: pip install nvidia-cublas; or multiply without it: --gemm own"),
    ("import importlib.util; importlib.util.find_spec = lambda name: None", {},
     "MissingDependencyError: the device cuda needs PyCUDA: pip install pycuda nvidia-cuda-nvrtc nvidia-cublas"),
    ("sys.modules['pycuda._driver'] = None", {}, "MissingDependencyError: PyCUDA needs pycuda._driver: "),
    ("attempt(ops.load, 'cuda'); os.environ['SIMULATION_FAULT'] = 'cuInit:803:2'", {"SIMULATION_FAULT": "cuInit:803:1"},
     "DeviceError: the NVIDIA driver cannot be initialised: cuInit failed: system has unsupported display driver"),
    ("attempt(ops.load, 'cuda'); os.environ['SIMULATION_FAULT'] = 'cuDevicePrimaryCtxRetain:46:2'",
     {"SIMULATION_FAULT": "cuDevicePrimaryCtxRetain:46:1"}, "DeviceError: cuda:0 (Simulated GPU) cannot be used, "
     "another program may hold it: cuDevicePrimaryCtxRetain failed: CUDA-capable device(s) is/are busy or unavailable"),
    ("attempt(ops.load, 'cuda'); os.environ['SIMULATION_FAULT'] = 'cuStreamCreate:999:2'",
     {"SIMULATION_FAULT": "cuStreamCreate:999:1"}, "DeviceError: cuda:0 (Simulated GPU) cannot be used, another "
     "program may hold it: cuStreamCreate failed: unknown error"),
    ("", {"SIMULATION_MEMORY": "1000"}, "DeviceMemoryError: cuda:0 (Simulated GPU) has no memory left to begin with: "),
]  # fmt: skip


@pytest.mark.parametrize("program, environment, message", MISSING, ids=[row[2][:60] for row in MISSING])
def test_what_is_missing_is_told(
    child: Callable[..., list[str]], program: str, environment: dict[str, str], message: str
) -> None:
    """One line, and nothing else on any stream; the second attempt fails as the first."""
    load = program if "ops.load" in program else f"{program}\n{LOAD}"
    lines = child(f"{load}\n{load.splitlines()[-1]}\nprint(device.is_open())", **environment)
    assert len(lines) == 3 and lines[0] == lines[1] and lines[2] == "False"
    assert lines[0].startswith(message)


def test_without_the_library_our_own_multiplies(child: Callable[..., list[str]]) -> None:
    program = """
libraries = driver.libraries
driver.libraries = lambda name, package: iter(()) if name == 'cublasLt' else libraries(name, package)
attempt(ops.load, 'cuda')
print(ops.load('cuda', gemm='own').info()['gemm'])
"""
    assert child(program)[1] == "own"


def test_no_driver(child: Callable[..., list[str]]) -> None:
    program = PRELUDE.replace("import simulation\nsimulation.load()\n", "")
    lines = child("import ctypes\n" + LOAD, prelude=program, LLMC_CUDA_LIBRARIES="", LD_LIBRARY_PATH="")
    if not lines:
        pytest.skip("this machine has a driver")
    assert lines[0].startswith("DeviceError: the NVIDIA driver is not installed, libcuda.so.1 was not found: ")


def test_fp32_on_what_has_no_bf16(child: Callable[..., list[str]]) -> None:
    program = """
cuda = ops.load("cuda")
x = cuda.empty((3,), "float32")
cuda.gelu_forward(x, x)
print(cuda.info()["capability"], np.asarray(x).tolist())
"""
    assert child(program, SIMULATION_CAPABILITY="7.5") == ["7.5 [0.0, 0.0, 0.0]"]


def test_older_architectures_of_a_newer_compiler(child: Callable[..., list[str]]) -> None:
    """What the compiler does not know yet runs the code of its predecessor."""
    program = "ops.load('cuda'); print(*map(compiler.architecture, [(8, 9), (9, 7), (8, 1)]))"
    assert child(program) == ["sm_89 sm_90 sm_80"]


@pytest.fixture
def faulty(child: Callable[..., list[str]], tmp_path: Path) -> Callable[..., list[str]]:
    """Programs with an op `poke(x, at)` that writes far outside of x where the number in `at` is large."""
    folder = tmp_path / "llmc" / "_cuda"
    folder.mkdir(parents=True)
    (folder / "own.cu").write_text(
        'extern "C" __global__ void poke(int *x, const int *at) { x[at[0]] = 1; }\n'
        'extern "C" __global__ void bad(int *x) { }\n'
    )
    prelude = f"""
from pathlib import Path
compiler.FOLDER = Path({str(folder)!r})
cuda = ops.load("cuda")
kernel = Kernel("own", "poke", "PP")
@device.op
def poke(x, at):
    kernel(1, 1, x, at)
@device.op
def harmless(x):
    x[...] = 0
x, at = cuda.empty((4,), "int32"), cuda.empty((1,), "int32")
FAR = 1 << 28
"""
    return lambda program, **environment: child(
        program, prelude=PRELUDE + prelude, LLMC_CUDA_CACHE=str(tmp_path / "cache"), **environment
    )


ILLEGAL = "an illegal memory access was encountered"


def test_a_fault_is_found_late(faulty: Callable[..., list[str]]) -> None:
    """By whatever asks next, which says where to look; from then on every call says what has happened."""
    lines = faulty("""
harmless(x)
poke(x, at)
print(np.asarray(x).tolist())
at[...] = FAR
attempt(poke, x, at)
attempt(np.asarray, x)
attempt(np.asarray, x)
attempt(cuda.empty, (1,), "float32")
attempt(harmless, x)
attempt(ops.load, "cuda")
""")
    assert lines[0] == "[1, 0, 0, 0]"
    first = lines[1]
    begin = "DeviceError: reading an array: the GPU has failed, here or in an op before it (the last were "
    assert first.startswith(begin) and "poke, reading an array)" in first and ILLEGAL in first
    assert first.endswith("with LLMC_CUDA_CHECK=1 the message names the op")
    after = "the GPU is out of this process's reach since this error: " + first.removeprefix("DeviceError: ")
    assert lines[2:] == [f"DeviceError: {after}"] * 4


def test_a_fault_is_named(faulty: Callable[..., list[str]]) -> None:
    lines = faulty("""
at[...] = FAR
attempt(harmless, x)
attempt(poke, x, at)
""", LLMC_CUDA_CHECK="1")
    assert lines == [f"DeviceError: poke: the GPU has failed: cuStreamSynchronize failed: {ILLEGAL}"]


def test_a_fault_in_a_recordings_first_run_is_named(faulty: Callable[..., list[str]]) -> None:
    lines = faulty("""
def step():
    harmless(x)
    poke(x, at)
    harmless(x)
at[...] = FAR
attempt(cuda.record(step))
""")
    assert lines == [f"DeviceError: poke: the GPU has failed: cuStreamSynchronize failed: {ILLEGAL}"]


def test_a_fault_in_a_replay(faulty: Callable[..., list[str]]) -> None:
    """Says which recording was among the last, and how to find the op."""
    program = """
def step():
    harmless(x.view("float32"))
    poke(x, at)
again = cuda.record(step)
for _ in range(3):
    again()
get = cuda.fetch(x)
print(get().tolist())
at[...] = FAR
attempt(again)
attempt(lambda: cuda.fetch(x)())
"""
    lines = faulty(program)
    assert lines[0] == "[1, 0, 0, 0]" and len(lines) == 2
    assert "recording of step" in lines[1] and ILLEGAL in lines[1] and "LLMC_CUDA_CHECK=1" in lines[1]
    named = faulty(program, LLMC_CUDA_CHECK="1")
    assert named[1].startswith("DeviceError: poke: the GPU has failed: ")


def test_closing_and_opening_again(faulty: Callable[..., list[str]]) -> None:
    """Old arrays are refused, what was fetched before can be looked at no more, new ones work."""
    lines = faulty("""
get = cuda.fetch(x)
again = cuda.record(lambda: harmless(x.view("float32")))
again(); again(); again()
device.close()
device.close()
attempt(get)
cuda = ops.load("cuda")
from llmc._cuda import check
attempt(check.vector, "x", x, np.int32)
attempt(get)
attempt(again)
y, at = cuda.empty((4,), "int32"), cuda.empty((1,), "int32")
poke(y, at)
print(np.asarray(y).tolist())
""")
    assert lines == [
        "DeviceError: no GPU is set up: llmc.ops.load(\"cuda\") does that",
        "DeviceError: x: lies on a GPU that has been closed since",
        "DeviceError: fetch: the GPU has been closed since",
        "DeviceError: the recording of <lambda> was made on a GPU that has been closed since",
        "[1, 0, 0, 0]",
    ]


def test_an_error_of_a_call_costs_nothing(faulty: Callable[..., list[str]]) -> None:
    """What the driver refuses names the op, and the GPU goes on."""
    lines = faulty("""
many = device.op(lambda: kernel(1, 4096, x, at), "many")
attempt(many)
poke(x, at)
print(np.asarray(x).tolist())
""")
    assert lines[0].startswith("DeviceError: many: cuLaunchKernel failed: ")
    assert lines[1] == "[1, 0, 0, 0]"


def test_a_fault_on_another_thread(faulty: Callable[..., list[str]]) -> None:
    """The process goes on, without its GPU, and ends in peace."""
    lines = faulty("""
import threading
at[...] = FAR
def work():
    attempt(poke, x, at)
    attempt(np.asarray, x)
thread = threading.Thread(target=work)
thread.start(); thread.join()
attempt(np.asarray, x)
""")
    assert lines[0].startswith("DeviceError: reading an array: the GPU has failed, here or in an op before it")
    assert lines[1].startswith("DeviceError: the GPU is out of this process's reach since this error: ")


def test_configured_on_another_thread(faulty: Callable[..., list[str]]) -> None:
    """PyCUDA would end a process whose thread ends with a context."""
    program = """
import threading
def work():
    global cuda, x, at
    cuda = ops.load("cuda")
    x, at = cuda.empty((4,), "int32"), cuda.empty((1,), "int32")
    poke(x, at)
thread = threading.Thread(target=work)
thread.start(); thread.join()
poke(x, at)
again = cuda.record(lambda: poke(x, at))
again(); again(); again()
print(np.asarray(x).tolist(), cuda.fetch(x)().tolist())
del x, at, again
print(cuda.memory()[0] > 0)
"""
    assert faulty("device.close()\n" + program) == ["[1, 0, 0, 0] [1, 0, 0, 0]", "True"]
