"""The simulated GPU notices what a real one would not forgive, or would only sometimes: bugs are planted, and found.

Whether correct kernels run correctly on it is what all other tests of the `ops` fixture show.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_size_t, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import on_device
import pytest
import simulation
from simulation.run import KernelError, Source

TESTS = Path(__file__).parent

SUM = """
// out[block] = the sum of the block's 128 numbers
extern "C" __global__ void __launch_bounds__(128) sum(float *out, const float *x) {
    __shared__ float parts[4];
    float v = x[blockIdx.x * 128 + threadIdx.x];
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    BARRIER
    if (threadIdx.x == LAST) out[blockIdx.x] = parts[0] + parts[1] + parts[2] + parts[3];
}
"""


@pytest.fixture(autouse=True)
def simulated() -> Iterator[ctypes.CDLL]:
    if on_device.require() != "simulation":
        pytest.skip("a real GPU is in use")
    library = simulation.load()
    library.simulation_forgive()
    yield library
    library.simulation_forgive()


def source(body: str, parameters: str = "float *out, const float *x", **options: Any) -> Source:
    return Source(f'extern "C" __global__ void kernel({parameters}) {{\n{body}\n}}', **options)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def fails(
    kernel: Source, grid: Any, block: Any, *arguments: Any, message: str, name: str = "kernel", shared: int = 0
) -> None:
    with pytest.raises(KernelError, match=message):
        kernel.launch(name, grid, block, *arguments, shared=shared)


# ---- threads and warps -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_indices(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Each thread of each block once, in three dimensions."""
    monkeypatch.setenv("SIMULATION_ORDER", order)
    kernel = source(
        """
        int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        atomicAdd(&counts[block * 24 + thread], 1);
        """,
        "int *counts",
    )
    counts = np.zeros((24, 24), np.int32)
    kernel.launch("kernel", (2, 3, 4), (4, 3, 2), counts)
    assert (counts == 1).all()


