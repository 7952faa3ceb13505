"""Parameters to and from llm.c's files: the model and the debug state, `.bin`.

Nothing here knows a model: callers pass rows (`arena.Row`) and arenas made from them.  Sizes are checked before
anything is allocated; `files.py` says how files are read and written.

`.bin` layout: 256 int32 of header, then the tensors one after another, stacked over layers.  Model
versions: 1 is fp32 without padding of the vocabulary, 3 is fp32 and 5 bf16, padded to a multiple of 128.
Debug state versions: 1 belongs to model version 1, 2 to the padded ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llmc.arena import PADDED, Array, Row
from llmc.errors import ConfigError, FileFormatError
from llmc.files import File, PathLike, atomic_write, check_size, disk_shape, divisible, emit, positive

MODEL_MAGIC, DEBUG_MAGIC = 20240326, 20240327
HEADER_INTS, HEADER_BYTES = 256, 1024
MODEL_DTYPES = {1: np.dtype("<f4"), 3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
DEBUG_VERSIONS = {1: 1, 3: 2, 5: 2}  # model version -> the debug state that goes with it

# What other files of the family begin with, for a helpful message.
MAGICS = {
    MODEL_MAGIC: "a model",
    DEBUG_MAGIC: "a debug state",
    20240328: "a tokenizer",
    20240520: "a token shard",
    20240801: "a token shard",
    20240522: "an evaluation set",
    20240527: "an optimizer state",
}


@dataclass(frozen=True)
class Dimensions:
    """The numbers a model file carries."""

    max_seq_len: int
    vocab_size: int
    num_layers: int
    num_heads: int
    channels: int

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128


# ---- what both have --------------------------------------------------------------------------------


def _header(file: File, magic: int, versions: Iterable[int]) -> list[int]:
    """The header's integers, magic and version checked."""
    if file.size < HEADER_BYTES:
        raise FileFormatError(file.path, "header", f"needs {HEADER_BYTES} bytes, the file has {file.size}")
    raw = np.empty(HEADER_INTS, np.dtype("<i4"))
    file.fill("header", 0, raw, raw.dtype)
    header: list[int] = raw.tolist()
    if header[0] != magic:
        kind = f" ({MAGICS[header[0]]})" if header[0] in MAGICS else ""
        raise FileFormatError(file.path, "magic", f"is {header[0]}{kind}, {MAGICS[magic]} has {magic}")
    if header[1] not in versions:
        known = ", ".join(map(str, versions))
        raise FileFormatError(file.path, "version", f"is {header[1]}; llmc reads {known}")
    return header


def _elements(rows: Iterable[Row], vocab_size: int, padded: bool) -> int:
    """Exact in Python integers: a corrupt header must not overflow into a plausible size."""
    return sum(math.prod(disk_shape(row, vocab_size, padded)) for row in rows)


def _write_tensors(
    file: BinaryIO, tensors: Iterable[tuple[Row, Array]], vocab_size: int, padded: bool, dtype: np.dtype[Any]
) -> None:
    for row, tensor in tensors:
        if row.name not in PADDED:
            emit(file, tensor, dtype)
            continue
        emit(file, tensor[:vocab_size], dtype)
        if padded:  # whatever the array holds there, the file holds zeros
            emit(file, np.zeros((row.shape[0] - vocab_size, *row.shape[1:]), np.float32), dtype)


# ---- llm.c's model ---------------------------------------------------------------------------------


def read_model_header(
    path: PathLike, rows_for: Callable[[Dimensions], Iterable[Row]]
) -> tuple[int, Dimensions]:
    """Version and dimensions of a model `.bin`, every field checked, the file's size too.

    `rows_for` gives the table that a model of these dimensions has.  FileFormatError names the field.
    """
    with File(path) as file:
        version, dimensions = _model_header(file)
        rows = tuple(rows_for(dimensions))
        _check_model_size(file, version, dimensions, rows)
    return version, dimensions


def _model_header(file: File) -> tuple[int, Dimensions]:
    header = _header(file, MODEL_MAGIC, MODEL_DTYPES)
    names = [field.name for field in fields(Dimensions)]
    values = {name: positive(file.path, name, header[2 + i]) for i, name in enumerate(names)}
    dimensions = Dimensions(**values)
    divisible(file.path, "channels", dimensions.channels, dimensions.num_heads)
    padded = dimensions.padded_vocab_size
    if header[1] != 1 and header[7] != padded:
        detail = f"is {header[7]}, but {dimensions.vocab_size} entries are padded to {padded}"
        raise FileFormatError(file.path, "padded_vocab_size", detail)
    return header[1], dimensions


def _check_model_size(file: File, version: int, dimensions: Dimensions, rows: Sequence[Row]) -> None:
    count = _elements(rows, dimensions.vocab_size, version != 1)
    check_size(file, HEADER_BYTES + count * MODEL_DTYPES[version].itemsize)


