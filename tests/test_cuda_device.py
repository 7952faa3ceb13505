"""What every CUDA op stands on: arrays, values on their way, the compiler and its cache, recordings, errors.

Kernels of these tests are written to a folder of their own and compiled as the package's are.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc import ops as contract
from llmc._cuda import check, compiler, device, driver, graphs, transfer
from llmc._cuda.compiler import Kernel
from llmc._cuda.device import DeviceArray
from llmc.errors import ConfigError, DeviceError, DeviceMemoryError, MissingDependencyError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TESTS = Path(__file__).parent


def filled(values: Any, dtype: str = "float32") -> DeviceArray:
    """An array of the GPU with these values."""
    host = np.asarray(values)
    x = device.empty(host.shape, dtype)
    x[...] = host
    return x


def free(cuda: ModuleType) -> int:
    """Bytes that are free once all garbage is gone."""
    gc.collect()
    return cuda.memory()[0]


# ---- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "uint8", "float16"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3), (1000003,)])
def test_empty(cuda: ModuleType, shape: tuple[int, ...], dtype: str) -> None:
    x = cuda.empty(shape, dtype)
    assert (x.shape, x.dtype, x.ndim) == (shape, np.dtype(dtype), len(shape))
    assert x.size == np.prod(shape) and x.nbytes == x.size * x.itemsize
    values = np.asarray(x)
    assert (values.shape, values.dtype) == (x.shape, x.dtype)
    assert not values.any()


KEYS = [0, -1, slice(1, 3), (1, 2), (1, slice(None), 3), (slice(0, 1), slice(2, 4)), ..., (..., 0), (2, 3, 4), (-1, ..., 1)]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_indexing_is_numpys(cuda: ModuleType, key: Any, dtype: str) -> None:
    """The same elements as NumPy's basic indexing, as a view: writing to it writes to the array."""
    host = np.arange(3 * 4 * 5).reshape(3, 4, 5).astype(dtype)
    x = filled(host, dtype)
    part, expected = x[key], host[key]
    assert part.shape == expected.shape and part.dtype == expected.dtype
    if not part.flags.c_contiguous:
        with pytest.raises(ValueError, match="contiguous"):
            np.asarray(part)
        with pytest.raises(ValueError, match="contiguous"):
            part[...] = 0
        return
    np.testing.assert_array_equal(np.asarray(part), expected)
    x[key] = 7
    host[key] = 7
    np.testing.assert_array_equal(np.asarray(x), host)


@pytest.mark.parametrize("key", [None, True, [0, 1], np.array([1]), 1.0, "x", (0, None)], ids=repr)
def test_other_indices(cuda: ModuleType, key: Any) -> None:
    with pytest.raises(TypeError, match="integers and slices"):
        filled(np.zeros((2, 2)))[key]


def test_index_out_of_range(cuda: ModuleType) -> None:
    x = filled(np.zeros((2, 2)))
    with pytest.raises(IndexError):
        x[2]
    assert [part.shape for part in x] == [(2,), (2,)]
    assert len(x) == 2
    with pytest.raises(TypeError):
        len(x[0, 0])


def test_views(cuda: ModuleType) -> None:
    x = filled(np.arange(24).reshape(2, 12))
    assert x.reshape(2, 3, 4).shape == x.reshape((2, 3, 4)).shape == (2, 3, 4)
    assert x.reshape(-1).ptr == x.ptr and x[1].ptr == x.ptr + 48
    x.reshape(-1)[5:7] = [50, 60]
    assert np.asarray(x)[0, 5:7].tolist() == [50, 60]
    raw = x.view("uint8")
    assert raw.shape == (2, 48) and raw.view("float32").shape == (2, 12)
    np.testing.assert_array_equal(np.asarray(x.view("int32")), np.asarray(x).view(np.int32))
    with pytest.raises(ValueError):
        x.reshape(5)
    with pytest.raises(ValueError):
        x[:, :2].reshape(-1)