@pytest.mark.parametrize("order, right", [
    ("forward", [0, 1, 2, 3, 4]), ("reverse", [4, 3, 2, 1, 0]), ("shuffle", None),
])
def test_order_of_blocks(monkeypatch: pytest.MonkeyPatch, order: str, right: list[int] | None) -> None:
    """A kernel that relies on one block's coming before another is found out."""
    monkeypatch.setenv("SIMULATION_ORDER", order)
    kernel = source("out[atomicAdd(&out[5], 1)] = blockIdx.x;", "int *out")
    seen = set()
    for seed in range(6):
        monkeypatch.setenv("SIMULATION_SEED", str(seed))
        out = np.zeros(6, np.int32)
        kernel.launch("kernel", 5, 1, out)
        assert sorted(out[:5]) == [0, 1, 2, 3, 4]
        seen.add(tuple(map(int, out[:5])))
    assert len(seen) > 1 if right is None else seen == {tuple(right)}


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_shuffles(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Every shuffle and vote, whole warps and parts of them, against what the CUDA guide says."""
    monkeypatch.setenv("SIMULATION_ORDER", order)
    kernel = source(
        """
        int lane = threadIdx.x, at = 0;
        out[32 * at++ + lane] = __shfl_sync(~0u, lane, 5);
        out[32 * at++ + lane] = __shfl_sync(~0u, lane, 3, 8);
        out[32 * at++ + lane] = __shfl_xor_sync(~0u, lane, 9);
        out[32 * at++ + lane] = __shfl_up_sync(~0u, lane, 3);
        out[32 * at++ + lane] = __shfl_down_sync(~0u, lane, 3, 16);
        out[32 * at++ + lane] = __ballot_sync(~0u, lane % 3 == 0);
        out[32 * at++ + lane] = __any_sync(~0u, lane == 31) + 2 * __all_sync(~0u, lane == 31);
        out[32 * at++ + lane] = __reduce_max_sync(~0u, lane ^ 13);
        out[32 * at++ + lane] = __syncthreads_count(lane < 7);
        if (lane < 8) out[32 * at + lane] = __shfl_xor_sync(0xff, lane, 1);
        else out[32 * at + lane] = __reduce_add_sync(0xffffff00, lane);
        """,
        "int *out",
    )
    out = np.zeros((10, 32), np.int32)
    kernel.launch("kernel", 1, 32, out)
    lane = np.arange(32)
    every_third = sum(1 << i for i in range(0, 32, 3))
    expected = [
        np.full(32, 5), lane // 8 * 8 + 3, lane ^ 9, np.where(lane < 3, lane, lane - 3),
        np.where(lane % 16 > 12, lane, lane + 3), np.full(32, every_third), np.ones(32), np.full(32, max(lane ^ 13)),
        np.full(32, 7), np.where(lane < 8, lane ^ 1, lane[8:].sum()),
    ]  # fmt: skip
    for found, right in zip(out, expected, strict=True):
        assert (found == right).all()


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_block_sum(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setenv("SIMULATION_ORDER", order)
    x, out = floats(7, 128), np.zeros(7, np.float32)
    Source(SUM.replace("BARRIER", "__syncthreads();").replace("LAST", "0")).launch("sum", 7, 128, out, x)
    assert np.abs(out - x.sum(axis=1, dtype=np.float64)).max() < 1e-5


def test_missing_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goes unnoticed while the thread that reads happens to be the last; in another order it reads NaN."""
    x = floats(3, 128)
    right = x.sum(axis=1, dtype=np.float64)
    for last, order in (("126", "forward"), ("0", "reverse")):
        kernel = Source(SUM.replace("BARRIER", "").replace("LAST", last))
        for run in ("forward", "reverse"):
            monkeypatch.setenv("SIMULATION_ORDER", run)
            out = np.zeros(3, np.float32)
            kernel.launch("sum", 3, 128, out, x)
            if run == order:
                assert np.abs(out - right).max() < 1e-5
            else:
                assert np.isnan(out).all()


def test_missing_barrier_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATION_ORDER", "shuffle")
    x, kernel = floats(1, 128), Source(SUM.replace("BARRIER", "").replace("LAST", "70"))
    seen = set()
    for seed in range(20):
        monkeypatch.setenv("SIMULATION_SEED", str(seed))
        out = np.zeros(1, np.float32)
        kernel.launch("sum", 1, 128, out, x)
        seen.add(bool(np.isnan(out[0])))
    assert True in seen


@pytest.mark.parametrize("body, block, message", [
    ("if (threadIdx.x < 40) return;\n__syncthreads();", 64,
     r"kernel: block \(0, 0, 0\), thread \(40, 0, 0\): waits at __syncthreads, test.cu:3, for thread \(0, 0, 0\), "
     "which has returned"),
    ("if (threadIdx.x < 32)\n__syncthreads();\nelse\n__syncthreads();", 64,
     r"thread \(32, 0, 0\): is at __syncthreads, test.cu:5, while others wait at test.cu:3"),
    ("if (threadIdx.x < 32) __syncthreads();\nelse __shfl_xor_sync(~0u, 1, threadIdx.x == 40 ? 1 : 2);", 64,
     r"waits at __syncthreads, test.cu:2, for thread \(32, 0, 0\), which has returned"),
    ("if (threadIdx.x != 9) __shfl_xor_sync(~0u, 1, 1);\n", 32,
     r"waits at __shfl_xor_sync, test.cu:2, for thread \(9, 0, 0\), which has returned"),
    ("if (threadIdx.x < 9) __shfl_xor_sync(~0u, 1, 1);\nelse __shfl_xor_sync(~0u, 2, 1);", 32,
     r"thread \(9, 0, 0\): is at __shfl_xor_sync, test.cu:3, while other lanes of its warp wait at line 2"),
    ("if (threadIdx.x < 9) __shfl_sync(0xff, 1, 0);", 32,
     r"thread \(8, 0, 0\): is not in the mask of its own __shfl_sync, test.cu:2"),
    ("if (threadIdx.x < 16) __shfl_xor_sync(0xffff, 1, 16);", 32,
     "reads a lane that is not in the shuffle's mask, test.cu:2"),
    ("__shfl_xor_sync(~0u, 1, 1);", 48,
     r"thread \(32, 0, 0\): names lanes in __shfl_xor_sync, test.cu:2, that the block does not have"),
    ("if (threadIdx.x == 5) __trap();", 32, r"thread \(5, 0, 0\): __trap, test.cu:2"),
])  # fmt: skip
def test_divergence(body: str, block: int, message: str) -> None:
    """Threads that do not all come to where they meet: who waits, where, and for whom."""
    fails(source(body), 2, block, floats(64), floats(64), message=message)


def test_unwritten_shared_memory() -> None:
    """It holds NaN at the start of every block, not what the block before has left."""
    kernel = source(
        "SHARED(float, mine);\n__shared__ float fixed[32];\nint i = threadIdx.x;\n"
        "out[blockIdx.x * 64 + i] = mine[i];\nout[blockIdx.x * 64 + 32 + i] = fixed[i];\n__syncthreads();\n"
        "mine[i] = fixed[i] = 1;"
    )
    out = np.zeros((3, 64), np.float32)
    for _ in range(2):
        kernel.launch("kernel", 3, 32, out, None, shared=128)
        assert np.isnan(out).all()


def test_smaller_and_larger() -> None:
    """Of mixed types as in C, and of two floating numbers the one that is no NaN."""
    kernel = source(
        "float nan = x[0];\nout[0] = min(nan, 2.0f);\nout[1] = max(3.0f, nan);\nout[2] = min(4, 5.5f);\n"
        "out[3] = max(-1, 1u) == 0xffffffff;\nout[4] = min(7, 6);"
    )
    out = np.zeros(5, np.float32)
    kernel.launch("kernel", 1, 1, out, np.full(1, np.nan, np.float32))
    assert out.tolist() == [2, 3, 4, 1, 6]


def test_unwritten_variables() -> None:
    """A local variable that is read before it is written holds nothing sensible."""
    kernel = source("float v[2];\nv[threadIdx.x] = 1;\nout[threadIdx.x] = v[0] + v[1];")
    out = np.zeros(2, np.float32)
    kernel.launch("kernel", 1, 2, out, None)
    assert (np.abs(out) > 1e30).all()


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    # of CUDA's table of errors: units in the last place
    "expf": (np.exp, 2), "exp2f": (np.exp2, 2), "logf": (lambda x: np.log(np.abs(x)), 1), "tanhf": (np.tanh, 2),
    "rsqrtf": (lambda x: 1 / np.sqrt(np.abs(x)), 2), "cospif": (lambda x: np.cos(np.pi * x), 1),
    "__expf": (np.exp, 2 + 1.173 * 6), "sqrtf": (lambda x: np.sqrt(np.abs(x)), 0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_as_wrong_as_they_may_be(name: str) -> None:
    """Within CUDA's documented errors, and not much better; what can be exact is."""
    exact, units = FUNCTIONS[name]
    argument = "fabsf(x[i])" if name in ("logf", "rsqrtf", "sqrtf") else "x[i]"
    kernel = source(f"int i = blockIdx.x * 32 + threadIdx.x;\nout[i] = {name}({argument});")
    x = np.random.default_rng(3).uniform(-6, 6, 4096).astype(np.float32)
    out = np.empty_like(x)
    kernel.launch("kernel", 128, 32, out, x)
    right = exact(x.astype(np.float64))
    off = np.abs(out - right) / np.spacing(np.abs(right).astype(np.float32)).astype(np.float64)
    assert off.max() <= units + 0.5
    assert off.max() > 0.8 * units
    out[...] = x[...] = 1.0
    if name in ("logf", "rsqrtf", "cospif", "sqrtf"):
        kernel.launch("kernel", 128, 32, out, x)
        assert (out == np.float32(exact(1.0))).all()


# ---- memory ----------------------------------------------------------------------------------------


def device_floats(driver: ctypes.CDLL, n: int) -> c_ulonglong:
    pointer = c_ulonglong()
    assert driver.cuMemAlloc_v2(byref(pointer), c_size_t(4 * n)) == 0
    return pointer


@pytest.mark.parametrize("place, index", [("end", 1000), ("start", -1)])
@pytest.mark.parametrize("how", ["write", "read"])
def test_out_of_bounds(
    simulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, place: str, index: int, how: str
) -> None:
    """One element outside an allocation is a fault that stays; the last and first inside are none."""
    monkeypatch.setenv("SIMULATION_PLACE", place)
    body = f"out[at + (threadIdx.x == 3) * {0 if index < 0 else 1}] = 1;"
    if how == "read":
        body = f"volatile float v = out[at + (threadIdx.x == 3) * {0 if index < 0 else 1}];"
    kernel = source(body, "float *out, int at")
    memory = device_floats(simulated, 1000)
    at = index if index < 0 else index - 1
    for inside in (0, 998):
        kernel.launch("kernel", 1, 32, memory, inside)
    message = rf"700: kernel: block \(0, 0, 0\), thread \(\d, 0, 0\): illegal {how} of address"
    fails(kernel, 1, 32, memory, at, message=message)


def test_a_fault_stays(simulated: ctypes.CDLL, capfd: pytest.CaptureFixture[str]) -> None:
    """Every call that needs the context returns it from then on, and one line says what happened."""
    kernel = source("out[threadIdx.x] = 1;")
    function, none = c_void_p(), c_void_p()
    assert simulated.cuModuleGetFunction(byref(function), kernel._module, b"kernel") == 0
    parameters = (c_void_p * 2)(*(ctypes.cast(byref(none), c_void_p) for _ in range(2)))
    assert simulated.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, None, parameters, None) == 0
    pointer = c_ulonglong()
    assert simulated.cuMemAlloc_v2(byref(pointer), c_size_t(4)) == 700
    assert simulated.cuCtxSynchronize() == 700
    assert capfd.readouterr().err.count("kernel: block (0, 0, 0), thread (0, 0, 0): illegal write of address") == 1
    assert b"illegal write" in simulated.simulation_message()


def test_written_behind_the_end(simulated: ctypes.CDLL) -> None:
    """What lies between an allocation and its forbidden page is looked at when it is freed."""
    memory = device_floats(simulated, 3)  # 12 bytes of 16
    source("out[threadIdx.x] = 1;").launch("kernel", 1, 3, memory, None)
    assert simulated.cuMemFree_v2(memory) == 0
    memory = device_floats(simulated, 3)
    source("out[threadIdx.x] = 1;").launch("kernel", 1, 4, memory, None)
    assert simulated.cuMemFree_v2(memory) == 700
    assert b"past the end of an allocation of 12 bytes" in simulated.simulation_message()


def test_use_after_free(simulated: ctypes.CDLL) -> None:
    memory = device_floats(simulated, 1000)
    assert simulated.cuMemFree_v2(memory) == 0
    fails(source("out[threadIdx.x] = 1;"), 1, 32, memory, None, message="illegal write")


def test_fresh_memory_is_nan(simulated: ctypes.CDLL) -> None:
    memory, out = device_floats(simulated, 1000), np.zeros(1000, np.float32)
    assert simulated.cuMemcpyDtoH_v2(c_void_p(out.ctypes.data), memory, c_size_t(4000)) == 0
    assert np.isnan(out).all()
    assert simulated.cuMemcpyDtoH_v2(c_void_p(out.ctypes.data), memory, c_size_t(4001)) == 1


@pytest.mark.parametrize("body, message", [
    ("*reinterpret_cast<float4 *>(out + 1) = float4{};", "716: .*misaligned access"),
    ("out[0] = *reinterpret_cast<const double *>(x + 1);", "716: .*misaligned access"),
    ("int zero = out[0] * 0;\nout[0] = 7 / zero;", "719: .*integer division by zero"),
    ("volatile char large[300000];\nlarge[int(x[0])] = 1;\nout[0] = large[1];", "700: .*stack overflow"),
])
def test_other_faults(body: str, message: str) -> None:
    aligned = np.zeros(68, np.float32)
    start = -aligned.ctypes.data // 4 % 4
    memory = aligned[start : start + 64]
    fails(source(body), 1, 1, memory, memory, message=message)


def test_endless_kernel() -> None:
    """Waiting for another block, which may not have begun, ends with an error."""
    program = """
import numpy as np
from simulation.run import Source
kernel = Source('extern "C" __global__ void kernel(volatile int *x) { if (!blockIdx.x) while (!*x); else *x = 1; }')
kernel.launch("kernel", 2, 1, np.zeros(1, np.int32))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS, env={**os.environ, "SIMULATION_TIMEOUT": "1"}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "KernelError: 702: kernel: block (0, 0, 0), thread (0, 0, 0): runs for ever, or longer" in done.stderr


def test_dynamic_shared_memory_ends() -> None:
    kernel = source("SHARED(float, mine);\nmine[threadIdx.x] = 1;")
    kernel.launch("kernel", 1, 32, None, None, shared=128)
    fails(kernel, 1, 33, None, None, shared=128, message="illegal write")


COPY = """
#include "ptx.cuh"
extern "C" __global__ void kernel(float *out, const float *x) {
    __shared__ __align__(16) float tile[128];
    cp_async_16(tile + 4 * threadIdx.x, x + 4 * threadIdx.x);
    cp_async_commit();
    WAIT
    __syncthreads();
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = tile[127 - 4 * threadIdx.x - i];
}
"""


def test_missing_wait_for_a_copy() -> None:
    """cp.async has not arrived until it is waited for."""
    x = np.zeros(132, np.float32)
    x = x[-x.ctypes.data // 4 % 4 :][:128]
    x[...] = floats(128)
    for wait, right in (("cp_async_wait<0>();", True), ("", False), ("cp_async_wait<1>();", False)):
        out = np.zeros(128, np.float32)
        Source(COPY.replace("WAIT", wait)).launch("kernel", 1, 32, out, x)
        assert (out == x[::-1]).all() if right else np.isnan(out).all()


# ---- launches and the compiler ---------------------------------------------------------------------


def test_what_a_launch_may_not_be() -> None:
    kernel = Source(SUM.replace("BARRIER", "").replace("LAST", "0"))
    x = floats(2048)
    fails(kernel, 1, 256, x, x, name="sum", message="701: refused")  # more than its bounds
    plain = source("")
    for grid, block, shared in ((1, 1025, 0), ((1, 65536), 1, 0), (1, 0, 0), (0, 1, 0), (1, 1, 228 << 10)):
        fails(plain, grid, block, None, None, shared=shared, message="1: refused")
    plain.launch("kernel", (1, 65535), 1, None, None, shared=227 << 10)


def test_compile_errors() -> None:
    """In nvrtc's form, with the file that the line is in."""
    with pytest.raises(KernelError, match=r"test.cu\(3\): error: .*nowhere"):
        source("\nout[0] = nowhere;")
    with pytest.raises(KernelError, match="unrecognized option --no-such-option"):
        Source("", options=["--no-such-option"])


def test_macros_and_conditions_around_kernels() -> None:
    """Kernels are found after preprocessing: those of macros are, those that are switched off are not."""
    kernel = Source(
        """
        #define KERNEL(name, value) \\
            extern "C" __global__ void __launch_bounds__(value > 2 ? 64 : 32, 2) name(int *out) { *out = value; }
        KERNEL(two, 2)
        KERNEL(three, 3)
        #if STORAGE_BF16
        KERNEL(none, 4)
        #endif
        template <int n> __global__ void not_one(int *out) { *out = n; }
        """
    )
    out = np.zeros(1, np.int32)
    for name, value in (("two", 2), ("three", 3)):
        kernel.launch(name, 1, 32 * (value - 1), out)
        assert out[0] == value
        fails(kernel, 1, 96, out, name=name, message="701")
    for name in ("none", "not_one"):
        with pytest.raises(KernelError, match=f"no kernel {name}"):
            kernel.launch(name, 1, 1, out)


def test_arguments() -> None:
    """Each at the offset that its alignment asks for."""
    kernel = source(
        "out[0] = a;\nout[1] = b;\nout[2] = c;\nout[3] = d;\nout[4] = e;",
        "double *out, int a, double b, float c, long long d, unsigned char e",
    )
    out = np.zeros(5)
    kernel.launch("kernel", 1, 1, out, -3, ctypes.c_double(0.1), 0.5, ctypes.c_longlong(1 << 40), ctypes.c_ubyte(200))
    assert out.tolist() == [-3, 0.1, 0.5, 1 << 40, 200]


# ---- streams and capture ---------------------------------------------------------------------------


class Streams:
    """Two streams, pinned memory and an event of the driver, by ctypes."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver
        self.one, self.two, self.event, self.host = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        for stream in (self.one, self.two):
            assert driver.cuStreamCreate(byref(stream), 1) == 0
        assert driver.cuEventCreate(byref(self.event), 2) == 0
        assert driver.cuMemHostAlloc(byref(self.host), c_size_t(4000), 0) == 0
        self.values = np.ctypeslib.as_array(ctypes.cast(self.host, ctypes.POINTER(ctypes.c_float)), (1000,))
        self.memory = device_floats(driver, 1000)
        assert driver.cuMemsetD32_v2(self.memory, 0, c_size_t(1000)) == 0

    def send(self, stream: c_void_p) -> int:
        return int(self.driver.cuMemcpyHtoDAsync_v2(self.memory, self.host, c_size_t(4000), stream))

    def read(self) -> float:
        out = np.zeros(1000, np.float32)
        assert self.driver.cuMemcpyDtoH_v2(c_void_p(out.ctypes.data), self.memory, c_size_t(4000)) == 0
        return float(out[0])


@pytest.fixture
def streams(simulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    source("")  # there is a context then
    made = Streams(simulated)
    yield made
    monkeypatch.undo()
    for stream in (made.one, made.two):
        graph = c_void_p()
        simulated.cuStreamEndCapture(stream, byref(graph))
        simulated.cuStreamDestroy_v2(stream)
    simulated.cuMemFreeHost(made.host)
    simulated.cuMemFree_v2(made.memory)


def test_lazy_streams_show_a_missing_wait(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work runs when somebody waits for it: what is overwritten or read too early shows."""
    monkeypatch.setenv("SIMULATION_STREAMS", "lazy")
    driver = streams.driver
    streams.values[...] = 1
    assert streams.send(streams.one) == 0
    streams.values[...] = 2  # too early: not waited
    assert streams.read() == 0.0  # nor here
    assert driver.cuStreamSynchronize(streams.one) == 0
    assert streams.read() == 2.0
    # another stream that waits for an event takes along what lies before it, and no more
    streams.values[...] = 3
    assert streams.send(streams.one) == 0
    assert driver.cuEventRecord(streams.event, streams.one) == 0
    assert driver.cuMemsetD32Async(streams.memory, 0, c_size_t(1000), streams.one) == 0
    assert driver.cuEventQuery(streams.event) == 600
    assert driver.cuStreamSynchronize(streams.two) == 0
    assert driver.cuStreamWaitEvent(streams.two, streams.event, 0) == 0
    assert driver.cuStreamSynchronize(streams.two) == 0
    assert streams.read() == 3.0
    assert driver.cuCtxSynchronize() == 0
    assert streams.read() == 0.0


def test_capture_and_replay(streams: Streams) -> None:
    """Nothing runs in a capture; a replay reads what is there by then."""
    driver, graph, executable = streams.driver, c_void_p(), c_void_p()
    kernel = source("out[threadIdx.x] += 1;")
    function = c_void_p()
    assert driver.cuModuleGetFunction(byref(function), kernel._module, b"kernel") == 0
    packed = (c_ulonglong * 2)(streams.memory.value, 0)
    size = c_size_t(16)
    extra = (c_void_p * 5)(1, ctypes.addressof(packed), 2, ctypes.addressof(size), None)
    assert driver.cuStreamBeginCapture_v2(streams.one, 0) == 0
    assert streams.send(streams.one) == 0
    assert driver.cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, streams.one, None, extra) == 0
    packed[0] = 0  # the launch has its own copy
    assert driver.cuStreamEndCapture(streams.one, byref(graph)) == 0
    count = c_size_t()
    assert driver.cuGraphGetNodes(graph, None, byref(count)) == 0 and count.value == 2
    assert driver.cuGraphInstantiateWithFlags(byref(executable), graph, c_ulonglong(0)) == 0
    assert driver.cuGraphDestroy(graph) == 0
    assert streams.read() == 0.0
    for value in (5.0, 7.0):
        streams.values[...] = value
        assert driver.cuGraphLaunch(executable, streams.one) == 0
        assert driver.cuStreamSynchronize(streams.one) == 0
        assert streams.read() == value + 1
    assert driver.cuGraphExecDestroy(executable) == 0


