"""Token shards: files of token ids, written piece by piece and read batch by batch.

Three formats, told apart by their first int32 (256 of them make a header, unused ones 0):

    gpt2     header 20240520, 1, token count; then uint16 each
    llama3   header 20240801, 7, token count; then uint32 each
    plain    no header at all; int32 each, as the first llm.c read them

All are little-endian, and a file's size must be what its header promises.  Files are read with
positioned reads, never mapped: a mapped file that shrinks kills the process, while a short read is an
error like any other.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Union

import numpy as np

from llmc.errors import ConfigError, FileFormatError

HEADER_BYTES = 1024
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
# A file without a known header is taken for `plain` when its first id is below this: more than any
# vocabulary has, less than any magic number and less than any four characters of text.
PLAIN_LIMIT = 1 << 20

Array = np.ndarray[Any, Any]
PathLike = Union[str, "os.PathLike[str]"]


class ShardFormat(NamedTuple):
    """One of the three formats; `magic` and `version` are 0 where there is no header."""

    name: str
    magic: int
    version: int
    dtype: str

    @property
    def header_bytes(self) -> int:
        return HEADER_BYTES if self.magic else 0


GPT2 = ShardFormat("gpt2", 20240520, 1, "<u2")
LLAMA3 = ShardFormat("llama3", 20240801, 7, "<u4")
PLAIN = ShardFormat("plain", 0, 0, "<i4")
SHARD_FORMATS = {f.name: f for f in (GPT2, LLAMA3, PLAIN)}

# Other files of llm.c's, which end up here by a slip of the hand.
_OTHER_MAGICS = {
    20240326: "a model",
    20240327: "a debug state",
    20240328: "a tokenizer",
    20240522: "a multiple-choice evaluation",
    20240527: "an optimizer state",
}


# ---- writing ---------------------------------------------------------------------------------------


class ShardWriter:
    """Writes token shards in pieces, holding only one piece in memory.

        with ShardWriter("out/train.bin", vocab_size=50257) as writer:
            for ids in pieces:
                writer.write(ids)

    Everything goes to temporary files beside `path`, which take their real names together when the block
    ends well and vanish when it does not.  `shard_tokens` cuts the stream into files of that many tokens,
    `train_000000.bin` and so on, instead of the one `train.bin`.  `format` is "gpt2", "llama3" or
    "plain"; by default gpt2 for vocabularies of up to 65,536 entries, else llama3.

    Attributes: `tokens`, the number written so far; `paths`, the files' names once the block has ended.
    Raises ConfigError for an id outside [0, vocab_size), for more tokens than one file's header can count,
    and where nothing can be written.
    """

    def __init__(
        self, path: PathLike, *, vocab_size: int, shard_tokens: int | None = None, format: str | None = None
    ) -> None:
        if vocab_size < 1:
            raise ConfigError("vocab_size", f"{vocab_size} is not positive")
        if shard_tokens is not None and not 1 <= shard_tokens <= MAX_SHARD_TOKENS:
            raise ConfigError("shard_tokens", f"{shard_tokens} is not in 1 to {MAX_SHARD_TOKENS}")
        if format is not None and format not in SHARD_FORMATS:
            raise ConfigError("format", f"{format!r}; choose from {', '.join(SHARD_FORMATS)}")
        self.path = Path(path)
        self.tokens = 0
        self.paths: tuple[Path, ...] = ()
        self._format = SHARD_FORMATS[format] if format else GPT2 if vocab_size <= 65536 else LLAMA3
        limit = 65536 if self._format is GPT2 else PLAIN_LIMIT if self._format is PLAIN else 2**31
        if vocab_size > limit:
            raise ConfigError("vocab_size", f"{vocab_size}; format {self._format.name} holds {limit} at most")
        self._vocab_size = vocab_size
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._in_file = 0
        self._temporaries: list[Path] = []
        if shard_tokens is not None:
            numbered = glob.escape(os.path.join(self.path.parent, self.path.stem))
            old = sorted(glob.glob(f"{numbered}_{'[0-9]' * 6}{glob.escape(self.path.suffix)}"))
            if old:  # a longer earlier run would leave its last shards among the new ones
                raise ConfigError("out", f"{old[0]} is there already; remove the earlier shards first")

    def write(self, ids: Sequence[int] | Array) -> None:
        """Append token ids: any sequence or array of integers."""
        values = np.asarray(ids).reshape(-1)
        if not values.size:
            return
        if values.dtype.kind not in "iu":
            raise ConfigError("token ids", f"{values.dtype} is no integer type")
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise ConfigError("token ids", f"{wrong} is not in a vocabulary of {self._vocab_size}")
        room = self._shard_tokens or (MAX_SHARD_TOKENS if self._format.magic else 2**62)
        while values.size:
            if self._in_file == room:
                if self._shard_tokens is None:
                    detail = f"{self.path} would pass {MAX_SHARD_TOKENS} tokens; cut it into shards"
                    raise ConfigError("shard_tokens", detail)
                self._finish_file()
            part = values[: room - self._in_file]
            try:
                file = self._file or self._start_file()
                file.write(part.astype(self._format.dtype).data)
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            self._in_file += part.size
            self.tokens += part.size
            values = values[part.size :]

    def _start_file(self) -> BinaryIO:
        name = f".{self.path.name}.{os.getpid()}.{len(self._temporaries)}.tmp"
        temporary = self.path.with_name(name)
        # Left open between calls: `_finish_file` and `discard` are what close it.
        self._file = open(temporary, "wb", buffering=1 << 20)
        self._temporaries.append(temporary)
        self._in_file = 0
        self._file.write(bytes(self._format.header_bytes))
        return self._file

    def _finish_file(self) -> None:
        file = self._file
        if file is None:
            return
        try:
            if self._format.magic:
                file.seek(0)
                file.write(struct.pack("<3i", self._format.magic, self._format.version, self._in_file))
            file.flush()
            os.fsync(file.fileno())
            file.close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._file = None
        self._in_file = 0

    def commit(self) -> None:
        """Give the finished files their names.  The `with` block does this."""
        if self._file is None and not self._temporaries:
            raise ConfigError("token ids", f"there is nothing to write to {self.path}")
        self._finish_file()
        if self._shard_tokens is None:
            paths = [self.path]
        else:
            stem, suffix = self.path.stem, self.path.suffix
            paths = [self.path.with_name(f"{stem}_{i:06d}{suffix}") for i in range(len(self._temporaries))]
        try:
            for temporary, path in zip(self._temporaries, paths, strict=True):
                os.replace(temporary, path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # a new name is on disk only when its folder is
            finally:
                os.close(folder)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._temporaries = []
        self.paths = tuple(paths)

    def discard(self) -> None:
        """Remove what was written so far.  The `with` block does this on an error."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        for temporary in self._temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._temporaries = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def write_shard(
    path: PathLike, ids: Sequence[int] | Array, *, vocab_size: int, format: str | None = None
) -> None:
    """Write one shard whole.  Arguments and errors as for `ShardWriter`."""
    with ShardWriter(path, vocab_size=vocab_size, format=format) as writer:
        writer.write(ids)


