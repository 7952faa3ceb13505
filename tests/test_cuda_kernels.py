"""From a `.cu` file to launches: the compiler and its cache, arguments, recordings, threads.

The kernels here are written to a folder of their own and compiled as the package's are.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_cuda_device import LARGE, SLACK, filled, free, streams  # noqa: F401 - a fixture

from llmc import ops as contract
from llmc._cuda import check, compiler, device, driver, gpu
from llmc._cuda.compiler import Kernel
from llmc.errors import DeviceError, DeviceMemoryError

# ---- kernels ---------------------------------------------------------------------------------------

SOURCE = """#include "own.cuh"
extern "C" __global__ void add(floatX *out, const floatX *x, const float *none, int n, float by, double twice,
                               long long k) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = x[i] + by + 2 * twice + k + (none ? 100 : 0);
}
extern "C" __global__ void where(int *out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)] = block;
}
extern "C" __global__ void storage(int *out) { out[0] = STORAGE_BF16; }
"""
HEADER = "#pragma once\ntypedef float floatX;\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Kernels of our own in place of the package's, and an empty cache."""
    monkeypatch.setattr(compiler, "FOLDER", tmp_path / "llmc" / "_cuda")
    monkeypatch.setenv("LLMC_CUDA_CACHE", str(tmp_path / "cache"))
    compiler.headers.cache_clear()
    compiler.FOLDER.mkdir(parents=True)
    (compiler.FOLDER / "own.cu").write_text(SOURCE)
    (compiler.FOLDER / "own.cuh").write_text(HEADER)
    kept = dict(device.handle().functions) if device.is_open() else {}
    yield compiler.FOLDER
    compiler.headers.cache_clear()
    if device.is_open():
        functions = device.handle().functions
        for key in set(functions) - set(kept):
            del functions[key]


def fresh() -> None:
    """Forget what was loaded of own.cu, as another process would not know of it."""
    functions = device.handle().functions
    for key in [key for key in functions if "own" in key]:
        del functions[key]


def test_arguments(cuda: ModuleType, folder: Path) -> None:
    out, x = cuda.empty((5,), "float32"), filled([1, 2, 3, 4, 5])
    add = Kernel("own", "add", "PPPifdq")
    add(1, 32, out, x, None, 5, 0.5, 0.25, 1 << 20)
    assert np.asarray(out).tolist() == [1 + 1 + (1 << 20) + i for i in range(5)]
    add((1,), (32,), out.ptr, x, x, np.int64(3), 0.0, 0.0, -100)
    assert np.asarray(out).tolist()[:4] == [1, 2, 3, 4 + 1 + (1 << 20)]
    out[...] = 0
    for grid in (0, (0,), (3, 0), (1, 1, 0)):
        add(grid, 32, out, x, None, 5, 0.0, 0.0, 0)
    assert not np.asarray(out).any()


def test_grid_and_block(cuda: ModuleType, folder: Path) -> None:
    out = cuda.empty((2 * 3 * 4, 2 * 3 * 5), "int32")
    Kernel("own", "where", "P")((2, 3, 4), (5, 3, 2), out)
    assert (np.asarray(out) == np.arange(24)[:, None]).all()


def test_storage(cuda: ModuleType, folder: Path) -> None:
    """The same kernel is another one for each storage type, however often that changes."""
    storage, out = Kernel("own", "storage", "P"), cuda.empty((1,), "int32")
    try:
        for dtype, bf16 in (("fp32", 0), ("bf16", 1), ("tf32", 0), ("bf16", 1)):
            contract.load("cuda", dtype=dtype)
            storage(1, 1, out)
            assert np.asarray(out).tolist() == [bf16]
    finally:
        contract.load("cuda", dtype="fp32")


def test_too_much_shared_memory(cuda: ModuleType, folder: Path) -> None:
    where, out = Kernel("own", "where", "P"), cuda.empty((32,), "int32")
    out[...] = -1
    where(1, 32, out, shared=device.shared_limit())
    assert not np.asarray(out).any()
    with pytest.raises(DeviceError, match=r"where needs [\d,]+ bytes of shared memory per block, and .* has"):
        where(1, 32, out, shared=device.shared_limit() + 1)


