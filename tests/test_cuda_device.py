"""Arrays of the GPU: their geometry, values on their way there and back, what is known of ids, memory, settings."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_contract import missing_or_different

from llmc import ops as contract
from llmc._cuda import check, device, transfer
from llmc._cuda.device import DeviceArray
from llmc.errors import ConfigError, DeviceError, DeviceMemoryError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LARGE = 1 << 25  # bytes: a driver takes memory in pieces of 2 MiB, and may keep a few
SLACK = LARGE // 4


def filled(values: Any, dtype: str = "float32") -> DeviceArray:
    """An array of the GPU with these values."""
    host = np.asarray(values)
    x = device.empty(host.shape, dtype)
    x[...] = host
    return x


@pytest.fixture(params=["eager", "lazy"])
def streams(cuda: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """When a simulated GPU does what it is asked to: at once, or not before somebody waits for it."""
    device.synchronize()
    monkeypatch.setenv("SIMULATION_STREAMS", request.param)
    yield request.param
    device.synchronize()


def free(cuda: ModuleType) -> int:
    """Bytes that are free once all garbage is gone."""
    gc.collect()
    return cuda.memory()[0]


def test_cuda_is_a_backend() -> None:
    from llmc import _cuda

    assert missing_or_different(_cuda) == []


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


KEYS = [
    0, -1, slice(1, 3), (1, 2), (1, slice(None), 3), (slice(0, 1), slice(2, 4)), ..., (..., 0), (2, 3, 4), (-1, ..., 1),
    None, (0, None, 1),
]  # fmt: skip


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


@pytest.mark.parametrize("key", [True, [0, 1], np.array([1]), 1.0, "x", (0, [1])], ids=repr)
def test_other_indices(cuda: ModuleType, key: Any) -> None:
    with pytest.raises(TypeError, match="integers and slices"):
        filled(np.zeros((2, 2)))[key]


def test_index_out_of_range(cuda: ModuleType) -> None:
    x = filled(np.zeros((2, 2)))
    with pytest.raises(IndexError):
        x[2]
    assert [part.shape for part in iter(x)] == [(2,), (2,)]
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
    view = filled(np.full(LARGE // 4, 3))[7:9]
    for _ in range(4):
        cuda.empty((LARGE // 4,), "float32")[...] = 5
    assert np.asarray(view).tolist() == [3, 3]
    assert before - free(cuda) > LARGE - SLACK
    del view
    assert abs(before - free(cuda)) < SLACK


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
def test_large_arrays_go_in_parts(cuda: ModuleType, streams: str, rng: np.random.Generator, extra: int) -> None:
    """Around the size of a slot, and several times around the ring."""
    for slots in (1, transfer.SLOTS, 2 * transfer.SLOTS + 1):
        values = rng.integers(256, size=slots * transfer.SLOT_NBYTES + extra, dtype=np.uint8)
        x = filled(values, "uint8")
        np.testing.assert_array_equal(np.asarray(x), values)


def test_the_hosts_memory_is_free_at_once(cuda: ModuleType, streams: str) -> None:
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


def test_assignment_in_stream_order(cuda: ModuleType, streams: str) -> None:
    """A write is seen by what is called after it, not by what was called before."""
    x, seen = cuda.empty((4,), "float32"), [cuda.empty((4,), "float32") for _ in range(20)]
    for i, out in enumerate(seen):
        x[...] = [i, i + 1, i + 2, i + 3]
        out[...] = x
    x[...] = -1
    for i, out in enumerate(seen):
        assert np.asarray(out).tolist() == [i, i + 1, i + 2, i + 3]


def test_from_another_array(cuda: ModuleType, streams: str) -> None:
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
@pytest.mark.parametrize("size", [0, 1, 1000, transfer.FETCH_NBYTES // 2 + 1])
def test_fetch(cuda: ModuleType, streams: str, dtype: str, size: int) -> None:
    x = filled(np.arange(size) % 100, dtype)
    get = cuda.fetch(x)
    x[...] = -1
    values = get()
    assert values.dtype == (np.float32 if dtype == "bfloat16" else np.dtype(dtype))
    np.testing.assert_array_equal(values, np.arange(size) % 100)
    np.testing.assert_array_equal(get(), values)


def test_sixteen_more_may_be_fetched(cuda: ModuleType, streams: str) -> None:
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
    assert first().tolist() == [0], "what was looked at once can be looked at again"


def test_time(cuda: ModuleType, streams: str) -> None:
    """Seconds, of the device: not more than passed outside."""
    outside = time.perf_counter()
    begin = cuda.stamp()
    filled(np.zeros(1 << 20))
    end = cuda.stamp()
    inside = cuda.elapsed(begin, end)
    assert 0 < inside <= time.perf_counter() - outside
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


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, 2**31, -(2**33), 2**32 + 4])
def test_ids_out_of_range(cuda: ModuleType, bad: int) -> None:
    """As int32 has them: what is written is wrapped before it is judged."""
    x, values = cuda.empty((2, 2), "int32"), np.array([[0, 1], [bad, 3]])
    x[...] = values
    wrapped = values.astype(np.int32)[1, 0]
    if 0 <= wrapped < 4:
        check.ids("x", x, 4)
        return
    with pytest.raises(ValueError, match=rf"^x: id {wrapped} at \[1, 0\] is outside \[0, 4\)$"):
        check.ids("x", x, 4)


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
    x.view("float32")[...] = np.nan
    x[:1] = 0
    assert x[:1].bounds == (0, 0) and x.bounds is None
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
    sizes = cuda.workspace_nbytes(channels=64, vocab_size=512, parameters=1000, tokens=64, heads=4, head_size=16)
    assert set(sizes) == {"shared", "threads"}
    cuda.reserve(channels=64, vocab_size=512, parameters=1000, tokens=64, heads=4, head_size=16)
    device.enlarge(sizes["shared"] + 4096)
    place = device.workspace(sizes["shared"] + 4096)
    assert device.workspace(1) == place
    before = free(cuda)
    cuda.reserve(channels=1, vocab_size=1, parameters=1, tokens=1, heads=1, head_size=1)
    device.enlarge(1)
    assert device.workspace(sizes["shared"] + 4096) == place and free(cuda) == before
    with pytest.raises(RuntimeError, match=r"too small for .* call reserve\(\) first"):
        device.workspace(1 << 40)
    address, nbytes = device.library_workspace()
    assert nbytes == device.LIBRARY_NBYTES and device.library_workspace() == (address, nbytes)


def test_two_workspaces_need_not_fit(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger one takes the place of the one before it."""
    device.enlarge(4 << 20)
    held = device.handle().workspace
    assert held is not None
    nbytes = held.nbytes
    del held
    used = cuda.memory()[1] - free(cuda)
    monkeypatch.setenv("SIMULATION_MEMORY", str(used + (2 << 20)))
    device.enlarge(nbytes + (1 << 20))
    assert device.workspace(nbytes + (1 << 20))


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
def test_settings_that_cannot_be(cuda: ModuleType, settings: None, given: dict[str, Any], message: str) -> None:
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
