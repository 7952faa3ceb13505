"""llm.c's model and debug state files: layout byte by byte, round trips, and every kind of damage.

Expected bytes are put together here with `struct` and NumPy alone, from the table in the format's
description, so that a reader and a writer with the same fault do not agree their way through.
"""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc import checkpoint, files
from llmc.arena import Arena, Array, Row
from llmc.checkpoint import Dimensions
from llmc.errors import ConfigError, FileFormatError
from llmc.gpt2 import Config

DIMS = Dimensions(max_seq_len=6, vocab_size=130, num_layers=2, num_heads=2, channels=8)
ORDER = (
    "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b", "fcw", "fcb",
    "fcprojw", "fcprojb", "lnfw", "lnfb",
)  # fmt: skip
VERSIONS = (1, 3, 5)


def rows_for(dims: Dimensions, dtype: str = "float32") -> list[Row]:
    config = Config(dims.max_seq_len, dims.vocab_size, dims.num_layers, dims.num_heads, dims.channels)
    return config.parameter_rows(dtype)


def make_arena(seed: int = 0, dims: Dimensions = DIMS, dtype: str = "float32") -> Arena:
    """An arena of normals, padded rows 0."""
    arena = Arena(rows_for(dims, dtype), reference.empty)
    rng = np.random.default_rng(seed)
    for _, array in arena:
        array[...] = rng.standard_normal(array.shape)
    arena.wte[dims.vocab_size :] = 0
    return arena