ILLEGAL: dict[str, tuple[Callable[[Streams], int], int]] = {
    "allocate": (lambda s: s.driver.cuMemAlloc_v2(byref(c_ulonglong()), c_size_t(64)), 900),
    "free": (lambda s: s.driver.cuMemFree_v2(s.memory), 900),
    "pinned memory": (lambda s: s.driver.cuMemHostAlloc(byref(c_void_p()), c_size_t(64), 0), 900),
    "synchronise the stream": (lambda s: s.driver.cuStreamSynchronize(s.one), 900),
    "ask the stream": (lambda s: s.driver.cuStreamQuery(s.one), 900),
    "synchronise all": (lambda s: s.driver.cuCtxSynchronize(), 900),
    "copy and wait": (lambda s: s.driver.cuMemcpyDtoH_v2(s.host, s.memory, c_size_t(4)), 900),
    "from pageable memory": (
        lambda s: s.driver.cuMemcpyHtoDAsync_v2(s.memory, c_void_p(np.zeros(4).ctypes.data), c_size_t(4), s.one), 900,
    ),
    "wait for what was not captured": (lambda s: s.driver.cuStreamWaitEvent(s.one, s.event, 0), 905),
    "load a module": (lambda s: s.driver.cuModuleLoadData(byref(c_void_p()), source_image()), 900),
}  # fmt: skip