def test_no_such_kernel(cuda: ModuleType, folder: Path) -> None:
    with pytest.raises(DeviceError, match=r"llmc/_cuda/own\.cu has no kernel nothing"):
        Kernel("own", "nothing", "")(1, 1)


def test_compile_errors_name_file_and_line(cuda: ModuleType, folder: Path) -> None:
    good = SOURCE
    (folder / "own.cu").write_text(good.replace("int threads", "int threads = nonsense;\n    int threads2"))
    with pytest.raises(DeviceError, match=r"^llmc/_cuda/own\.cu:10: error: .*nonsense"):
        Kernel("own", "where", "P")(1, 1, cuda.empty((1,), "int32"))
    (folder / "own.cu").write_text(good)
    (folder / "own.cuh").write_text(HEADER + "\ninline int f() { return missing; }\n")
    compiler.headers.cache_clear()
    with pytest.raises(DeviceError, match=r"^llmc/_cuda/own\.cuh:4: error: .*missing"):
        Kernel("own", "where", "P")(1, 1, cuda.empty((1,), "int32"))
    assert list(compiler.cache_folder().glob("*")) == []


@pytest.mark.parametrize(
    "log, message",
    [
        ('a.cu(57): error: identifier "q" is undefined\n      q\n      ^\n', '57: error: identifier "q" is undefined'),
        ("a.cu(3): warning #1-D: old\na.cu(57): error #20-D: x\na.cu(9): error: y\n", "57: error: x (and 1 more)"),
        ("a.cu(57): catastrophic error: cannot open b.cuh\n", "57: error: cannot open b.cuh"),
        ("a.cu:57:9: error: no\n", "57: error: no"),
        ("a.cu:57:9: fatal error: b.cuh: No such file\n", "57: error: b.cuh: No such file"),
        ("ptxas fatal   : no\n  such thing", " NVRTC 1.0 cannot compile it: ptxas fatal : no such thing"),
        ("", " NVRTC 1.0 cannot compile it: it did not say why"),
    ],
)
def test_logs_of_compilers(log: str, message: str) -> None:
    """NVRTC's, nvcc's, a host compiler's."""
    log = log.replace("a.cu", "llmc/_cuda/a.cu")
    assert str(compiler.compile_error(log, "a", "NVRTC 1.0")) == f"llmc/_cuda/a.cu:{message}"


# ---- where NVIDIA's libraries are ------------------------------------------------------------------


def test_order_of_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen folder, pip's packages (those of CUDA 13 first), the loader's own, the toolkit; newer before older."""
    places = {
        "chosen": ["libnvrtc.so.9", "libnvrtc.so.13", "libnvrtc.so.13.0.8", "libnvrtc.alt.so.13", "libnvrtc-a.so.13"],
        "nvidia/cu13/lib": ["libnvrtc.so.13", "libcublasLt.so.13"],
        "nvidia/cuda_nvrtc/lib": ["libnvrtc.so.12"],
        "toolkit/lib64": ["libnvrtc.so.12", "libnvrtc.alt.so.12"],
    }
    for folder, names in places.items():
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / name).touch()
    monkeypatch.setenv("LLMC_CUDA_LIBRARIES", str(tmp_path / "chosen"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(driver, "wheel_roots", lambda: [tmp_path / "nvidia"])
    found = list(driver.libraries("nvrtc", "nvidia-cuda-nvrtc"))
    expected = [
        "chosen/libnvrtc.so.13.0.8", "chosen/libnvrtc.so.13", "chosen/libnvrtc.so.9", "nvidia/cu13/lib/libnvrtc.so.13",
        "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
    ]  # fmt: skip
    assert found[:5] == [str(tmp_path / path) for path in expected]
    assert found[5:8] == ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    assert found[8] == str(tmp_path / "toolkit/lib64/libnvrtc.so.12")
    with pytest.raises(DeviceError, match="libnothing was not found: pip install nvidia-nothing"):
        driver.library("nothing", "nvidia-nothing")


# ---- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are compiled from now on."""
    found: list[str] = []
    for kind in (compiler.NVRTC, compiler.NVCC):
        compile = kind.compile

        def noted(self: Any, file: str, *rest: Any, compile: Any = compile) -> Any:
            found.append(file)
            return compile(self, file, *rest)

        monkeypatch.setattr(kind, "compile", noted)
    return found