def _cannot_write(path: PathLike, error: OSError) -> ConfigError:
    return ConfigError("out", f"cannot write {os.fspath(path)}: {error.strerror or error}")


# ---- reading ---------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """What a shard's header says: where it is, its format, and how many tokens it holds."""

    path: str
    format: ShardFormat
    tokens: int


def read_header(path: PathLike) -> Shard:
    """Find out a shard's format and check that its size fits; FileFormatError, ConfigError."""
    descriptor, shard = _open(path)
    os.close(descriptor)
    return shard


def _open(path: PathLike) -> tuple[int, Shard]:
    name = os.fspath(path)
    try:
        # Asked before opening: opening a pipe would wait for somebody to write to it.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise ConfigError("data", f"{name} is not a regular file")
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise ConfigError("data", f"cannot read {name}: {error.strerror}") from error
    try:
        return descriptor, _parse_header(descriptor, name)
    except BaseException:
        os.close(descriptor)
        raise


def _parse_header(descriptor: int, name: str) -> Shard:
    size = os.fstat(descriptor).st_size
    if size < 4:
        raise FileFormatError(name, "size", f"{size} bytes hold not even one token")
    head = _pread(descriptor, name, min(size, HEADER_BYTES), 0)
    magic = struct.unpack_from("<i", head)[0]
    for known in (GPT2, LLAMA3):
        if magic == known.magic:
            break
    else:
        if 0 <= magic < PLAIN_LIMIT:
            if size % 4:
                raise FileFormatError(
                    name, "size", f"{size} bytes: a file without a header holds whole int32, 4 bytes each"
                )
            return Shard(name, PLAIN, size // 4)
        what = _OTHER_MAGICS.get(magic)
        hint = f" (that is {what} file)" if what else "; text becomes tokens with `llmc data text`"
        raise FileFormatError(name, "magic", f"{magic} does not begin a token file{hint}")
    if size < HEADER_BYTES:
        raise FileFormatError(name, "header", f"truncated: {size} of {HEADER_BYTES} bytes")
    version, tokens = struct.unpack_from("<2i", head, 4)
    if version != known.version:
        raise FileFormatError(name, "version", f"{version}; format {known.name} has {known.version}")
    if tokens < 1:
        raise FileFormatError(name, "token count", f"{tokens} is not positive")
    expected = HEADER_BYTES + tokens * np.dtype(known.dtype).itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise FileFormatError(name, "size", f"{state}: {size} bytes, but {tokens} tokens make {expected}")
    return Shard(name, known, tokens)


def _pread(descriptor: int, name: str, count: int, offset: int) -> bytes:
    """Exactly `count` bytes from byte `offset` on."""
    parts = []
    try:
        while count:
            part = os.pread(descriptor, count, offset)
            if not part:
                raise FileFormatError(
                    name, "size", f"the file ends before byte {offset + count}: it shrank while open"
                )
            parts.append(part)
            count -= len(part)
            offset += len(part)
    except OSError as error:
        raise FileFormatError(name, f"byte {offset}", f"cannot be read: {error.strerror}") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


class Shards:
    """Batches of B x T tokens from one shard or many.

    `patterns` is a path, a glob pattern, or several of them; what a pattern matches is taken in sorted
    order.  A batch is B*T tokens in a row and the one after them; the next begins B*T tokens further on.
    Where a shard has no room for another batch the next shard goes on, and after the last one the first.
    Shards without room for any batch are passed over.

    With `shuffle_seed`, the order of the shards, and of the batches within each, is a permutation that
    depends on the seed and the epoch (how often everything was seen) and on nothing else.

    Attributes: `num_tokens` in all shards; `num_batches` in one epoch.  Ids must lie in
    [0, vocab_size), which is checked as they are read; without a `vocab_size` in [0, 2^31).

    Raises ConfigError for a pattern that matches nothing or too little data, FileFormatError for a file
    that is not what it should be, also when that happens later, in `next`.
    """

    def __init__(
        self,
        patterns: PathLike | Iterable[PathLike],
        B: int,
        T: int,
        *,
        shuffle_seed: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (("batch size", B), ("sequence length", T)):
            if value < 1:
                raise ConfigError(name, f"{value} is not positive")
        self.B, self.T = B, T
        self.shuffle_seed = shuffle_seed
        self.vocab_size = vocab_size
        self._descriptor, self._opened = -1, -1
        self._order: list[int] = []
        self.shards = tuple(read_header(path) for path in find_shards(patterns))
        self.num_tokens = sum(shard.tokens for shard in self.shards)
        self._batches = [(shard.tokens - 1) // (B * T) for shard in self.shards]
        self.num_batches = sum(self._batches)
        if not self.num_batches:
            longest = max(self.shards, key=lambda shard: shard.tokens)
            raise ConfigError(
                "data",
                f"{longest.path} has {longest.tokens} tokens, but one batch of {B} x {T} takes {B * T + 1}; "
                "choose a smaller batch size or sequence length",
            )
        self.reset()

    def reset(self) -> None:
        """Begin again at the first batch of the first epoch."""
        self._epoch = 0
        self._begin_epoch()

    def next(self) -> tuple[Array, Array]:
        """The next batch: tokens and targets, both int32 (B,T), C-contiguous.

        targets[b,t] is the token after tokens[b,t].  The arrays are views of one buffer that is new in
        every call, so a batch may be kept, and is not to be written to.
        """
        if self._batch == self._batches[self._order[self._shard]]:
            if self._shard + 1 < len(self._order):
                self._begin_shard(self._shard + 1)
            else:
                self._epoch += 1
                self._begin_epoch()
        index = self._order[self._shard]
        span = self.B * self.T
        window = self._batch if self._windows is None else int(self._windows[self._batch])
        tokens = self._read(index, window * span, span + 1)
        self._batch += 1
        return tokens[:-1].reshape(self.B, self.T), tokens[1:].reshape(self.B, self.T)

    @staticmethod
    def nbytes(patterns: PathLike | Iterable[PathLike], B: int, T: int, *, shuffle: bool = False) -> tuple[int, int]:
        """Bytes of one batch, and of the order of the longest shard's windows, from the headers alone."""
        longest = max(read_header(path).tokens for path in find_shards(patterns))
        return 4 * (B * T + 1), 8 * ((longest - 1) // (B * T)) if shuffle else 0

    def state(self) -> dict[str, int | None]:
        """Where the reader stands, in numbers that JSON can hold; `restore` goes back there."""
        return {
            "epoch": self._epoch,
            "shard": self._shard,  # its place in the epoch's order
            "batch": self._batch,
            **self._identity(),
        }

    def restore(self, state: dict[str, int | None]) -> None:
        """Go to where `state()` was taken; ConfigError where shape, order or data are not the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError("data state", f"{name} was {state.get(name)} when saved and is {value} now")
        epoch, shard, batch = (state.get(name) for name in ("epoch", "shard", "batch"))
        if not isinstance(epoch, int) or epoch < 0:
            raise ConfigError("data state", f"epoch {epoch} is no whole number")
        if not isinstance(shard, int) or not 0 <= shard < len(self._order):
            raise ConfigError("data state", f"shard {shard} is not among {len(self._order)}")
        order = self._epoch_order(epoch)
        limit = self._batches[order[shard]]
        if not isinstance(batch, int) or not 0 <= batch <= limit:
            raise ConfigError("data state", f"batch {batch} is not in 0 to {limit}")
        self._epoch, self._order = epoch, order
        self._begin_shard(shard)
        self._batch = batch

    def close(self) -> None:
        """Close the file that is open.  Reading on opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._opened = -1, -1

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def _identity(self) -> dict[str, int | None]:
        """What must be the same for a state to mean the same place."""
        return {
            "batch_size": self.B,
            "sequence_length": self.T,
            "shuffle_seed": self.shuffle_seed,
            "num_shards": len(self.shards),
            "num_tokens": self.num_tokens,
        }

    def _epoch_order(self, epoch: int) -> list[int]:
        """The shards that hold a batch, in the order of that epoch."""
        order = [index for index, batches in enumerate(self._batches) if batches]
        if self.shuffle_seed is None:
            return order
        return [order[i] for i in permutation(len(order), self.shuffle_seed, epoch)]

    def _begin_epoch(self) -> None:
        self._order = self._epoch_order(self._epoch)
        self._begin_shard(0)

    def _begin_shard(self, place: int) -> None:
        self._shard, self._batch = place, 0
        self._windows: Array | None = None
        if self.shuffle_seed is not None:
            index = self._order[place]
            self._windows = permutation(self._batches[index], self.shuffle_seed, self._epoch, index)

    def _read(self, index: int, start: int, count: int) -> Array:
        """Tokens start to start + count of a shard, as a new int32 vector."""
        shard = self.shards[index]
        if self._descriptor < 0 or self._opened != index:
            self.close()
            self._descriptor, now = _open(shard.path)
            self._opened = index
            if now != shard:
                self.close()
                raise FileFormatError(shard.path, "header", "the file was replaced by another while in use")
        width = np.dtype(shard.format.dtype).itemsize
        offset = shard.format.header_bytes + start * width
        raw = np.frombuffer(_pread(self._descriptor, shard.path, count * width, offset), shard.format.dtype)
        ids = raw.view("<u4") if width == 4 else raw  # a negative id becomes a large one
        limit = min(2**31, 2**31 if self.vocab_size is None else self.vocab_size)
        if int(ids.max()) >= limit:
            wrong = int(np.argmax(ids >= limit))
            raise FileFormatError(
                shard.path, f"token {start + wrong}", f"id {raw[wrong]} is not in a vocabulary of {limit}"
            )
        return raw.astype(np.int32)


def find_shards(patterns: PathLike | Iterable[PathLike]) -> list[str]:
    """The files that paths and glob patterns stand for; ConfigError for one that matches nothing."""
    if isinstance(patterns, str | os.PathLike):
        patterns = [patterns]
    found: list[str] = []
    for pattern in patterns:
        name = os.path.expanduser(os.fspath(pattern))
        # A file whose own name has brackets in it is that file.
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise ConfigError("data", f"no file matches {name!r}")
        found += matches
    if not found:
        raise ConfigError("data", "no file was named")
    return found


def random_batch(vocab_size: int, B: int, T: int, seed: int, step: int) -> tuple[Array, Array]:
    """Tokens and targets (B, T) int32 that depend on the arguments alone: the same for all programs of a comparison."""
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
    ids = random.integers(vocab_size, size=(B, T + 1)).astype(np.int32)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def permutation(n: int, *seed: int) -> Array:
    """A pseudo-random order of 0 .. n-1 that depends on `seed` alone, not on NumPy's version.

    The numbers are sorted by a 64-bit hash: the finaliser of splitmix64 (Steele, Lea & Flood 2014) over a
    counter that starts at a digest of the seed.
    """
    digest = hashlib.blake2b(repr([int(s) for s in seed]).encode(), digest_size=8).digest()
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64 throughout
    z += np.uint64(int.from_bytes(digest, "little"))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")