@pytest.mark.parametrize("slice_bytes", [1, 100, 4096])
@pytest.mark.parametrize("version", VERSIONS)
def test_slices(version: int, slice_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in slices by several threads, as large tensors are, a model is the same."""
    written, found = make_arena(), make_arena(1)
    checkpoint.write_model(tmp_path / "model.bin", version, DIMS, written)
    whole = make_arena(2)
    checkpoint.read_model(tmp_path / "model.bin", DIMS, whole)
    monkeypatch.setattr(files, "SLICE", slice_bytes)
    monkeypatch.setattr(files, "READERS", 3)
    checkpoint.read_model(tmp_path / "model.bin", DIMS, found)
    assert found.flat.tobytes() == whole.flat.tobytes()


def shapes(dims: Dimensions) -> dict[str, tuple[int, ...]]:
    """The format's table, written out."""
    L, C = dims.num_layers, dims.channels
    return {
        "wte": (-(-dims.vocab_size // 128) * 128, C), "wpe": (dims.max_seq_len, C),
        "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }  # fmt: skip


def header(*values: int) -> bytes:
    return struct.pack("<256i", *values, *[0] * (256 - len(values)))


def model_bytes(version: int, dims: Dimensions, tensors: dict[str, Array]) -> bytes:
    """A model file from the format's description."""
    sizes = (dims.max_seq_len, dims.vocab_size, dims.num_layers, dims.num_heads, dims.channels)
    padded = [-(-dims.vocab_size // 128) * 128] if version != 1 else []
    out = header(20240326, version, *sizes, *padded)
    for name in ORDER:
        values = tensors[name][: dims.vocab_size] if name == "wte" and version == 1 else tensors[name]
        out += values.astype(ml_dtypes.bfloat16 if version == 5 else "<f4").tobytes()
    return out


def as_dict(arena: Arena) -> dict[str, Array]:
    return {row.name: array for row, array in arena}


def read(path: Path, dtype: str = "float32") -> tuple[int, Arena]:
    version, dims = checkpoint.read_model_header(path, rows_for)
    arena = Arena(rows_for(dims, dtype), reference.empty)
    arena.wte[...] = np.nan  # so that what is not written shows
    checkpoint.read_model(path, dims, arena)
    return version, arena


def assert_no_leftovers(folder: Path) -> None:
    assert [path.name for path in folder.iterdir() if ".tmp" in path.name] == []


# ---- model -----------------------------------------------------------------------------------------


def test_rows_are_the_format() -> None:
    assert {row.name: row.full_shape for row in rows_for(DIMS)} == shapes(DIMS)
    assert tuple(row.name for row in rows_for(DIMS)) == ORDER


@pytest.mark.parametrize("version", VERSIONS)
def test_model_bytes(tmp_path: Path, version: int) -> None:
    arena = make_arena()
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, version, DIMS, arena)
    assert path.read_bytes() == model_bytes(version, DIMS, as_dict(arena))
    assert_no_leftovers(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("version", VERSIONS)
def test_model_is_read(tmp_path: Path, version: int, dtype: str) -> None:
    arena = make_arena(1)
    path = tmp_path / "model.bin"
    path.write_bytes(model_bytes(version, DIMS, as_dict(arena)))
    found, again = read(path, dtype)
    assert found == version
    for row, array in again:
        expected = arena[row.name]
        if version == 5:
            expected = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(array, expected, err_msg=row.name)


@pytest.mark.parametrize("version", [3, 5])
def test_padding_is_zero_on_disk_and_in_memory(tmp_path: Path, version: int) -> None:
    arena = make_arena()
    clean = model_bytes(version, DIMS, as_dict(arena))
    arena.wte[DIMS.vocab_size :] = 7.0
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, version, DIMS, arena)
    assert path.read_bytes() == clean
    path.write_bytes(model_bytes(version, DIMS, as_dict(arena)))  # another program's, with padding in use
    _, again = read(path)
    assert not again.wte[DIMS.vocab_size :].any()
    assert again.wte[: DIMS.vocab_size].any()


def test_bf16_rounds_to_nearest_even(tmp_path: Path) -> None:
    arena = make_arena()
    # 1 + 2^-8 is half way between two bf16 values: to even means down; 1 + 3*2^-8 means up.
    arena.lnfb[:4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)]
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, 5, DIMS, arena)
    _, again = read(path)
    assert again.lnfb[:4].tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -1.0]


def test_conversion_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = make_arena(3)
    whole = model_bytes(5, DIMS, as_dict(arena))
    monkeypatch.setattr(files, "CHUNK", 7)
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, 5, DIMS, arena)
    assert path.read_bytes() == whole
    _, again = read(path)
    np.testing.assert_array_equal(again.fcw, arena.fcw.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_sizes_of_the_published_files() -> None:
    dims = Dimensions(1024, 50257, 12, 12, 768)
    rows = rows_for(dims)
    padded, unpadded = (checkpoint._elements(rows, 50257, kind) for kind in (True, False))
    assert (padded, unpadded) == (124_475_904, 124_439_808)
    assert 1024 + 4 * padded == 497_904_640
    assert 1024 + 2 * padded == 248_952_832
    assert 1024 + 4 * (2 * 256 + 256 * 50257 + 1 + padded) == 549_369_860


# Every field in turn: (index in the header, value, field named in the message).
BAD_FIELDS = [
    (0, 20240520, "magic"), (0, 0, "magic"), (1, 2, "version"), (1, -3, "version"),
    (2, 0, "max_seq_len"), (3, -1, "vocab_size"), (4, 0, "num_layers"), (5, 0, "num_heads"),
    (6, -8, "channels"), (5, 3, "channels"), (7, 130, "padded_vocab_size"), (7, 384, "padded_vocab_size"),
    (2, 7, "file size"), (4, 3, "file size"), (4, 2**31 - 1, "file size"), (6, 2**30, "file size"),
]  # fmt: skip


@pytest.mark.parametrize(("index", "value", "field"), BAD_FIELDS)
def test_header_fields(tmp_path: Path, index: int, value: int, field: str) -> None:
    data = bytearray(model_bytes(3, DIMS, as_dict(make_arena())))
    struct.pack_into("<i", data, 4 * index, value)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        checkpoint.read_model_header(path, rows_for)
    assert caught.value.field == field
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_do_not_overflow(tmp_path: Path) -> None:
    """Dimensions whose product in 64 bits wraps to nearly nothing must still be too large for the file."""
    path = tmp_path / "model.bin"
    path.write_bytes(header(20240326, 1, 2**30, 2**30, 2**30, 1, 2**30))
    with pytest.raises(FileFormatError, match="file size"):
        checkpoint.read_model_header(path, rows_for)


@pytest.mark.parametrize("change", [-1, 1, 4, -4, -1000])
@pytest.mark.parametrize("version", VERSIONS)
def test_model_file_size_is_exact(tmp_path: Path, version: int, change: int) -> None:
    data = model_bytes(version, DIMS, as_dict(make_arena()))
    path = tmp_path / "model.bin"
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(FileFormatError, match="truncated" if change < 0 else "too long"):
        checkpoint.read_model_header(path, rows_for)
    arena = make_arena(5)
    before = arena.buffer.copy()
    with pytest.raises(FileFormatError):
        checkpoint.read_model(path, DIMS, arena)
    np.testing.assert_array_equal(arena.buffer, before)


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_no_room_for_a_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(FileFormatError, match="header"):
        checkpoint.read_model_header(path, rows_for)


def test_wrong_kinds_of_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.bin"):
        with pytest.raises(FileFormatError, match="file: "):
            checkpoint.read_model_header(path, rows_for)
    fifo = tmp_path / "fifo"
    if hasattr(os, "mkfifo"):
        os.mkfifo(fifo)
        writer = subprocess.Popen([sys.executable, "-c", f"open({str(fifo)!r}, 'wb').write(b'x')"])
        try:
            with pytest.raises(FileFormatError, match="not a regular file"):
                checkpoint.read_model_header(fifo, rows_for)
        finally:
            writer.kill()
            writer.wait()


def test_file_that_changes_its_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, 3, DIMS, make_arena())
    other = Dimensions(6, 129, 2, 2, 8)  # the same size in bytes
    with pytest.raises(FileFormatError, match="header"):
        checkpoint.read_model(path, other, make_arena(dims=other))


def test_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, 3, DIMS, make_arena())
    monkeypatch.setattr(checkpoint, "check_size", lambda file, expected: os.truncate(path, 2000))
    with pytest.raises(FileFormatError, match="wte: the file ends"):
        checkpoint.read_model(path, DIMS, make_arena())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(-(2**31), 2**31 - 1)), max_size=4),
    st.binary(max_size=64),
)
def test_any_header_is_refused_in_words(tmp_path: Path, changes: list[tuple[int, int]], tail: bytes) -> None:
    data = bytearray(header(20240326, 3, 6, 130, 2, 2, 8, 256) + tail)
    for index, value in changes:
        struct.pack_into("<i", data, 4 * index, value)
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(FileFormatError):  # never the right size
        checkpoint.read_model_header(path, rows_for)