def add_one(cuda: ModuleType) -> list[float]:
    """What own.cu's kernel does, loaded anew."""
    fresh()
    out = cuda.empty((2,), "float32")
    Kernel("own", "add", "PPPifdq")(1, 32, out, filled([1, 2]), None, 2, 1.0, 0.0, 0)
    return np.asarray(out).tolist()


def test_cache(
    cuda: ModuleType, folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for the same source, headers, options, architecture and compiler."""
    assert add_one(cuda) == [2, 3] and add_one(cuda) == [2, 3]
    assert compiled == ["own"]
    (folder / "own.cu").write_text(SOURCE.replace("x[i] + by", "x[i] - by"))
    assert add_one(cuda) == [0, 1] and compiled == ["own"] * 2
    (folder / "own.cuh").write_text(HEADER + "// other\n")
    compiler.headers.cache_clear()
    assert add_one(cuda) == [0, 1] and compiled == ["own"] * 3
    compiler.cubin("own", "sm_80", False)
    compiler.cubin("own", "sm_90", False)
    compiler.cubin("own", "sm_90", True)
    assert len(compiled) >= 5
    count = len(compiled)
    compiler.cubin("own", "sm_80", False)
    compiler.cubin("own", "sm_90", True)
    assert len(compiled) == count
    monkeypatch.setattr(compiler.find(), "identity", "another compiler of the same version")
    compiler.cubin("own", "sm_80", False)
    assert len(compiled) == count + 1
    (folder / "own.cu").write_text(SOURCE)
    assert add_one(cuda) == [2, 3]


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_entry_is_compiled_again(
    cuda: ModuleType, folder: Path, compiled: list[str], damage: bytes | None
) -> None:
    add_one(cuda)
    (entry,) = compiler.cache_folder().glob("own-*")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if damage is None else damage)
    assert add_one(cuda) == [2, 3]
    assert compiled == ["own"] * 2
    assert entry.read_bytes() == whole and list(compiler.cache_folder().iterdir()) == [entry]


def test_a_cache_that_cannot_be_written(
    cuda: ModuleType, folder: Path, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMC_CUDA_CACHE", str(tmp_path / "file" / "cache"))
    assert add_one(cuda) == [2, 3] and add_one(cuda) == [2, 3]
    assert compiled == ["own"] * 2


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LLMC_CUDA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "llmc" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / ".cache" / "llmc" / "cuda"


def test_name_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's own number, where the system tells it: two forms of its file are in use."""
    for text, name in (
        ("NVRM: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19\nGCC 12.2.0\n", "535.129.03 (CUDA 12.2)"),
        ("NVRM: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release\n", "580.82.07 (CUDA 12.2)"),
        ("something else", "CUDA 12.2"),
    ):
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert gpu.driver_name(12020) == name
    monkeypatch.undo()
    assert "CUDA 13.0" in gpu.driver_name(13000)


# ---- recordings ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("streams")
def test_record(cuda: ModuleType) -> None:
    """The first two calls run the function, later ones replay what it did, with the values of then."""
    x, out, calls = filled([1.0, 2.0]), cuda.empty((2,), "float32"), []

    def function() -> None:
        calls.append(1)
        out[...] = x

    step = cuda.record(function)
    for i in range(6):
        x[...] = [i, i + 0.5]
        out[...] = -1
        step()
        assert np.asarray(out).tolist() == [i, i + 0.5]
    assert len(calls) == 2
    assert step.nodes == 1


@pytest.mark.usefixtures("streams")
def test_record_kernels(cuda: ModuleType, folder: Path) -> None:
    """Arguments are those of the capture; the order is that of the calls."""
    x, scratch, add = filled([1.0, 2.0]), cuda.empty((2,), "float32"), Kernel("own", "add", "PPPifdq")

    def function() -> None:
        add(1, 32, scratch, x, None, 2, 1.0, 0.0, 0)
        add(1, 32, x, scratch, None, 2, 10.0, 0.0, 0)
        scratch[...] = 0

    step = cuda.record(function)
    for i in range(1, 5):
        step()
        assert np.asarray(x).tolist() == [1 + 11 * i, 2 + 11 * i]
    assert not np.asarray(scratch).any() and step.nodes == 3


@pytest.mark.usefixtures("streams")
def test_two_recordings(cuda: ModuleType) -> None:
    x, y = filled([1.0]), filled([2.0])
    out = cuda.empty((1,), "float32")
    first, second = cuda.record(lambda: out.__setitem__(..., x)), cuda.record(lambda: out.__setitem__(..., y))
    for _ in range(4):
        first()
        assert np.asarray(out).tolist() == [1]
        second()
        assert np.asarray(out).tolist() == [2]


@pytest.mark.usefixtures("streams")
def test_a_recording_holds_its_arrays(cuda: ModuleType) -> None:
    out = cuda.empty((4,), "float32")
    before = free(cuda)

    def make() -> Callable[[], None]:
        x = cuda.empty((LARGE // 4,), "float32")[:4]
        x[...] = [1, 2, 3, 4]
        return cuda.record(lambda: out.__setitem__(..., x))

    step = make()
    for _ in range(4):
        gc.collect()
        step()
        cuda.empty((4,), "float32")[...] = -1
    assert np.asarray(out).tolist() == [1, 2, 3, 4]
    gc.disable()
    try:
        del step
        assert abs(before - cuda.memory()[0]) < SLACK, "it is dropped with the callable, not when garbage is collected"
    finally:
        gc.enable()


def test_a_recording_holds_its_workspace(cuda: ModuleType, folder: Path) -> None:
    """What is captured has the workspace's address in it; a larger one takes its place for others alone."""
    out, x, add = cuda.empty((2,), "float32"), filled([1, 2]), Kernel("own", "add", "PPPifdq")

    def function() -> None:
        place = device.workspace(8)
        add(1, 32, place, x, None, 2, 1.0, 0.0, 0)
        add(1, 32, out, place, None, 2, 1.0, 0.0, 0)

    device.enlarge(8)
    step = cuda.record(function)
    step()
    step()
    before, held = device.workspace(8), device.handle().workspace
    assert held is not None
    device.enlarge(held.nbytes + 4096)
    del held
    assert device.workspace(8) != before
    out[...] = 0
    step()
    assert np.asarray(out).tolist() == [3, 4]


def test_nothing_is_freed_in_a_capture(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays and recordings that die while a capture is on, whoever they belonged to, are freed after it."""
    in_a_capture, destroy = [], driver.destroy_executable

    def noted(executable: int) -> None:
        in_a_capture.append(device.handle().capturing)
        destroy(executable)

    monkeypatch.setattr(driver, "destroy_executable", noted)
    before, x, out = free(cuda), filled([1.0]), cuda.empty((1,), "float32")
    garbage: list[Any] = []

    def function() -> None:
        garbage.clear()
        gc.collect()
        out[...] = x

    step, other = cuda.record(function), cuda.record(lambda: out.__setitem__(..., x))
    other()
    other()
    step()
    garbage += [cuda.empty((LARGE,), "uint8"), other]
    del other
    step()
    step()
    assert np.asarray(out).tolist() == [1]
    assert device.handle().dead == [] and in_a_capture == [False]
    del step
    assert before - free(cuda) < SLACK


@pytest.mark.parametrize("what", ["fails", "interrupted", "reads", "writes", "allocates", "fetches", "stamps", "waits"])
def test_a_capture_that_fails(cuda: ModuleType, what: str) -> None:
    """The error passes, nothing has run, and the function can be recorded after all."""
    x, out, get = filled([1.0, 2.0]), cuda.empty((2,), "float32"), cuda.fetch(filled([0.0]))
    ids = filled([[1]], "int32")
    actions: dict[str, tuple[type[BaseException], Callable[[], Any]]] = {
        "fails": (ZeroDivisionError, lambda: 1 / 0),
        "interrupted": (KeyboardInterrupt, lambda: (_ for _ in ()).throw(KeyboardInterrupt)),
        "reads": (RuntimeError, lambda: np.asarray(x)),
        "writes": (RuntimeError, lambda: x.__setitem__(..., [3.0, 4.0])),
        "allocates": (RuntimeError, lambda: cuda.empty((2,), "float32")),
        "fetches": (RuntimeError, lambda: cuda.fetch(x)),
        "stamps": (RuntimeError, lambda: cuda.stamp()),
        "waits": (RuntimeError, get),
    }
    error, act = actions[what]
    calls = []

    def function() -> None:
        calls.append(1)
        check.ids("ids", ids, 2)
        out[...] = x
        if len(calls) == 2:
            act()

    step = cuda.record(function)
    step()
    out[...] = -1
    with pytest.raises(error) as caught:
        step()
    if error is RuntimeError:
        assert "cannot be part of a recording" in str(caught.value)
    assert np.asarray(out).tolist() == [-1, -1]
    step()
    step()
    assert np.asarray(out).tolist() == [1, 2] and len(calls) == 3
    assert len(step.conditions) == 1, "what the failed capture asked for is not asked again"


def test_recordings_do_not_nest(cuda: ModuleType) -> None:
    x, out = filled([1.0]), cuda.empty((1,), "float32")
    inner = cuda.record(lambda: out.__setitem__(..., x))
    outer = cuda.record(lambda: inner())
    with pytest.raises(RuntimeError, match="cannot be part of that of"):
        outer()
    inner()
    assert np.asarray(out).tolist() == [1]


def test_ids_are_checked_at_every_replay(cuda: ModuleType) -> None:
    """The function is not run any more, but its tokens are other ones each time."""
    tokens, out = filled([[1, 2]], "int32"), cuda.empty((1, 2), "int32")
    kept = out.view("float32")

    def function() -> None:
        check.ids("tokens", tokens, 5)
        kept[...] = tokens.view("float32")

    step = cuda.record(function)
    for _ in range(3):
        step()
    tokens[...] = [[4, 5]]
    with pytest.raises(ValueError, match=r"^tokens: id 5 at \[0, 1\] is outside \[0, 5\)$"):
        step()
    assert np.asarray(out).tolist() == [[1, 2]]
    tokens[...] = [[4, 0]]
    step()
    assert np.asarray(out).tolist() == [[4, 0]]


# ---- threads ---------------------------------------------------------------------------------------


def on_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def test_other_threads(cuda: ModuleType, folder: Path) -> None:
    """One at a time, any thread may call: allocate, compile, write, record, read."""
    x, out, add = filled([1.0, 2.0]), cuda.empty((2,), "float32"), Kernel("own", "add", "PPPifdq")
    op = device.op(lambda: add(1, 32, out, x, None, 2, 1.0, 0.0, 0), "add")
    step = cuda.record(op)

    def work() -> Any:
        step()
        y = cuda.empty((3,), "float32")
        y[...] = [1, 2, 3]
        get = cuda.fetch(out)
        step()
        return np.asarray(y).tolist(), get().tolist(), check.matrix("z", filled([[1.0]])).shape

    assert on_a_thread(work) == ([1, 2, 3], [2, 3], (1, 1))
    gc.collect()
    step()
    before, dying = free(cuda), [cuda.empty((LARGE,), "uint8")]
    on_a_thread(dying.clear)
    assert abs(before - free(cuda)) < SLACK
    assert isinstance(on_a_thread(lambda: cuda.empty((1 << 60,), "uint8")), DeviceMemoryError)
    assert np.asarray(out).tolist() == [2, 3] and cuda.empty((1,), "float32").size
