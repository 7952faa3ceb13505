"""Files read in place and written whole, for what keeps tensors in them.

A file is read tensor by tensor with plain reads (a memory map kills the process when its file shrinks), and written
beside its destination and renamed over it, so that a reader sees the old or the new, whole.  Everything is
little-endian.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from llmc.arena import PADDED, Array, Row
from llmc.errors import ConfigError, FileFormatError, LlmcError

PathLike = str | os.PathLike[str]

CHUNK = 1 << 22  # elements converted at a time
SLICE = 8 << 20  # bytes read at a time by one of so many threads, no more than CPUs that this process may use:
READERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


class File:
    """Positioned reads of one regular file.  Every failure is a FileFormatError naming the field."""

    def __init__(self, path: PathLike) -> None:
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise FileFormatError(self.path, "file", f"cannot be opened: {error.strerror}") from error
        status = os.fstat(self._file.fileno())
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise FileFormatError(self.path, "file", "is not a regular file")
        self.size = status.st_size

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, field: str, offset: int, nbytes: int) -> bytes:
        out = np.empty(nbytes, np.uint8)
        self.fill(field, offset, out, out.dtype)
        return out.tobytes()

    def fill(self, field: str, offset: int, out: Array, dtype: np.dtype[Any]) -> None:
        """out (C-contiguous) = the values of `dtype` at byte `offset`; no copy where the dtypes agree and out is
        memory of this process."""
        flat = out.reshape(-1)
        if isinstance(out, np.ndarray) and out.dtype == dtype:
            self._into(field, offset, flat)
            return
        chunk = np.empty(min(flat.size, CHUNK), dtype)
        for start in range(0, flat.size, CHUNK):
            part = chunk[: min(CHUNK, flat.size - start)]
            self._into(field, offset + start * dtype.itemsize, part)
            flat[start : start + part.size] = part

    def _into(self, field: str, offset: int, flat: Array) -> None:
        """Large tensors in slices, by several threads: one cannot copy as fast as memory can take it."""
        target = flat.view(np.uint8).data
        if len(target) <= SLICE or not hasattr(os, "preadv"):
            self._slice(field, offset, target)
            return
        with ThreadPoolExecutor(min(READERS, len(target) // SLICE + 1)) as pool:
            starts = range(0, len(target), SLICE)
            for _ in pool.map(lambda start: self._slice(field, offset + start, target[start : start + SLICE]), starts):
                pass

    def _slice(self, field: str, offset: int, target: memoryview) -> None:
        done = 0
        try:
            while done < len(target):
                count = self._read_at(offset + done, target[done:])
                if not count:
                    missing = len(target) - done
                    raise FileFormatError(self.path, field, f"the file ends {missing} bytes too early")
                done += count
        except OSError as error:
            raise FileFormatError(self.path, field, f"cannot be read: {error.strerror}") from error

    def _read_at(self, offset: int, target: memoryview) -> int:
        """Bytes read, at most 2 GiB at a time."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [target], offset)
        self._file.seek(offset)
        return self._file.readinto(target)


@contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    It is written beside `path`, synced, renamed over it, and the folder is synced: a crash at any moment
    leaves the old file or the new one.  ConfigError says why it cannot be written.
    """
    target = os.path.realpath(path)  # a link stays a link, its target is replaced
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        if os.path.lexists(target) and not os.path.isfile(target):
            raise cannot_write(path, "it exists and is not a regular file")
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(folder)
    except BaseException as error:
        try:
            os.unlink(temporary)
        except OSError:
            pass
        if isinstance(error, OSError) and not isinstance(error, LlmcError):
            raise cannot_write(path, error.strerror or str(error)) from error
        raise


def cannot_write(path: PathLike, reason: str) -> ConfigError:
    return ConfigError("out", f"cannot write {os.fspath(path)}: {reason}")


def _sync_folder(folder: str) -> None:
    """Make a rename durable, where the system can (a folder cannot be opened on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def emit(file: BinaryIO, values: Array, dtype: np.dtype[Any]) -> None:
    """Append `values`, converted (bf16: rounded to nearest, ties to even) a chunk at a time."""
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(dtype, copy=False)
        file.write(part.view(np.uint8).data)


def make_folder(folder: PathLike) -> None:
    """Create a folder and its parents unless they are there."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error.strerror or str(error)) from error


def read_json(path: str) -> dict[str, Any]:
    with File(path) as file:
        return parse_json(path, "JSON", file.read("JSON", 0, file.size))


def parse_json(path: str, field: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileFormatError(path, field, f"cannot be parsed: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(path, field, f"is a {type(value).__name__}, not an object")
    return value


def positive(path: str, field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 53:  # more is no size of anything
        raise FileFormatError(path, field, f"must be a positive integer, is {value!r}")
    return value


def divisible(path: str, field: str, channels: int, heads: int) -> None:
    if channels % heads:
        raise FileFormatError(path, field, f"{channels} is not a multiple of the number of heads, {heads}")


def check_size(file: File, expected: int) -> None:
    if file.size != expected:
        what = "truncated" if file.size < expected else "too long"
        raise FileFormatError(file.path, "file size", f"is {file.size} bytes: {what}, expected {expected}")


def disk_shape(row: Row, vocab_size: int, padded: bool) -> tuple[int, ...]:
    """A row's shape on disk: the vocabulary's padding may be left out there."""
    return row.full_shape if padded or row.name not in PADDED else (vocab_size, *row.full_shape[1:])