def source_image() -> bytes:
    return simulation.run.compile('extern "C" __global__ void kernel(float *out, const float *x) {\n\n}')


@pytest.mark.parametrize("what", ILLEGAL)
def test_illegal_in_a_capture(streams: Streams, what: str) -> None:
    """Refused with the error that CUDA gives, and the capture is lost; the stream is usable afterwards."""
    call, status = ILLEGAL[what]
    driver, graph = streams.driver, c_void_p()
    assert driver.cuStreamBeginCapture_v2(streams.one, 1) == 0
    assert call(streams) == status
    assert streams.send(streams.one) == 901
    assert driver.cuStreamEndCapture(streams.one, byref(graph)) == 901
    assert not graph.value
    streams.values[...] = 4
    assert streams.send(streams.one) == 0 and driver.cuStreamSynchronize(streams.one) == 0
    assert streams.read() == 4.0


def test_event_of_a_capture(streams: Streams) -> None:
    driver, graph = streams.driver, c_void_p()
    assert driver.cuStreamBeginCapture_v2(streams.one, 1) == 0
    assert driver.cuEventRecord(streams.event, streams.one) == 0
    assert driver.cuEventSynchronize(streams.event) == 907
    assert driver.cuStreamEndCapture(streams.one, byref(graph)) == 901