def test_a_view_keeps_the_memory(cuda: ModuleType) -> None:
    before = free(cuda)
    view = filled(np.full(1 << 18, 3))[7:9]
    for _ in range(4):
        cuda.empty((1 << 18,), "float32")[...] = 5
    assert np.asarray(view).tolist() == [3, 3]
    assert free(cuda) <= before - (1 << 20)
    del view
    assert free(cuda) == before


# ---- values from the host --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "uint8"])
def test_assignment_converts(cuda: ModuleType, dtype: str) -> None:
    for values in ([[1, 2, 3], [4, 5, 6]], np.array([1.0, 2.0, 130.0]), np.float16(3), 5, True, [[7], [8]]):
        x = cuda.empty((2, 3), dtype)
        x[...] = values
        expected = np.empty((2, 3), dtype)
        expected[...] = values
        np.testing.assert_array_equal(np.asarray(x), expected)
    with pytest.raises(ValueError):
        x[...] = [1, 2]
    np.testing.assert_array_equal(np.asarray(x), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 3, np.nan, np.inf, 1e-40, 3e38])
def test_scalars_to_the_bit(cuda: ModuleType, dtype: str, value: float) -> None:
    x, expected = cuda.empty((7,), dtype), np.full(7, value, dtype)
    x[...] = value
    assert np.asarray(x).tobytes() == expected.tobytes()
    x[1:3] = np.float64(value) + 1
    expected[1:3] = np.float64(value) + 1
    assert np.asarray(x).tobytes() == expected.tobytes()


def test_bfloat16_is_rounded_to_nearest(cuda: ModuleType, rng: np.random.Generator) -> None:
    values = rng.standard_normal(10007).astype(np.float32)
    x = filled(values, "bfloat16")
    np.testing.assert_array_equal(np.asarray(x), values.astype(BFLOAT16))
    np.testing.assert_array_equal(np.asarray(x, dtype=np.float64), values.astype(BFLOAT16).astype(np.float64))


@pytest.mark.parametrize("extra", [-1, 0, 1, 12345])
def test_large_arrays_go_in_parts(cuda: ModuleType, rng: np.random.Generator, extra: int) -> None:
    """Around the size of a slot, and several times around the ring."""
    for slots in (1, transfer.SLOTS, 2 * transfer.SLOTS + 1):
        values = rng.integers(256, size=slots * transfer.SLOT_NBYTES + extra, dtype=np.uint8)
        x = filled(values, "uint8")
        np.testing.assert_array_equal(np.asarray(x), values)


def test_the_hosts_memory_is_free_at_once(cuda: ModuleType) -> None:
    """More writes than slots, each from the same memory, in the order of the calls."""
    host, arrays = np.empty(1000, np.int32), []
    last = cuda.empty((1000,), "int32")
    for i in range(3 * transfer.SLOTS):
        host[...] = i
        arrays.append(cuda.empty((1000,), "int32"))
        arrays[-1][...] = host
        last[...] = host
        host[...] = -1
    for i, x in enumerate(arrays):
        assert (np.asarray(x) == i).all()
    assert (np.asarray(last) == 3 * transfer.SLOTS - 1).all()


def test_assignment_in_stream_order(cuda: ModuleType) -> None:
    """A write is seen by what is called after it, not by what was called before."""
    x, seen = cuda.empty((4,), "float32"), [cuda.empty((4,), "float32") for _ in range(20)]
    for i, out in enumerate(seen):
        x[...] = [i, i + 1, i + 2, i + 3]
        out[...] = x
    x[...] = -1
    for i, out in enumerate(seen):
        assert np.asarray(out).tolist() == [i, i + 1, i + 2, i + 3]


def test_from_another_array(cuda: ModuleType) -> None:
    x, y = filled(np.arange(6).reshape(2, 3)), cuda.empty((2, 3), "float32")
    y[...] = x
    x[...] = 0
    assert np.asarray(y).tolist() == [[0, 1, 2], [3, 4, 5]]
    wide = cuda.empty((2, 3), "float64")
    wide[...] = y
    assert np.asarray(wide).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="shape"):
        y[...] = filled(np.zeros(3))