def read_model(path: PathLike, dimensions: Dimensions, tensors: Iterable[tuple[Row, Array]]) -> None:
    """Fill `tensors` (an arena: rows and C-contiguous views, in the file's order) from a model `.bin`.

    fp32 lands where it belongs without a second copy.  Padded rows of the vocabulary become 0 whatever
    the file holds there.  FileFormatError, before anything is written, if the file is not of these
    `dimensions` or not of the tensors' total size.
    """
    pairs = list(tensors)
    with File(path) as file:
        version, found = _model_header(file)
        if found != dimensions:
            raise FileFormatError(file.path, "header", f"holds {found}, expected {dimensions}")
        _check_model_size(file, version, dimensions, [row for row, _ in pairs])
        dtype, offset, V = MODEL_DTYPES[version], HEADER_BYTES, dimensions.vocab_size
        for row, tensor in pairs:
            wanted = tensor[:V] if row.name in PADDED else tensor
            file.fill(row.name, offset, wanted, dtype)
            if row.name in PADDED:
                tensor[V:] = 0
            offset += math.prod(disk_shape(row, V, version != 1)) * dtype.itemsize


def write_model(
    path: PathLike, version: int, dimensions: Dimensions, tensors: Iterable[tuple[Row, Array]]
) -> None:
    """Write a model `.bin` of `version` 1, 3 or 5.  ConfigError for another version."""
    if version not in MODEL_DTYPES:
        raise ConfigError("version", f"{version} is not a model version; choose from 1, 3, 5")
    header = np.zeros(HEADER_INTS, np.dtype("<i4"))
    sizes = [getattr(dimensions, field.name) for field in fields(Dimensions)]
    header[:7] = [MODEL_MAGIC, version, *sizes]
    if version != 1:
        header[7] = dimensions.padded_vocab_size
    with atomic_write(path) as file:
        file.write(header.tobytes())
        _write_tensors(file, tensors, dimensions.vocab_size, version != 1, MODEL_DTYPES[version])


# ---- llm.c's debug state ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DebugState:
    """A batch and what a reference made of it: x, y (B,T) int32; logits (B,T,V) float32; the mean loss.

    Gradients stay in the file, they are as large as the model: `gradients()` reads one at a time.
    """

    path: str
    version: int
    x: Array
    y: Array
    logits: Array
    loss: float
    rows: tuple[Row, ...]

    def gradients(self) -> Iterator[tuple[Row, Array]]:
        """Each row with its float32 gradient in the row's full shape (version 1: padding 0), in order."""
        V = self.logits.shape[-1]
        dtype = np.dtype("<f4")
        with File(self.path) as file:
            count = _elements(self.rows, V, self.version != 1)
            offset = file.size - count * dtype.itemsize
            for row in self.rows:
                gradient = np.zeros(row.full_shape, dtype)
                shape = disk_shape(row, V, self.version != 1)
                file.fill(f"gradient of {row.name}", offset, gradient[: shape[0]], dtype)
                offset += math.prod(shape) * dtype.itemsize
                yield row, gradient


def read_debug_state(path: PathLike, rows: Iterable[Row], vocab_size: int) -> DebugState:
    """Read a debug state of a model with these rows; header, file size and token ids are checked."""
    table = tuple(rows)
    with File(path) as file:
        header = _header(file, DEBUG_MAGIC, (1, 2))
        version = header[1]
        B, T = (positive(file.path, name, header[2 + i]) for i, name in enumerate(("B", "T")))
        count = 2 * B * T + B * T * vocab_size + 1 + _elements(table, vocab_size, version != 1)
        check_size(file, HEADER_BYTES + 4 * count)
        offset = HEADER_BYTES
        read: dict[str, Array] = {}
        ints, floats = np.dtype("<i4"), np.dtype("<f4")
        shapes = {"x": (B, T), "y": (B, T), "logits": (B, T, vocab_size), "loss": (1,)}
        for name, shape in shapes.items():
            dtype = ints if name in ("x", "y") else floats
            read[name] = np.empty(shape, dtype)
            file.fill(name, offset, read[name], dtype)
            offset += read[name].nbytes
        for name in ("x", "y"):
            bad = np.flatnonzero((read[name] < 0) | (read[name] >= vocab_size))
            if bad.size:
                raise FileFormatError(
                    file.path, name,
                    f"token {bad[0]} is {read[name].flat[bad[0]]}, the vocabulary has {vocab_size} entries",
                )
        return DebugState(
            file.path, version, read["x"], read["y"], read["logits"], float(read["loss"][0]), table
        )


def write_debug_state(
    path: PathLike, version: int, x: Array, y: Array, logits: Array, loss: float,
    gradients: Iterable[tuple[Row, Array]],
) -> None:
    """Write a debug state, `version` 1 (unpadded) or 2: x, y (B,T), logits (B,T,V), gradients in order."""
    if version not in (1, 2):
        raise ConfigError("version", f"{version} is not a debug state version; choose from 1, 2")
    header = np.zeros(HEADER_INTS, np.dtype("<i4"))
    header[:4] = [DEBUG_MAGIC, version, *x.shape]
    ints, floats = np.dtype("<i4"), np.dtype("<f4")
    with atomic_write(path) as file:
        file.write(header.tobytes())
        emit(file, x, ints)
        emit(file, y, ints)
        emit(file, logits, floats)
        emit(file, np.array([loss]), floats)
        _write_tensors(file, gradients, logits.shape[-1], version != 1, floats)