@pytest.mark.parametrize("joined", [True, False])
def test_fork_in_a_capture(streams: Streams, joined: bool) -> None:
    """A stream that waits for the capturing one is captured too, and must be waited for before the end."""
    driver, graph, back = streams.driver, c_void_p(), c_void_p()
    assert driver.cuEventCreate(byref(back), 2) == 0
    assert driver.cuStreamBeginCapture_v2(streams.one, 1) == 0
    assert driver.cuEventRecord(streams.event, streams.one) == 0
    assert driver.cuStreamWaitEvent(streams.two, streams.event, 0) == 0
    assert streams.send(streams.two) == 0
    status = c_int()
    assert driver.cuStreamIsCapturing(streams.two, byref(status)) == 0 and status.value == 1
    assert driver.cuEventRecord(back, streams.two) == 0
    if joined:
        assert driver.cuStreamWaitEvent(streams.one, back, 0) == 0
    assert driver.cuStreamEndCapture(streams.one, byref(graph)) == (0 if joined else 904)
    assert driver.cuStreamIsCapturing(streams.two, byref(status)) == 0 and status.value == 0
    assert driver.cuEventDestroy_v2(back) == 0


def test_injected_fault(simulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Nth call of a function, or launch of a kernel, fails as it was told to."""
    kernel, pointer = source("out[0] = 1;"), c_ulonglong()
    monkeypatch.setenv("SIMULATION_FAULT", "cuMemAlloc:2:2,kernel:719:3")
    statuses = []
    for _ in range(3):
        statuses.append(simulated.cuMemAlloc_v2(byref(pointer), c_size_t(64)))
        if not statuses[-1]:
            simulated.cuMemFree_v2(pointer)
    assert statuses == [0, 2, 0]
    out = floats(4)
    for _ in range(2):
        kernel.launch("kernel", 1, 1, out, out)
    fails(kernel, 1, 1, out, out, message="719: kernel: fault by SIMULATION_FAULT")


# ---- under AddressSanitizer ------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("body, report", [
    ("float v = __shfl_xor_sync(~0u, x[threadIdx.x], 1);\n__syncthreads();\nout[threadIdx.x] = v;", ""),
    ("__shared__ float mine[32];\nfloat *p = mine + (threadIdx.x == 31);\np[threadIdx.x] = 1;\nout[0] = mine[5];",
     r"global-buffer-overflow.*#0 .* in kernel \S*test.cu:4"),
    ("float mine[4];\nfor (int i = 0; i < 4 + (threadIdx.x == 3); i++) mine[i] = x[i];\nout[0] = mine[out[1] > 0];",
     r"index 4 out of bounds|stack-buffer-overflow"),
    ("int large = 0x7fffffff;\nout[0] = large + int(x[0] * 0 + threadIdx.x);", "signed integer overflow"),
    ("out[threadIdx.x - 1000] = 1;", r"SEGV.*#0 .* in kernel \S*test.cu:2"),
])  # fmt: skip
def test_sanitized(tmp_path: Path, body: str, report: str) -> None:
    """In a process of its own, kernels run under AddressSanitizer and UBSan, which name the line."""
    program = f"""
import numpy as np
from simulation.run import Source
from guard import flush
kernel = Source('extern "C" __global__ void kernel(float *out, const float *x) {{\\n' + {body!r} + '\\n}}')
x = flush(np.ones(32, np.float32), "start")
kernel.launch("kernel", 1, 32, x, x)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS, env={**os.environ, **simulation.sanitized()},
        capture_output=True, text=True,
    )  # fmt: skip
    if report:
        assert done.returncode and re.search(report, done.stderr, re.S), done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
