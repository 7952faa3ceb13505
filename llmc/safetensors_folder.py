"""Parameters to and from the safetensors of a Hugging Face folder: one file, or several with an index.

Nothing here knows a model: callers pass rows (`arena.Row`) with the names that such a file has for them, and arenas
made from them.  Headers, names, shapes and dtypes are checked before anything is written; `files.py` says how files
are read and written.  No pickle is ever read.

Layout of a file: u64 length of a JSON header, the header, then the data without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llmc import files
from llmc.arena import PADDED, Array, Row
from llmc.errors import ConfigError, FileFormatError
from llmc.files import File, PathLike, atomic_write, check_size, disk_shape, emit, parse_json, read_json
from llmc.tokenizer_config import COMPANIONS

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PREFIX = re.compile(r"^(transformer|model)\.")  # of all tensors but the head; files of a model without one lack it
HEAD = "lm_head.weight"
# Constant buffers of old files, not parameters; names without the prefix.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias|(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
SAFE_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
WRITTEN_AS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_SHARD_BYTES = 5_000_000_000


# ---- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor of a safetensors file lies, and as what."""

    file: File
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    def check(self, shape: tuple[int, ...]) -> None:
        if self.dtype not in SAFE_DTYPES:
            known = ", ".join(SAFE_DTYPES)
            raise FileFormatError(self.file.path, self.name, f"has dtype {self.dtype}; llmc reads {known}")
        if self.shape != shape:
            raise FileFormatError(self.file.path, self.name, f"has shape {self.shape}, expected {shape}")
        expected = math.prod(shape) * SAFE_DTYPES[self.dtype].itemsize
        if self.nbytes != expected:
            raise FileFormatError(self.file.path, self.name, f"has {self.nbytes} bytes, expected {expected}")

    def fill(self, out: Array, start: int = 0) -> None:
        """out = this tensor from its row `start` on."""
        dtype = SAFE_DTYPES[self.dtype]
        offset = self.begin + start * math.prod(self.shape[1:]) * dtype.itemsize
        self.file.fill(self.name, offset, out, dtype)


def _tensors(file: File) -> dict[str, _Tensor]:
    """The tensors of one file."""
    length = int.from_bytes(file.read("header length", 0, 8), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER, file.size - 8):
        raise FileFormatError(file.path, "header length", f"is {length} in a file of {file.size} bytes")
    entries = parse_json(file.path, "header", file.read("header", 8, length))
    entries.pop("__metadata__", None)
    found: dict[str, _Tensor] = {}
    for name, entry in entries.items():
        try:
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if not whole or not isinstance(entry["dtype"], str) or end < begin:
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise FileFormatError(file.path, name, "has a malformed header entry") from None
        found[name] = _Tensor(file, name, entry["dtype"], shape, 8 + length + begin, end - begin)
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin != end:
            raise FileFormatError(file.path, tensor.name, f"begins at byte {tensor.begin}, expected {end}")
        end += tensor.nbytes
    check_size(file, end)
    return found


