"""Reading in place, in slices and converted, and the parsing of JSON; writing is tested with what is written, in
test_checkpoint.py and test_safetensors_folder.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc import files
from llmc.arena import Row
from llmc.errors import FileFormatError


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the CPUs of a process cannot be chosen here")
def test_no_more_readers_than_cpus() -> None:
    """CPUs that this process may use, however many the machine has."""
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from llmc import files; print(files.READERS)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


@pytest.mark.parametrize("missing", [1, 500, 3000])
@pytest.mark.parametrize("slice_bytes", [100, 4096, 1 << 20])
def test_a_file_that_ends_while_it_is_read(
    slice_bytes: int, missing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size was right when it was opened; whichever thread finds the end, it is one error that names the tensor."""
    (tmp_path / "file").write_bytes(bytes(4000))
    monkeypatch.setattr(files, "SLICE", slice_bytes)
    with files.File(tmp_path / "file") as file:
        os.truncate(tmp_path / "file", 4000 - missing)
        with pytest.raises(FileFormatError, match="wte.*bytes too early"):
            file.fill("wte", 0, np.empty(1000, np.float32), np.dtype(np.float32))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("into", ["float64", "float32", ml_dtypes.bfloat16])
def test_conversion(into: Any, dtype: Any, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any place in the file, and back."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    values = np.random.default_rng(0).standard_normal((20, 5)).astype(dtype)
    with files.atomic_write(tmp_path / "file") as out:
        out.write(b"abc")
        files.emit(out, values, values.dtype)
        files.emit(out, values.T, values.dtype)
    assert (tmp_path / "file").read_bytes() == b"abc" + values.tobytes() + values.T.tobytes()
    found = np.zeros((20, 5), into)
    with files.File(tmp_path / "file") as file:
        file.fill("x", 3, found, values.dtype)
    np.testing.assert_array_equal(found, values.astype(into))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(FileFormatError, match="file: JSON: (cannot be parsed|is a (list|int), not an object)"):
        files.read_json(str(tmp_path / "file"))


def test_shapes_on_disk() -> None:
    """The vocabulary's padding alone is left out."""
    wte, head, other = (Row(name, (128, 3), layers=layers) for name, layers in (("wte", 0), ("head", 0), ("w", 2)))
    assert [files.disk_shape(row, 100, False) for row in (wte, head, other)] == [(100, 3), (100, 3), (2, 128, 3)]
    assert files.disk_shape(head, 100, True) == (128, 3)