def test_unknown_version_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="version"):
        checkpoint.write_model(tmp_path / "model.bin", 2, DIMS, make_arena())
    assert list(tmp_path.iterdir()) == []


def test_large_model_needs_no_second_copy(tmp_path: Path) -> None:
    """fp32 goes from the file into the arena itself: the peak grows by less than half the model."""
    dims = Dimensions(64, 20000, 1, 1, 512)
    path = tmp_path / "model.bin"
    checkpoint.write_model(path, 3, dims, make_arena(dims=dims))
    program = f"""
import resource, sys
sys.path[:0] = {[str(Path(checkpoint.__file__).parent.parent), str(Path(__file__).parent)]!r}
import numpy as np
from llmc import checkpoint, files
from llmc.arena import Arena
from test_checkpoint import rows_for
import reference
version, dims = checkpoint.read_model_header({str(path)!r}, rows_for)
arena = Arena(rows_for(dims), reference.empty)
arena.buffer[:] = 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.read_model({str(path)!r}, dims, arena)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / arena.nbytes)
"""
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in other units elsewhere")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


# ---- debug state -----------------------------------------------------------------------------------


def debug_parts(dims: Dimensions = DIMS, B: int = 2, T: int = 3) -> tuple[Array, Array, Array, float, Arena]:
    rng = np.random.default_rng(2)
    x, y = (rng.integers(dims.vocab_size, size=(B, T)).astype(np.int32) for _ in range(2))
    return x, y, rng.standard_normal((B, T, dims.vocab_size)).astype(np.float32), 4.25, make_arena(8, dims)


def debug_bytes(version: int) -> bytes:
    x, y, logits, loss, gradients = debug_parts()
    out = header(20240327, version, *x.shape)
    out += x.astype("<i4").tobytes() + y.astype("<i4").tobytes() + logits.astype("<f4").tobytes()
    out += struct.pack("<f", loss)
    for name in ORDER:
        array = gradients[name]
        out += (array[: DIMS.vocab_size] if version == 1 and name == "wte" else array).tobytes()
    return out


@pytest.mark.parametrize("version", [1, 2])
def test_debug_state_both_ways(tmp_path: Path, version: int) -> None:
    x, y, logits, loss, gradients = debug_parts()
    path = tmp_path / "debug.bin"
    gradients.wte[DIMS.vocab_size :] = 9.0  # must not reach the file
    checkpoint.write_debug_state(path, version, x, y, logits, loss, gradients)
    assert path.read_bytes() == debug_bytes(version)
    assert_no_leftovers(tmp_path)
    state = checkpoint.read_debug_state(path, rows_for(DIMS), DIMS.vocab_size)
    np.testing.assert_array_equal(state.x, x)
    np.testing.assert_array_equal(state.y, y)
    np.testing.assert_array_equal(state.logits, logits)
    assert state.loss == loss and state.version == version
    gradients.wte[DIMS.vocab_size :] = 0
    found = list(state.gradients())
    assert tuple(row.name for row, _ in found) == ORDER
    for row, array in found:
        np.testing.assert_array_equal(array, gradients[row.name], err_msg=row.name)