def _open(folder: PathLike, stack: ExitStack) -> dict[str, _Tensor]:
    """Every tensor of a folder, by its name in the file; one file or several with an index."""
    single, index = os.path.join(folder, WEIGHTS_FILE), os.path.join(folder, INDEX_FILE)
    if os.path.lexists(single):
        return _tensors(stack.enter_context(File(single)))
    if not os.path.lexists(index):
        pickled = sorted(path.name for path in Path(folder).glob("*.bin"))
        hint = f" ({pickled[0]} is of no use: llmc reads no pickles)" if pickled else ""
        raise FileFormatError(folder, WEIGHTS_FILE, f"is missing{hint}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FileFormatError(index, "weight_map", "is not an object of file names")
    shards: dict[str, dict[str, _Tensor]] = {}
    found = {}
    for name, place in places.items():
        if place not in shards:
            if os.path.basename(place) != place or not place.endswith(".safetensors"):
                raise FileFormatError(index, name, f"{place!r} is not the plain name of a safetensors file")
            shards[place] = _tensors(stack.enter_context(File(os.path.join(folder, place))))
        if name not in shards[place]:
            raise FileFormatError(index, name, f"is not in {place}")
        found[name] = shards[place][name]
    for place, tensors in shards.items():
        for name in tensors:
            if places.get(name) != place:
                raise FileFormatError(index, name, f"is in {place}, but the index does not say so")
    return found


class _Part(NamedTuple):
    """One tensor of a file: its name there, its shape there, and which rows of which layer of ours it is."""

    name: str
    shape: tuple[int, ...]
    layer: int
    start: int
    stop: int

    def of(self, row: Row, array: Array) -> Array:
        """The view of this part in the row's array."""
        view: Array = array[self.layer] if row.layers else array
        return view[self.start : self.stop]


def _parts(row: Row, vocab_size: int) -> Iterator[_Part]:
    """The tensors that a file has for a row, layer by layer."""
    first, *rest = disk_shape(row, vocab_size, False)[1 if row.layers else 0 :]
    named = ((row.hf_name, first),) if isinstance(row.hf_name, str) else row.hf_name
    for layer in range(max(1, row.layers)):
        start = 0
        for name, count in named:
            shape = (count, *rest)
            theirs = shape[::-1] if row.transpose else shape
            yield _Part(name.format(layer=layer), theirs, layer, start, start + count)
            start += count


def _plain(name: str) -> str:
    return PREFIX.sub("", name)


def _match(
    folder: PathLike, found: Mapping[str, _Tensor], rows: Iterable[Row], vocab_size: int
) -> dict[str, _Tensor]:
    """Tensors by their name without the prefix, once names, dtypes and shapes are known to be right."""
    tensors: dict[str, _Tensor] = {}
    for name, tensor in found.items():
        plain = _plain(name)
        if plain in tensors:
            raise FileFormatError(tensor.file.path, name, f"is there twice, also as {tensors[plain].name}")
        if not BUFFERS.fullmatch(plain):
            tensors[plain] = tensor
    expected = set()
    embedding: tuple[int, ...] = ()
    for row in rows:
        for part in _parts(row, vocab_size):
            plain = _plain(part.name)
            if plain not in tensors:
                raise FileFormatError(folder, part.name, "is missing")
            tensors[plain].check(part.shape)
            expected.add(plain)
            if row.name == "wte":
                embedding = part.shape
    for plain, tensor in tensors.items():
        if plain == HEAD and plain not in expected:
            tensor.check(embedding)
        elif plain not in expected:
            raise FileFormatError(tensor.file.path, tensor.name, "is not a tensor of this model")
    return tensors


def check(folder: PathLike, rows: Iterable[Row], vocab_size: int) -> None:
    """Check that a folder holds these rows: nothing missing, nothing unknown, shapes and dtypes right."""
    with ExitStack() as stack:
        _match(folder, _open(folder, stack), rows, vocab_size)


def read(folder: PathLike, tensors: Iterable[tuple[Row, Array]], vocab_size: int) -> None:
    """Fill `tensors` (an arena) from a folder's safetensors: F32, F16 or BF16, as they are where the arena has the same
    type.

    Names come with or without `transformer.` or `model.`; buffers of old files are passed over; a head is accepted
    beside rows without one if it equals wte.  FileFormatError, before anything is written, for what does not fit;
    a head that differs is found while reading.
    """
    pairs = list(tensors)
    with ExitStack() as stack:
        found = _match(folder, _open(folder, stack), [row for row, _ in pairs], vocab_size)
        tied = not any(row.name == "head" for row, _ in pairs)
        if tied and HEAD in found:
            _check_tied(found[HEAD], next(found[_plain(str(row.hf_name))] for row, _ in pairs if row.name == "wte"))
        for row, array in pairs:
            for part in _parts(row, vocab_size):
                tensor, out = found[_plain(part.name)], part.of(row, array)
                if row.transpose:
                    turned = np.empty(tensor.shape, SAFE_DTYPES[tensor.dtype])
                    tensor.fill(turned)
                    out[...] = turned.T
                else:
                    tensor.fill(out)
            if row.name in PADDED:
                array[vocab_size:] = 0


def _check_tied(head: _Tensor, wte: _Tensor) -> None:
    """Raise unless two tensors of one shape hold the same numbers."""
    count, width = wte.shape
    step = max(1, files.CHUNK // width)
    ours, theirs = (np.empty((min(step, count), width), SAFE_DTYPES[tensor.dtype]) for tensor in (wte, head))
    for start in range(0, count, step):
        rows = min(step, count - start)
        wte.fill(ours[:rows], start)
        head.fill(theirs[:rows], start)
        if not np.array_equal(
            ours[:rows].astype(np.float32, copy=False), theirs[:rows].astype(np.float32, copy=False), equal_nan=True
        ):
            raise FileFormatError(head.file.path, head.name, f"differs from {wte.name}, to which llmc ties it")


# ---- writing ---------------------------------------------------------------------------------------


def write(
    folder: PathLike, tensors: Iterable[tuple[Row, Array]], vocab_size: int, *, dtype: str = "fp32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write safetensors under Hugging Face's names as "fp32", "bf16" or "fp16": model.safetensors, or if their data
    exceeds `max_shard_bytes` files of at most that (a tensor is never divided) and model.safetensors.index.json.

    All of it is on the disk before the first file is renamed to its name; what an earlier save with other files has
    left is removed after the last.  A crash between renames over shards of the same names leaves no index, so that old
    and new are never read together.  ConfigError for another dtype, for a finite value that fp16 cannot hold
    (nothing is written) and where the folder cannot be written.
    """
    if dtype not in WRITTEN_AS:
        raise ConfigError("dtype", f"{dtype!r} is unknown; choose from {', '.join(WRITTEN_AS)}")
    if max_shard_bytes < 1:
        raise ConfigError("max_shard_bytes", f"must be at least 1, got {max_shard_bytes}")
    parts = [(row, array, part) for row, array in tensors for part in _parts(row, vocab_size)]
    if dtype == "fp16":
        for row, array, part in parts:
            _check_fp16(part, part.of(row, array))
    itemsize = SAFE_DTYPES[WRITTEN_AS[dtype]].itemsize
    shards = list(_shards(parts, itemsize, max_shard_bytes))
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [WEIGHTS_FILE]
    index = Path(folder, INDEX_FILE)
    with ExitStack() as stack:  # which renames in the opposite order: the index last
        if count > 1:
            places = {part.name: name for name, shard in zip(names, shards, strict=True) for _, _, part in shard}
            size = sum(itemsize * math.prod(part.shape) for _, _, part in parts)
            text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2, sort_keys=True)
            stack.enter_context(atomic_write(index)).write(text.encode() + b"\n")
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(atomic_write(os.path.join(folder, name)))
            file.write(_header(shard, WRITTEN_AS[dtype]))
            for row, array, part in shard:
                values = np.asarray(part.of(row, array))
                emit(file, values.T if row.transpose else values, SAFE_DTYPES[WRITTEN_AS[dtype]])
            file.flush()
            os.fsync(file.fileno())
        if count > 1 and any(os.path.lexists(os.path.join(folder, name)) for name in names):
            index.unlink(missing_ok=True)
    _remove_others(Path(folder), {*names, INDEX_FILE} if count > 1 else set(names))


_Placed = tuple[Row, Array, _Part]


def _shards(parts: Iterable[_Placed], itemsize: int, limit: int) -> Iterator[list[_Placed]]:
    """Parts in order, as many together as stay within `limit` bytes; one alone may exceed it."""
    shard: list[_Placed] = []
    size = 0
    for placed in parts:
        nbytes = itemsize * math.prod(placed[2].shape)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(placed)
        size += nbytes
    yield shard


def _header(shard: Sequence[_Placed], dtype: str) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for _, _, part in shard:
        end = offset + SAFE_DTYPES[dtype].itemsize * math.prod(part.shape)
        header[part.name] = {"dtype": dtype, "shape": part.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _check_fp16(part: _Part, array: Array) -> None:
    values = np.asarray(array).reshape(-1)
    for start in range(0, values.size, files.CHUNK):
        chunk = values[start : start + files.CHUNK].astype(np.float32, copy=False)
        with np.errstate(over="ignore"):
            lost = np.isinf(chunk.astype(np.float16)) & np.isfinite(chunk)
        if lost.any():
            raise ConfigError("dtype", f"fp16 cannot hold {part.name}: it has the value {chunk[lost][0]:g}")


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Remove weights of an earlier save; an index before the files it names."""
    stale = [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]
    for path in (folder / WEIGHTS_FILE, folder / INDEX_FILE, *stale):
        if path.name not in kept:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise files.cannot_write(path, error.strerror or str(error)) from error


def read_file(path: PathLike, tensors: Iterable[tuple[Row, Array]]) -> None:
    """Fill `tensors` (an arena) from one file that holds them and nothing else; errors as those of `read`."""
    pairs = list(tensors)
    with File(path) as file:
        found = _match(path, _tensors(file), [row for row, _ in pairs], 0)
        for row, array in pairs:
            for part in _parts(row, 0):
                found[_plain(part.name)].fill(part.of(row, array))


def write_file(path: PathLike, tensors: Iterable[tuple[Row, Array]]) -> None:
    """Write `tensors` to one file in fp32, replaced whole."""
    parts = [(row, array, part) for row, array in tensors for part in _parts(row, 0)]
    with atomic_write(path) as file:
        file.write(_header(parts, "F32"))
        for row, array, part in parts:
            emit(file, np.asarray(part.of(row, array)), SAFE_DTYPES["F32"])


def copy_text_files(source: PathLike, destination: PathLike) -> list[str]:
    """Copy what belongs to a model's text, not its weights, from one folder to another: the tokenizer's files, the
    chat template, generation_config.json.  Names of what was there, each replaced whole."""
    copied = []
    for name in COMPANIONS:
        path = os.path.join(source, name)
        if not os.path.isfile(path):
            continue
        copied.append(name)
        target = os.path.join(destination, name)
        if os.path.exists(target) and os.path.samefile(path, target):
            continue
        try:
            with open(path, "rb") as old, atomic_write(target) as new:
                shutil.copyfileobj(old, new)
        except OSError as error:
            if isinstance(error, FileFormatError | ConfigError):
                raise
            raise FileFormatError(path, "file", f"cannot be read: {error.strerror}") from error
    return copied