# ---- values to the host ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32"])
@pytest.mark.parametrize("size", [0, 1, 1000, transfer.FETCH_NBYTES // 4 + 1])
def test_fetch(cuda: ModuleType, dtype: str, size: int) -> None:
    x = filled(np.arange(size) % 100, dtype)
    get = cuda.fetch(x)
    x[...] = -1
    values = get()
    assert values.dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(values, np.arange(size) % 100)
    np.testing.assert_array_equal(get(), values)


def test_sixteen_more_may_be_fetched(cuda: ModuleType) -> None:
    """The contract's number, and an error where an early one would be looked at too late."""
    x = filled([0.0])
    first = cuda.fetch(x)
    gets = []
    for i in range(1, 17):
        x[...] = i
        gets.append(cuda.fetch(x))
    assert first().tolist() == [0]
    assert [get().tolist() for get in gets] == [[i] for i in range(1, 17)]
    late = cuda.fetch(x)
    for _ in range(transfer.FETCHES):
        cuda.fetch(x)
    with pytest.raises(RuntimeError, match="before this one was looked at"):
        late()


def test_time(cuda: ModuleType) -> None:
    begin = cuda.stamp()
    filled(np.zeros(1 << 20))
    end = cuda.stamp()
    assert 0 < cuda.elapsed(begin, end) < 60
    assert cuda.elapsed(begin, begin) == 0


# ---- ranges of ids ---------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[DeviceArray]:
    """The arrays that are read from now on."""
    found: list[DeviceArray] = []
    read = device._read

    def noted(x: DeviceArray) -> Any:
        found.append(x)
        return read(x)

    monkeypatch.setattr(device, "_read", noted)
    return found


def test_known_ids_are_not_read(cuda: ModuleType, reads: list[DeviceArray]) -> None:
    arena = cuda.empty((4096,), "uint8")
    x, y = arena[:64].view("int32").reshape(2, 8), arena[64:128].view("int32").reshape(2, 8)
    x[...] = np.arange(16).reshape(2, 8)
    y[...] = 100  # beside it: of no concern
    check.ids("x", x, 16)
    check.ids("x", x.reshape(8, 2), 16)
    check.ids("x", x[1:], 16)
    assert x.bounds == (0, 15) and reads == []
    copied = cuda.empty((2, 8), "int32")
    copied[...] = x
    check.ids("copied", copied, 16)
    assert reads == []


def test_unknown_ids_are_read(cuda: ModuleType, reads: list[DeviceArray]) -> None:
    """Where they were written as something else, in part, or not at all."""
    x = cuda.empty((2, 8), "int32")
    check.ids("x", x, 1)
    assert len(reads) == 1
    x[...] = np.arange(16).reshape(2, 8)
    x[1, 7:] = 99
    assert x.bounds is None
    with pytest.raises(ValueError, match=r"^x: id 99 at \[1, 7\] is outside \[0, 16\)$"):
        check.ids("x", x, 16)
    x[...] = 3
    x.view("uint8")[0, 3:4] = 255
    with pytest.raises(ValueError, match=r"^x: id -16777213 at \[0, 0\]"):
        check.ids("x", x, 16)


def test_bounds_are_not_the_last_word(cuda: ModuleType, reads: list[DeviceArray]) -> None:
    """A part of an array may keep within bounds that the whole does not."""
    x = filled([[0, 1], [2, 300]], "int32")
    check.ids("x", x[:1], 3)
    assert len(reads) == 1
    with pytest.raises(ValueError, match=r"id 300 at \[0, 1\]"):
        check.ids("x", x[1:], 3)
    check.ids("x", cuda.empty((2, 0), "int32"), 0)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ([[0]], TypeError, "x: expected an array of the GPU, got list"),
        (np.zeros((1, 1), np.float32), TypeError, "x: expected an array of the GPU, got ndarray"),
    ],
)
def test_no_array(cuda: ModuleType, values: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check.matrix("x", values)


def test_checks(cuda: ModuleType) -> None:
    x = filled(np.zeros((2, 3)))
    assert check.matrix("x", x) is x and check.flat("x", x) is x and check.numbers("x", x) is x
    for refused, message in (
        (lambda: check.vector("x", x), r"x: expected 1 dimensions, got shape \(2, 3\)"),
        (lambda: check.cube("x", x), r"x: expected 3 dimensions, got shape \(2, 3\)"),
        (lambda: check.matrix("x", x, np.float64), "x: expected dtype float64, got float32"),
        (lambda: check.matrix("x", x[:, :2]), "x: must be C-contiguous"),
        (lambda: check.ids("x", x, 3), "x: expected dtype int32, got float32"),
        (lambda: check.expect("x", x.shape, (3, 2)), r"x: expected shape \(3, 2\), got \(2, 3\)"),
        (lambda: check.numbers("x", filled([1], "int32")), "x: expected dtype float32, got int32"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    x.flags.writeable = False
    with pytest.raises(ValueError, match="x: must be writable"):
        check.matrix("x", x)


# ---- memory ----------------------------------------------------------------------------------------


def test_out_of_memory(cuda: ModuleType) -> None:
    have, total = free(cuda), cuda.memory()[1]
    with pytest.raises(DeviceMemoryError) as caught:
        cuda.empty((have + 1,), "uint8")
    asked, available, all_of_it = (f"{n / 2**20:,.1f} MiB" for n in (have + 1, have, total))
    assert str(caught.value).startswith(f"empty: {asked} asked for, {available} of {all_of_it} are free on cuda:0 (")
    assert isinstance(caught.value, MemoryError)
    assert not np.asarray(cuda.empty((5,), "float32")).any()


def test_workspace(cuda: ModuleType) -> None:
    """It grows and never shrinks, and what is too small is not handed out."""
    sizes = cuda.workspace_nbytes(channels=64, vocab_size=512, parameters=1000, tokens=64, heads=4)
    assert set(sizes) == {"shared", "threads"}
    cuda.reserve(channels=64, vocab_size=512, parameters=1000, tokens=64, heads=4)
    place = device.workspace(sizes["shared"])
    assert device.workspace(1) == place
    before = free(cuda)
    cuda.reserve(channels=1, vocab_size=1, parameters=1, tokens=1, heads=1)
    assert device.workspace(sizes["shared"]) == place and free(cuda) == before
    with pytest.raises(RuntimeError, match=r"too small for .* call reserve\(\) first"):
        device.workspace(1 << 40)
    address, nbytes = device.library_workspace()
    assert nbytes == device.LIBRARY_NBYTES and device.library_workspace() == (address, nbytes)


# ---- kernels ---------------------------------------------------------------------------------------

SOURCE = """#include "own.cuh"
extern "C" __global__ void add(floatX *out, const floatX *x, const float *none, int n, float by, double twice, long long k) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = x[i] + by + 2 * twice + k + (none ? 100 : 0);
}
extern "C" __global__ void where(int *out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int threads = blockDim.x * blockDim.y * blockDim.z;
    out[block * threads + threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)] = block;
}
extern "C" __global__ void stray(int *out, int by) { out[by] = 1; }
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
    with pytest.raises(DeviceError, match=r"^llmc/_cuda/own\.cu:9: error: .*nonsense"):
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
        ('llmc/_cuda/a.cu(57): error: identifier "q" is undefined\n      q\n      ^\n', '57: error: identifier "q" is undefined'),
        ("llmc/_cuda/a.cu(3): warning #1-D: last line\nllmc/_cuda/a.cu(57): error #20-D: x\nllmc/_cuda/a.cu(9): error: y\n",
         "57: error: x (and 1 more)"),
        ("llmc/_cuda/a.cu(57): catastrophic error: cannot open source file \"b.cuh\"\n", "57: error: cannot open source file \"b.cuh\""),
        ("llmc/_cuda/a.cu:57:9: error: no\n", "57: error: no"),
        ("llmc/_cuda/a.cu:57:9: fatal error: b.cuh: No such file\n", "57: error: b.cuh: No such file"),
        ("ptxas fatal   : Value 'sm_70' is not defined", "NVRTC 1.0 cannot compile it: ptxas fatal : Value 'sm_70' is not defined"),
        ("", "NVRTC 1.0 cannot compile it: it did not say why"),
    ],
)  # fmt: skip
def test_logs_of_compilers(log: str, message: str) -> None:
    between = ":" if message[0].isdigit() else ": "
    assert str(compiler.compile_error(log, "a", "NVRTC 1.0")) == f"llmc/_cuda/a.cu{between}{message}"


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


def test_cache(cuda: ModuleType, folder: Path, compiled: list[str]) -> None:
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
    (folder / "own.cu").write_text(SOURCE)
    assert add_one(cuda) == [2, 3], "the third source is the first again, under its old name"


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


# ---- recordings ------------------------------------------------------------------------------------


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


def test_two_recordings(cuda: ModuleType) -> None:
    x, y = filled([1.0]), filled([2.0])
    out = cuda.empty((1,), "float32")
    first, second = cuda.record(lambda: out.__setitem__(..., x)), cuda.record(lambda: out.__setitem__(..., y))
    for _ in range(4):
        first()
        assert np.asarray(out).tolist() == [1]
        second()
        assert np.asarray(out).tolist() == [2]


def test_a_recording_holds_its_arrays(cuda: ModuleType) -> None:
    out = cuda.empty((4,), "float32")
    before = free(cuda)

    def make() -> Callable[[], None]:
        x = filled([1, 2, 3, 4])
        return cuda.record(lambda: out.__setitem__(..., x))

    step = make()
    for _ in range(4):
        gc.collect()
        step()
        cuda.empty((4,), "float32")[...] = -1
    assert np.asarray(out).tolist() == [1, 2, 3, 4]
    del step
    assert free(cuda) == before


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
    before = device.workspace(8)
    device.enlarge(device.handle().workspace.nbytes + 4096)
    assert device.workspace(8) != before
    out[...] = 0
    step()
    assert np.asarray(out).tolist() == [3, 4]


def test_nothing_is_freed_in_a_capture(cuda: ModuleType) -> None:
    """Arrays that die while a capture is on, whoever they belonged to, are freed after it."""
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
    garbage += [cuda.empty((1 << 20,), "uint8"), other]
    del other
    step()
    step()
    assert np.asarray(out).tolist() == [1]
    assert device.handle().dead == []
    del step
    assert before - free(cuda) < 1 << 20


@pytest.mark.parametrize("what", ["fails", "interrupted", "reads", "writes", "allocates", "fetches", "stamps", "waits"])
def test_a_capture_that_fails(cuda: ModuleType, what: str) -> None:
    """The error passes, nothing has run, and the function can be recorded after all."""
    x, out, get = filled([1.0, 2.0]), cuda.empty((2,), "float32"), cuda.fetch(filled([0.0]))
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
    assert isinstance(on_a_thread(lambda: cuda.empty((1 << 60,), "uint8")), DeviceMemoryError)
    assert np.asarray(out).tolist() == [2, 3] and cuda.empty((1,), "float32").size


# ---- settings --------------------------------------------------------------------------------------


@pytest.fixture
def settings(cuda: ModuleType) -> Iterator[None]:
    before = {name: cuda.info()[name] for name in ("dtype", "gemm", "attention")}
    yield
    contract.load("cuda", **before)


def test_info(cuda: ModuleType, settings: None) -> None:
    for dtype, storage in (("bf16", "bfloat16"), ("tf32", "float32"), ("fp32", "float32")):
        assert contract.load("cuda", dtype=dtype, attention="own") is cuda
        info = cuda.info()
        assert (info["device"], info["dtype"], info["storage"], info["ahead"]) == ("cuda", dtype, storage, 1)
        assert device.storage == np.dtype(storage)
        assert (info["gemm"], info["attention"]) == ("cublaslt", "own")
    assert info["name"] and "." in info["capability"] and "CUDA " in info["driver"]
    assert info["compiler"].split()[0] in ("NVRTC", "nvcc")
    contract.load("cuda", gemm="own")
    assert cuda.info()["gemm"] == "own"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"gemm": "mine"}, "gemm: 'mine' is unknown here; choose from cublaslt, own"),
        ({"attention": "mine"}, "attention: 'mine' is unknown here; choose from own, cudnn"),
        ({"dtype": "tf32", "gemm": "own"}, "gemm: 'own' multiplies in fp32 or bf16, not in tf32"),
        ({"dtype": "fp32", "attention": "cudnn"}, "attention: 'cudnn' attends in bf16 alone, and dtype is 'fp32'"),
    ],
)
def test_settings_that_cannot_be(cuda: ModuleType, settings: None, given: dict[str, str], message: str) -> None:
    before = cuda.info()
    with pytest.raises(ConfigError) as caught:
        contract.load("cuda", **given)
    assert str(caught.value).startswith(message)
    assert cuda.info() == before


@pytest.mark.parametrize("versions", [None, "9.10.2, frontend 1.15.0"])
def test_cudnn_is_taken_where_it_is(
    cuda: ModuleType, settings: None, monkeypatch: pytest.MonkeyPatch, versions: str | None
) -> None:
    from llmc._cuda import cudnn

    monkeypatch.setattr(cudnn, "available", lambda: versions)
    contract.load("cuda", dtype="bf16")
    assert cuda.info()["attention"] == ("cudnn" if versions else "own")
    contract.load("cuda", dtype="bf16", attention="own")
    assert cuda.info()["attention"] == "own"
    contract.load("cuda", dtype="fp32")
    assert cuda.info()["attention"] == "own"
    if versions:
        contract.load("cuda", dtype="bf16", attention="cudnn")
        assert cuda.info()["attention"] == "cudnn"
    else:
        with pytest.raises(ConfigError, match="^attention: 'cudnn' needs cuDNN 9 .*pip install nvidia-cudnn-frontend"):
            contract.load("cuda", dtype="bf16", attention="cudnn")


def test_one_gpu_per_process(cuda: ModuleType) -> None:
    with pytest.raises(DeviceError, match="cuda:1: this process uses cuda:0, and a process uses one GPU"):
        contract.load("cuda:1")
    assert cuda.info()["device"] == "cuda"


# ---- errors, in processes of their own -------------------------------------------------------------

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


LOAD = "attempt(ops.load, 'cuda')"
MISSING = [
    ("", {"SIMULATION_DRIVER": "12040"}, "DeviceError: the NVIDIA driver is too old: it runs CUDA 12.4, and what NVRTC 13.0 "
     "compiles needs CUDA 13.0, which is driver 580 or newer"),
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
     "MissingDependencyError: the device cuda needs PyCUDA: pip install 'llmc[cuda]'"),
    ("sys.modules['pycuda._driver'] = None", {}, "MissingDependencyError: PyCUDA needs pycuda._driver: "),
    ("os.environ['SIMULATION_FAULT'] = 'cuInit:803'\nattempt(ops.load, 'cuda'); os.environ['SIMULATION_FAULT'] = 'cuInit:803:2'",
     {}, "DeviceError: the NVIDIA driver cannot be initialised: cuInit failed: system "
     "has unsupported display driver / cuda driver combination"),
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


def test_older_architectures_of_a_newer_compiler(child: Callable[..., list[str]]) -> None:
    """What the compiler does not know yet runs the code of its predecessor."""
    program = "ops.load('cuda'); print(compiler.architecture((8, 9)), compiler.architecture((9, 7)))"
    assert child(program) == ["sm_89 sm_90"]


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
    assert first.startswith("DeviceError: reading an array: the GPU has failed, here or in an op before it (the last were ")
    assert "poke, reading an array)" in first and ILLEGAL in first and first.endswith("LLMC_CUDA_CHECK=1 the message names the op")
    after = "DeviceError: the GPU is out of this process's reach since this error: " + first.removeprefix("DeviceError: ")
    assert lines[2:] == [after] * 4


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
