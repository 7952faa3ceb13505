"""Parameters to and from files: llm.c's model and debug state `.bin`, and Hugging Face GPT-2 folders.

Nothing here knows a model: callers pass rows (`arena.Row`) and arenas made from them.  Everything is
little-endian.  Files are read in place, tensor by tensor, with plain reads (a memory map kills the process
when its file shrinks), and sizes are checked before anything is allocated.  No pickle is ever read.
Files are written beside their destination and renamed over it, so a reader sees the old or the new, whole.

`.bin` layout: 256 int32 of header, then the tensors one after another, stacked over layers.  Model
versions: 1 is fp32 without padding of the vocabulary, 3 is fp32 and 5 bf16, padded to a multiple of 128.
Debug state versions: 1 belongs to model version 1, 2 to the padded ones.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llmc.arena import Array, Row
from llmc.errors import ConfigError, FileFormatError, LlmcError

PathLike = str | os.PathLike[str]

MODEL_MAGIC, DEBUG_MAGIC = 20240326, 20240327
HEADER_INTS, HEADER_BYTES = 256, 1024
MODEL_DTYPES = {1: np.dtype("<f4"), 3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
DEBUG_VERSIONS = {1: 1, 3: 2, 5: 2}  # model version -> the debug state that goes with it
PADDED = "wte"  # the one tensor whose first axis is the vocabulary
CHUNK = 1 << 22  # elements converted at a time
SLICE = 8 << 20  # bytes read at a time by one of so many threads, no more than CPUs that this process may use:
READERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

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


# ---- reading and writing ---------------------------------------------------------------------------


class _File:
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

    def __enter__(self) -> _File:
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
            raise _cannot_write(path, "it exists and is not a regular file")
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
            raise _cannot_write(path, error.strerror or str(error)) from error
        raise


def _cannot_write(path: PathLike, reason: str) -> ConfigError:
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


def _emit(file: BinaryIO, values: Array, dtype: np.dtype[Any]) -> None:
    """Append `values`, converted (bf16: rounded to nearest, ties to even) a chunk at a time."""
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(dtype, copy=False)
        file.write(part.view(np.uint8).data)


def _header(file: _File, magic: int, versions: Iterable[int]) -> list[int]:
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


def _positive(path: str, field: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FileFormatError(path, field, f"must be a positive integer, is {value!r}")
    return value


def _divisible(path: str, field: str, channels: int, heads: int) -> None:
    if channels % heads:
        raise FileFormatError(path, field, f"{channels} is not a multiple of the number of heads, {heads}")


def _check_size(file: _File, expected: int) -> None:
    if file.size != expected:
        what = "truncated" if file.size < expected else "too long"
        raise FileFormatError(file.path, "file size", f"is {file.size} bytes: {what}, expected {expected}")


def _disk_shape(row: Row, vocab_size: int, padded: bool) -> tuple[int, ...]:
    """A row's shape on disk: the vocabulary's padding may be left out there."""
    return row.full_shape if padded or row.name != PADDED else (vocab_size, *row.full_shape[1:])


def _elements(rows: Iterable[Row], vocab_size: int, padded: bool) -> int:
    """Exact in Python integers: a corrupt header must not overflow into a plausible size."""
    return sum(math.prod(_disk_shape(row, vocab_size, padded)) for row in rows)


def _write_tensors(
    file: BinaryIO, tensors: Iterable[tuple[Row, Array]], vocab_size: int, padded: bool, dtype: np.dtype[Any]
) -> None:
    for row, tensor in tensors:
        if row.name != PADDED:
            _emit(file, tensor, dtype)
            continue
        _emit(file, tensor[:vocab_size], dtype)
        if padded:  # whatever the array holds there, the file holds zeros
            _emit(file, np.zeros((row.shape[0] - vocab_size, *row.shape[1:]), np.float32), dtype)


# ---- llm.c's model ---------------------------------------------------------------------------------


def read_model_header(
    path: PathLike, rows_for: Callable[[Dimensions], Iterable[Row]]
) -> tuple[int, Dimensions]:
    """Version and dimensions of a model `.bin`, every field checked, the file's size too.

    `rows_for` gives the table that a model of these dimensions has.  FileFormatError names the field.
    """
    with _File(path) as file:
        version, dimensions = _model_header(file)
        rows = tuple(rows_for(dimensions))
        _check_model_size(file, version, dimensions, rows)
    return version, dimensions


def _model_header(file: _File) -> tuple[int, Dimensions]:
    header = _header(file, MODEL_MAGIC, MODEL_DTYPES)
    names = [field.name for field in fields(Dimensions)]
    values = {name: _positive(file.path, name, header[2 + i]) for i, name in enumerate(names)}
    dimensions = Dimensions(**values)
    _divisible(file.path, "channels", dimensions.channels, dimensions.num_heads)
    padded = dimensions.padded_vocab_size
    if header[1] != 1 and header[7] != padded:
        detail = f"is {header[7]}, but {dimensions.vocab_size} entries are padded to {padded}"
        raise FileFormatError(file.path, "padded_vocab_size", detail)
    return header[1], dimensions


def _check_model_size(file: _File, version: int, dimensions: Dimensions, rows: Sequence[Row]) -> None:
    count = _elements(rows, dimensions.vocab_size, version != 1)
    _check_size(file, HEADER_BYTES + count * MODEL_DTYPES[version].itemsize)


def read_model(path: PathLike, dimensions: Dimensions, tensors: Iterable[tuple[Row, Array]]) -> None:
    """Fill `tensors` (an arena: rows and C-contiguous views, in the file's order) from a model `.bin`.

    fp32 lands where it belongs without a second copy.  Padded rows of the vocabulary become 0 whatever
    the file holds there.  FileFormatError, before anything is written, if the file is not of these
    `dimensions` or not of the tensors' total size.
    """
    pairs = list(tensors)
    with _File(path) as file:
        version, found = _model_header(file)
        if found != dimensions:
            raise FileFormatError(file.path, "header", f"holds {found}, expected {dimensions}")
        _check_model_size(file, version, dimensions, [row for row, _ in pairs])
        dtype, offset, V = MODEL_DTYPES[version], HEADER_BYTES, dimensions.vocab_size
        for row, tensor in pairs:
            wanted = tensor[:V] if row.name == PADDED else tensor
            file.fill(row.name, offset, wanted, dtype)
            if row.name == PADDED:
                tensor[V:] = 0
            offset += math.prod(_disk_shape(row, V, version != 1)) * dtype.itemsize


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
        with _File(self.path) as file:
            count = _elements(self.rows, V, self.version != 1)
            offset = file.size - count * dtype.itemsize
            for row in self.rows:
                gradient = np.zeros(row.full_shape, dtype)
                shape = _disk_shape(row, V, self.version != 1)
                file.fill(f"gradient of {row.name}", offset, gradient[: shape[0]], dtype)
                offset += math.prod(shape) * dtype.itemsize
                yield row, gradient


def read_debug_state(path: PathLike, rows: Iterable[Row], vocab_size: int) -> DebugState:
    """Read a debug state of a model with these rows; header, file size and token ids are checked."""
    table = tuple(rows)
    with _File(path) as file:
        header = _header(file, DEBUG_MAGIC, (1, 2))
        version = header[1]
        B, T = (_positive(file.path, name, header[2 + i]) for i, name in enumerate(("B", "T")))
        count = 2 * B * T + B * T * vocab_size + 1 + _elements(table, vocab_size, version != 1)
        _check_size(file, HEADER_BYTES + 4 * count)
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
        _emit(file, x, ints)
        _emit(file, y, ints)
        _emit(file, logits, floats)
        _emit(file, np.array([loss]), floats)
        _write_tensors(file, gradients, logits.shape[-1], version != 1, floats)


# ---- Hugging Face folders: config.json -------------------------------------------------------------

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FIELD = "llmc_tokenizer"
HF_DIMENSIONS = {
    "n_positions": "max_seq_len",
    "vocab_size": "vocab_size",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "channels",
}
# Fields that change the mathematics, with the values that mean what llmc computes (the first is what it
# writes).  Dropout does not act on inference and llmc trains without; reorder_and_upcast_attn only moves
# a scaling, for half precision.
HF_MATHEMATICS: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
HF_ABSENT = ("quantization_config", "pruned_heads")


def read_folder_config(folder: PathLike) -> tuple[Dimensions, str | None]:
    """Dimensions from a folder's config.json, and the tokenizer named there by llmc (or None).

    A field whose value would make the model compute something else than llmc's GPT-2 is refused by name.
    """
    path = os.path.join(folder, CONFIG_FILE)
    config = _read_json(path)
    if config.get("model_type") != "gpt2":
        raise FileFormatError(path, "model_type", f"is {config.get('model_type')!r}, llmc reads 'gpt2'")
    values = {}
    for theirs, ours in HF_DIMENSIONS.items():
        if theirs not in config:
            raise FileFormatError(path, theirs, "is missing")
        values[ours] = _positive(path, theirs, config[theirs])
    dimensions = Dimensions(**values)
    _divisible(path, "n_embd", dimensions.channels, dimensions.num_heads)
    inner = config.get("n_inner")
    if inner is not None and inner != 4 * dimensions.channels:
        raise FileFormatError(path, "n_inner", f"is {inner!r}, llmc computes 4 n_embd only")
    for field, allowed in HF_MATHEMATICS.items():
        if field in config and config[field] not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise FileFormatError(path, field, f"is {config[field]!r}, llmc computes {known} only")
    for field in HF_ABSENT:
        if config.get(field):
            raise FileFormatError(path, field, "is set, llmc does not read such models")
    tokenizer = config.get(TOKENIZER_FIELD)
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise FileFormatError(path, TOKENIZER_FIELD, f"must be a string, is {tokenizer!r}")
    return dimensions, tokenizer


def _read_json(path: str) -> dict[str, Any]:
    with _File(path) as file:
        return _parse_json(path, "JSON", file.read("JSON", 0, file.size))


def _parse_json(path: str, field: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise FileFormatError(path, field, f"cannot be parsed: {error}") from error
    if not isinstance(value, dict):
        raise FileFormatError(path, field, f"is a {type(value).__name__}, not an object")
    return value


def write_folder_config(
    folder: PathLike, dimensions: Dimensions, *, tokenizer: str | None = None, eot: int | None = None
) -> None:
    """Write config.json as transformers reads it; `tokenizer` names llmc's, `eot` is its end-of-text id."""
    config: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    config |= {theirs: getattr(dimensions, ours) for theirs, ours in HF_DIMENSIONS.items()}
    config |= {"n_inner": None} | {field: values[0] for field, values in HF_MATHEMATICS.items()}
    config |= {"bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32"}
    if tokenizer is not None:
        config[TOKENIZER_FIELD] = tokenizer
    with atomic_write(os.path.join(folder, CONFIG_FILE)) as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")


# ---- Hugging Face folders: safetensors -------------------------------------------------------------

PREFIX = "transformer."
HEAD = "lm_head.weight"
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constant buffers of old files, not parameters
SAFE_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_SAFE_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor of a safetensors file lies, and as what."""

    file: _File
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


def _safetensors(file: _File) -> dict[str, _Tensor]:
    """The tensors of one file.  Layout: u64 length of a JSON header, the header, then the data, no gaps."""
    length = int.from_bytes(file.read("header length", 0, 8), "little") if file.size >= 8 else -1
    if not 2 <= length <= min(MAX_SAFE_HEADER, file.size - 8):
        raise FileFormatError(file.path, "header length", f"is {length} in a file of {file.size} bytes")
    entries = _parse_json(file.path, "header", file.read("header", 8, length))
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
    _check_size(file, end)
    return found


def _open_folder(folder: PathLike, stack: ExitStack) -> dict[str, _Tensor]:
    """Every tensor of a folder, by its name in the file; one file or several with an index."""
    single, index = os.path.join(folder, WEIGHTS_FILE), os.path.join(folder, INDEX_FILE)
    if os.path.lexists(single):
        return _safetensors(stack.enter_context(_File(single)))
    if not os.path.lexists(index):
        pickled = sorted(path.name for path in Path(folder).glob("*.bin"))
        hint = f" ({pickled[0]} is of no use: llmc reads no pickles)" if pickled else ""
        raise FileFormatError(folder, WEIGHTS_FILE, f"is missing{hint}")
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise FileFormatError(index, "weight_map", "is not an object of file names")
    shards: dict[str, dict[str, _Tensor]] = {}
    found = {}
    for name, place in places.items():
        if place not in shards:
            if os.path.basename(place) != place or not place.endswith(".safetensors"):
                raise FileFormatError(index, name, f"{place!r} is not the plain name of a safetensors file")
            shards[place] = _safetensors(stack.enter_context(_File(os.path.join(folder, place))))
        if name not in shards[place]:
            raise FileFormatError(index, name, f"is not in {place}")
        found[name] = shards[place][name]
    for place, tensors in shards.items():
        for name in tensors:
            if places.get(name) != place:
                raise FileFormatError(index, name, f"is in {place}, but the index does not say so")
    return found


def _match(
    folder: PathLike, found: Mapping[str, _Tensor], rows: Iterable[Row], vocab_size: int
) -> dict[str, _Tensor]:
    """Tensors by their name without the prefix, once names, dtypes and shapes are known to be right."""
    tensors: dict[str, _Tensor] = {}
    for name, tensor in found.items():
        plain = name.removeprefix(PREFIX)
        if plain in tensors:
            raise FileFormatError(tensor.file.path, name, f"is there twice, also as {tensors[plain].name}")
        if not MASKS.fullmatch(plain):
            tensors[plain] = tensor
    expected = set()
    for row in rows:
        shape = _disk_shape(row, vocab_size, False)[1 if row.layers else 0 :]
        for name in _hf_names(row):
            plain = name.removeprefix(PREFIX)
            if plain not in tensors:
                raise FileFormatError(folder, name, "is missing")
            tensors[plain].check(shape[::-1] if row.transpose else shape)
            expected.add(plain)
            if row.name == PADDED and HEAD in tensors:
                tensors[HEAD].check(shape)
    for plain, tensor in tensors.items():
        if plain not in expected and plain != HEAD:
            raise FileFormatError(tensor.file.path, tensor.name, "is not a tensor of this model")
    return tensors


def _hf_names(row: Row) -> Iterator[str]:
    """A row's names in a Hugging Face file, one for each layer."""
    for layer in range(max(1, row.layers)):
        yield row.hf_name.format(layer=layer)


def check_folder(folder: PathLike, rows: Iterable[Row], vocab_size: int) -> None:
    """Check that a folder holds these rows: nothing missing, nothing unknown, shapes and dtypes right."""
    with ExitStack() as stack:
        _match(folder, _open_folder(folder, stack), rows, vocab_size)


def read_folder(folder: PathLike, tensors: Iterable[tuple[Row, Array]], vocab_size: int) -> None:
    """Fill `tensors` (an arena) from a folder's safetensors: fp32, fp16 or bf16.

    Names come with or without `transformer.`; attention mask buffers are passed over; a head is accepted
    if it equals wte.  FileFormatError, before anything is written, for what does not fit.
    """
    pairs = list(tensors)
    with ExitStack() as stack:
        found = _match(folder, _open_folder(folder, stack), [row for row, _ in pairs], vocab_size)
        for row, array in pairs:
            layers = array if row.layers else array.reshape((1, *array.shape))
            for name, out in zip(_hf_names(row), layers, strict=True):
                tensor = found[name.removeprefix(PREFIX)]
                if row.transpose:
                    turned = np.empty(tensor.shape, np.float32)
                    tensor.fill(turned)
                    out[...] = turned.T
                elif row.name == PADDED:
                    tensor.fill(out[:vocab_size])
                    out[vocab_size:] = 0
                    if HEAD in found:
                        _check_tied(found[HEAD], out[:vocab_size])
                else:
                    tensor.fill(out)


def _check_tied(head: _Tensor, wte: Array) -> None:
    step = max(1, CHUNK // wte.shape[1])
    part = np.empty((min(step, len(wte)), wte.shape[1]), np.float32)
    for start in range(0, len(wte), step):
        rows = wte[start : start + step]
        head.fill(part[: len(rows)], start)
        if not np.array_equal(part[: len(rows)].astype(rows.dtype, copy=False), rows, equal_nan=True):
            raise FileFormatError(head.file.path, head.name, "differs from wte.weight, to which llmc ties it")


def write_folder_weights(folder: PathLike, tensors: Iterable[tuple[Row, Array]], vocab_size: int) -> None:
    """Write model.safetensors in fp32 under Hugging Face's names, matrices the way Conv1D holds them."""
    pairs = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    offset = 0
    for row, _ in pairs:
        shape = _disk_shape(row, vocab_size, False)[1 if row.layers else 0 :]
        shape = shape[::-1] if row.transpose else shape
        for name in _hf_names(row):
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8
    with atomic_write(os.path.join(folder, WEIGHTS_FILE)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row, array in pairs:
            for out in array if row.layers else array.reshape((1, *array.shape)):
                values = out[:vocab_size] if row.name == PADDED else out
                _emit(file, np.asarray(values).T if row.transpose else values, SAFE_DTYPES["F32"])


def make_folder(folder: PathLike) -> None:
    """Create a folder and its parents unless they are there."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error.strerror or str(error)) from error