@pytest.mark.parametrize(
    ("index", "value", "field"),
    [
        (0, 20240326, "magic"), (1, 3, "version"), (2, 0, "B"), (3, -1, "T"), (2, 3, "file size"),
        (3, 2**31 - 1, "file size"),
    ],
)
def test_debug_header_fields(tmp_path: Path, index: int, value: int, field: str) -> None:
    data = bytearray(debug_bytes(2))
    struct.pack_into("<i", data, 4 * index, value)
    path = tmp_path / "debug.bin"
    path.write_bytes(data)
    with pytest.raises(FileFormatError) as caught:
        checkpoint.read_debug_state(path, rows_for(DIMS), DIMS.vocab_size)
    assert caught.value.field == field


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_debug_file_size_is_exact(tmp_path: Path, version: int, change: int) -> None:
    data = debug_bytes(version)
    path = tmp_path / "debug.bin"
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(FileFormatError, match="file size"):
        checkpoint.read_debug_state(path, rows_for(DIMS), DIMS.vocab_size)


@pytest.mark.parametrize(("field", "offset"), [("x", 1024), ("y", 1024 + 24)])
@pytest.mark.parametrize("token", [-1, 130, 2**31 - 1])
def test_debug_token_ids(tmp_path: Path, field: str, offset: int, token: int) -> None:
    data = bytearray(debug_bytes(2))
    struct.pack_into("<i", data, offset + 4 * 5, token)
    path = tmp_path / "debug.bin"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=f"{field}: token 5 is {token}"):
        checkpoint.read_debug_state(path, rows_for(DIMS), DIMS.vocab_size)


def test_debug_state_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "debug.bin"
    path.write_bytes(debug_bytes(2))
    with pytest.raises(FileFormatError, match="file size"):
        checkpoint.read_debug_state(path, rows_for(Dimensions(6, 130, 3, 2, 8)), 130)


# ---- writing safely --------------------------------------------------------------------------------


def writers(path: Path) -> Iterator[Callable[[], Any]]:
    x, y, logits, loss, gradients = debug_parts()
    yield lambda: checkpoint.write_model(path, 3, DIMS, make_arena())
    yield lambda: checkpoint.write_debug_state(path, 2, x, y, logits, loss, gradients)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    arena = make_arena()

    def interrupted() -> Iterator[tuple[Row, Array]]:
        for index, pair in enumerate(arena):
            if index == 5:
                raise KeyboardInterrupt
            yield pair

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_model(path, 3, DIMS, interrupted())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, failing, fail)
    for write in writers(path):
        with pytest.raises(ConfigError, match="No space left on device") as caught:
            write()
        assert str(path) in str(caught.value)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_file_too_large_for_the_system(tmp_path: Path) -> None:
    """A real failure in the middle of writing: the limit on file sizes."""
    resource = pytest.importorskip("resource")
    program = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(checkpoint.__file__).parent.parent), str(Path(__file__).parent)]!r}
from test_checkpoint import DIMS, make_arena
from llmc import checkpoint
from llmc.errors import ConfigError
arena = make_arena()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
try:
    checkpoint.write_model({str(tmp_path / "model.bin")!r}, 3, DIMS, arena)
except ConfigError as error:
    print(error)
"""
    assert resource is not None
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and "model.bin" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "model.bin", tmp_path / "file" / "model.bin", tmp_path / "folder"):
        for write in writers(path):
            with pytest.raises(ConfigError, match="cannot write"):
                write()
    assert list((tmp_path / "folder").iterdir()) == []
    with pytest.raises(ConfigError, match="cannot write"):
        files.make_folder(tmp_path / "file" / "folder")


def test_a_special_file_is_not_replaced(tmp_path: Path) -> None:
    """Renaming over /dev/null, as root, would take it away from the whole machine.

    A pipe in a folder of the test's own stands for it: a test must not do harm when the code is wrong.
    """
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="not a regular file"):
        checkpoint.write_model(pipe, 3, DIMS, make_arena())
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.bin", tmp_path / "link.bin"
    target.write_bytes(b"old")
    link.symlink_to(target)
    checkpoint.write_model(link, 3, DIMS, make_arena())
    assert link.is_symlink()
    assert target.read_bytes() == model_bytes(3, DIMS, as_dict(make_arena()))


def test_killed_while_writing(tmp_path: Path) -> None:
    """kill -9 at any moment leaves a whole file: the old one or the new one."""
    path = tmp_path / "model.bin"
    program = f"""
import sys
sys.path[:0] = {[str(Path(checkpoint.__file__).parent.parent), str(Path(__file__).parent)]!r}
from test_checkpoint import DIMS, make_arena
from llmc import checkpoint
arenas = make_arena(1), make_arena(2)
checkpoint.write_model({str(path)!r}, 3, DIMS, arenas[0])
print("ready", flush=True)
while True:
    for arena in arenas:
        checkpoint.write_model({str(path)!r}, 3, DIMS, arena)
"""
    wholes = [model_bytes(3, DIMS, as_dict(make_arena(seed))) for seed in (1, 2)]
    for delay in (0.0, 0.013, 0.031):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
            try:
                child.wait(delay)
            except subprocess.TimeoutExpired:
                pass
            child.kill()
        assert path.read_bytes() in wholes
