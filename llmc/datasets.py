"""Text on the network or on disk -> token shards.

`prepare_tinyshakespeare`, `prepare_tinystories`, `prepare_text` and `prepare_documents` each fetch or read text,
tokenise it in pieces, and write `NAME_train.bin` and `NAME_val.bin`; neither file appears unless both are complete.
Files of token ids are GPT-2's (uint16) where the vocabulary has at most 65,536 entries, else Llama 3's (uint32).

Nothing is printed.  `progress(done, total)` is called with bytes of the phase under way (total is 0 where
it is unknown), `stage(text)` when a phase begins.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar, Union

import numpy as np

from llmc import documents
from llmc import tokenizer as tokenizers
from llmc.data import Array, ShardWriter
from llmc.download import Progress, Source, fetch, mismatch
from llmc.errors import ConfigError, FileFormatError

PathLike = Union[str, "os.PathLike[str]"]
Stage = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a `prepare_` function wrote."""

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    train_tokens: int
    val_tokens: int
    tokenizer: str
    vocab_size: int


TINYSHAKESPEARE = Source(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1115394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
TINYSHAKESPEARE_VAL_TOKENS = 32768
# Not pinned by a hash: gzip's own checksums and the length guard it.
TINYSTORIES = Source(
    "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStories_all_data.tar.gz"
)

TEXT_CHUNK = 1 << 20  # bytes per read of a text
# A text with no white space at all is cut here, wherever that falls, to keep memory bounded.
LONGEST_PIECE = 1 << 22
LONGEST_STORY = 1 << 24  # characters; no story is a thousandth of it
GROUP = 1 << 16  # characters per task of the tokenising threads


# ---- the datasets -----------------------------------------------------------------------------------


def prepare_tinyshakespeare(
    out_dir: PathLike,
    source: PathLike | None = None,
    *,
    tokenizer: str = "gpt2",
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Prepared:
    """Write tiny_shakespeare_train.bin and tiny_shakespeare_val.bin into `out_dir`.

    `source` is a copy of the text, which is otherwise downloaded to `out_dir`/tiny_shakespeare.txt.  Either
    way it must be the text (size and SHA-256).  End-of-text goes in front and after every blank line; the
    first 32,768 tokens are for validation.  GPT-2's tokenizer gives 32,768 and 305,260 tokens.
    """
    encoder = tokenizers.load(tokenizer)
    folder = _make_folder(out_dir)
    if source is None:
        _tell(stage, f"downloading {TINYSHAKESPEARE.url}")
        path = fetch(TINYSHAKESPEARE, folder / "tiny_shakespeare.txt", progress=progress)
    else:
        path = Path(source)
        problem = mismatch(TINYSHAKESPEARE, path)
        if problem:
            raise FileFormatError(path, *problem)
    _tell(stage, f"tokenising {path}")
    text = _read(path).decode("utf-8")
    parts = text.split("\n\n")
    ids: list[int] = []
    for i, part in enumerate(parts):
        ids.append(encoder.eot)
        ids += encoder.encode(part if i == len(parts) - 1 else part + "\n\n")
    if progress:
        progress(TINYSHAKESPEARE.size, TINYSHAKESPEARE.size)
    with _writers(folder, "tiny_shakespeare", encoder) as (train, val):
        val.write(ids[:TINYSHAKESPEARE_VAL_TOKENS])
        train.write(ids[TINYSHAKESPEARE_VAL_TOKENS:])
    return _prepared(train, val, encoder)


def prepare_tinystories(
    out_dir: PathLike,
    source: PathLike | None = None,
    *,
    tokenizer: str = "gpt2",
    shard_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Prepared:
    """Write TinyStories_train.bin and TinyStories_val.bin into `out_dir`.

    `source` is the archive (.tar.gz or .tar) or a folder with its files, data00.json and so on, each a JSON
    list of objects with a "story"; without it the archive is downloaded to `out_dir`, where it stays.
    data00.json is for validation.  Each story is stripped and led by end-of-text; stories keep the order of
    the archive.  The archive is read as a stream and memory stays bounded.  `threads` tokenise (default: as
    many as this process has CPUs).  `shard_tokens` cuts both outputs into numbered files.

    Raises FileFormatError for an archive that is damaged or lacks what it should have.
    """
    encoder = tokenizers.load(tokenizer)
    folder = _make_folder(out_dir)
    if source is None:
        _tell(stage, f"downloading {TINYSTORIES.url}")
        path = fetch(TINYSTORIES, folder / "TinyStories_all_data.tar.gz", progress=progress)
    else:
        path = Path(source)
    _tell(stage, f"tokenising {path}")
    seen = {"val": 0, "train": 0}
    with _writers(folder, "TinyStories", encoder, shard_tokens) as (train, val):
        for name, file in _json_files(path, progress):
            # Not the first in the archive, which need not be sorted, but the first by name.
            split = "val" if re.fullmatch(r"data0+\.json", name) else "train"
            seen[split] += 1
            writer = val if split == "val" else train
            groups = _groups((story, False) for story in _stories(file, f"{path}: {name}"))
            for ids in _in_order(lambda group: _document_ids(encoder, [story for story, _ in group]), groups, threads):
                writer.write(ids)
        for split, what in (("val", "data00.json"), ("train", "data01.json and so on")):
            if not seen[split]:
                raise FileFormatError(path, what, f"not found; there is nothing for {split}")
    return _prepared(train, val, encoder)


def prepare_text(
    file: PathLike,
    out_dir: PathLike,
    *,
    name: str | None = None,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.1,
    shard_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Prepared:
    """Write NAME_train.bin and NAME_val.bin from any UTF-8 text; NAME is the file's own without its suffix.

    The first `val_fraction` of the bytes, to the end of the line it falls in, is for validation; 0 writes
    no validation file.  Each part is led by end-of-text, and the characters <|endoftext|> in the text stand
    for it too.  The text is read in pieces, cut where the tokenizer always cuts (`Tokenizer.breaks`): the tokens are
    those of the whole text, unless it goes on for four million characters without such a place.

    Raises FileFormatError for text that is not UTF-8 or too short to be divided.
    """
    encoder = tokenizers.load(tokenizer)
    if not 0 <= val_fraction < 1:
        raise ConfigError("val_fraction", f"{val_fraction} is not in [0, 1)")
    path = Path(file)
    with _open(path) as text:
        size = os.fstat(text.fileno()).st_size
        cut = _line_end(text, int(size * val_fraction)) if val_fraction else 0
        if size == 0 or cut == size or (val_fraction and cut == 0):
            raise FileFormatError(path, "size", f"{size} bytes are too little to divide at {val_fraction}")
        folder = _make_folder(out_dir)
        _tell(stage, f"tokenising {path}")
        with _writers(folder, name or path.stem, encoder, shard_tokens, val=bool(cut)) as (train, val):
            for writer, start, stop in ((val, 0, cut), (train, cut, size)):
                if start == stop:
                    continue
                writer.write([encoder.eot])
                pieces = _pieces(text, path, start, stop, size, progress, encoder.breaks)
                for ids in _in_order(lambda group: _text_ids(encoder, group), _groups(_continued(pieces)), threads):
                    writer.write(ids)
    return _prepared(train, val, encoder)


def prepare_documents(
    source: PathLike,
    out_dir: PathLike,
    *,
    field: str = "text",
    split: str | None = None,
    config_name: str | None = None,
    name: str | None = None,
    tokenizer: str = "gpt2",
    val_fraction: float = 0.1,
    max_documents: int | None = None,
    shard_tokens: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    stage: Stage | None = None,
) -> Prepared:
    """Write NAME_train.bin and NAME_val.bin from the documents of `source`; NAME is the last part of its own name.

    `source`, `field`, `split` and `config_name` are those of `documents.read`: JSON lines, parquet, a folder of such
    files, or a dataset of the hub.  Each document is led by end-of-text and otherwise left as it is.  `val_fraction`
    of the documents, evenly spread, are for validation; 0 writes no validation file.  `max_documents` ends it early.
    Documents keep their order; memory stays bounded, but for the longest of them.

    Errors as by `documents.read`, and FileFormatError for too few documents to be divided.
    """
    encoder = tokenizers.load(tokenizer)
    if not 0 <= val_fraction < 1:
        raise ConfigError("val_fraction", f"{val_fraction} is not in [0, 1)")
    if max_documents is not None and max_documents < 1:
        raise ConfigError("max_documents", f"{max_documents} is not positive")
    texts = documents.read(source, field=field, split=split, config_name=config_name, progress=progress)
    marked = _held_out(itertools.islice(texts, max_documents), val_fraction)

    def work(group: Group) -> list[Array]:
        return [_document_ids(encoder, [text for text, held in group if held == val]) for val in (False, True)]

    _tell(stage, f"tokenising {os.fspath(source)}")
    folder = _make_folder(out_dir)
    with _writers(folder, name or documents.short_name(source), encoder, shard_tokens, val_fraction > 0) as writers:
        for parts in _in_order(work, _groups(marked), threads):
            for writer, ids in zip(writers, parts, strict=True):
                writer.write(ids)
        for writer, what in zip(writers, ("training", "validation"), strict=True):
            if not writer.tokens and (what == "training" or val_fraction):
                detail = f"there is none for {what}" + (f", divided at {val_fraction}" if val_fraction else "")
                raise FileFormatError(source, "documents", detail)
    return _prepared(*writers, encoder)


def _held_out(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, bool]]:
    """Each text, and whether it is for validation: of any number of texts the fraction, rounded down."""
    for n, text in enumerate(texts):
        yield text, int((n + 1) * fraction) > int(n * fraction)


@contextlib.contextmanager
def _writers(
    folder: Path, name: str, encoder: tokenizers.Tokenizer, shard_tokens: int | None = None, val: bool = True
) -> Iterator[tuple[ShardWriter, ShardWriter]]:
    """The training and the validation writer; both commit once everything is written, or neither."""
    made = [
        ShardWriter(folder / f"{name}_{split}.bin", vocab_size=encoder.vocab_size, shard_tokens=shard_tokens)
        for split in ("train", "val")
    ]
    try:
        yield made[0], made[1]
        for writer in made if val else made[:1]:
            writer.commit()
    finally:
        for writer in made:
            writer.discard()


def _prepared(train: ShardWriter, val: ShardWriter, encoder: tokenizers.Tokenizer) -> Prepared:
    return Prepared(train.paths, val.paths, train.tokens, val.tokens, encoder.name, encoder.vocab_size)


# ---- reading ---------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise ConfigError("source", f"cannot read {path}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    with _open(path) as file:
        return file.read()


def _line_end(file: BinaryIO, position: int) -> int:
    """The byte after the line that holds byte `position`; within a very long line, after a character."""
    file.seek(position)
    line = file.readline(TEXT_CHUNK)
    if line.endswith(b"\n") or len(line) < TEXT_CHUNK:
        return position + len(line)
    start = next((i for i, byte in enumerate(line[:4]) if byte & 0xC0 != 0x80), 0)
    return position + start


def _pieces(
    file: BinaryIO, path: Path, start: int, stop: int, size: int, progress: Progress | None, breaks: str
) -> Iterator[str]:
    """The text of bytes start to stop, in pieces that end in front of white space, if it is one of `breaks`."""
    file.seek(start)
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, rest = start, ""
    while position < stop:
        data = file.read(min(TEXT_CHUNK, stop - position))
        if not data:
            raise FileFormatError(path, "size", f"the file ends at byte {position} of {size}: it shrank")
        pending = len(decoder.getstate()[0])
        try:
            rest += decoder.decode(data, final=position + len(data) == stop)
        except UnicodeDecodeError as error:
            wrong = position - pending + error.start
            raise FileFormatError(path, f"byte {wrong}", "is not UTF-8 text") from None
        if position == 0 and rest.startswith("\ufeff"):
            rest = rest[1:]  # a byte order mark is no text
        position += len(data)
        cut = _safe_cut(rest, breaks)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
        if progress:
            progress(position, size)
    if rest:
        yield rest


def _safe_cut(text: str, breaks: str) -> int:
    """The last place in `text` between something and white space of `breaks`; 0 where there is none yet."""
    end = len(text) if breaks else 0
    while end > 0:
        space = max(text.rfind(mark, 0, end) for mark in (" ", "\n") if mark in breaks)
        if space <= 0:
            break
        place = space  # to be where the white space begins that ends in `space`
        while place > 0 and text[place - 1].isspace():
            place -= 1
        if place == 0:
            break
        if text[place] in breaks:  # isspace takes more for white space than the tokenizer does
            return place
        end = place
    return len(text) if len(text) >= LONGEST_PIECE else 0


def _json_files(path: Path, progress: Progress | None) -> Iterator[tuple[str, _Readable]]:
    """Name and content of every .json file in a folder (sorted) or an archive (as it lies)."""
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        total, done = sum(file.stat().st_size for file in files), 0
        for name in files:
            with _open(name) as plain:
                yield name.name, _Counted(plain, done, total, progress)
                done += plain.tell()
        return
    with _open(path) as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        counted = _Counted(raw, 0, os.fstat(raw.fileno()).st_size, progress)
        # tarfile can decompress by itself, but does not look at gzip's checksum.
        stream = gzip.GzipFile(fileobj=counted) if zipped else counted
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    base = os.path.basename(member.name)
                    # macOS leaves files named ._something beside the real ones.
                    if not member.isfile() or not base.endswith(".json") or base.startswith("."):
                        continue
                    content = archive.extractfile(member)
                    if content is not None:
                        yield base, content
            while stream.read(TEXT_CHUNK):  # the checksum comes after the archive's padding
                pass
        except _DAMAGE as error:
            raise FileFormatError(path, "archive", f"damaged or no archive: {error}") from error


# What reading a damaged archive can raise; gzip's BadGzipFile is an OSError.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, OSError)


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class _Counted(io.RawIOBase):
    """A file for reading that reports how far it has been read."""

    def __init__(self, file: BinaryIO, done: int, total: int, progress: Progress | None) -> None:
        self._file, self._done, self._total, self._progress = file, done, total, progress

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._done += len(data)
        if self._progress:
            self._progress(self._done, self._total)
        return data


_BLANK = re.compile(r"[ \t\r\n]*")


def _stories(file: _Readable, name: str) -> Iterator[str]:
    """The "story" of every object of a JSON list, stripped; the list is read as a stream."""
    decoder = json.JSONDecoder()
    characters = codecs.getincrementaldecoder("utf-8")()
    text, at, index = "", 0, 0
    state = "start"  # then "first", and "after" and "item" by turns; at last "end"
    while True:
        try:
            data = file.read(TEXT_CHUNK)
            text = text[at:] + characters.decode(data, final=not data)
        except UnicodeDecodeError:
            raise FileFormatError(name, f"item {index}", "is not UTF-8 text") from None
        except _DAMAGE as error:
            raise FileFormatError(name, f"item {index}", f"cannot be read: {error}") from error
        at = 0
        while True:
            blank = _BLANK.match(text, at)
            at = blank.end() if blank else at
            if at == len(text):
                break
            if state == "start" and text[at] == "[":
                state, at = "first", at + 1
            elif state in ("first", "after") and text[at] == "]":
                state, at = "end", at + 1
            elif state == "after" and text[at] == ",":
                state, at = "item", at + 1
            elif state in ("first", "item"):
                try:
                    item, at = decoder.raw_decode(text, at)
                except json.JSONDecodeError:
                    break  # most often: not all of it has been read yet
                if not isinstance(item, dict) or not isinstance(item.get("story"), str):
                    raise FileFormatError(name, f"item {index}", 'is not an object with a "story" text')
                yield item["story"].strip()
                state, index = "after", index + 1
            else:
                raise FileFormatError(name, f"item {index}", "is not part of a JSON list of objects")
        if not data:
            if state != "end":
                raise FileFormatError(name, f"item {index}", "is damaged, or the file ends in it")
            return
        if len(text) - at > LONGEST_STORY:
            raise FileFormatError(name, f"item {index}", "is not JSON")


# ---- tokenising ------------------------------------------------------------------------------------


def _document_ids(encoder: tokenizers.Tokenizer, texts: list[str]) -> Array:
    """Ids of whole texts, each led by end-of-text."""
    cut = [list(_parts(text, encoder.breaks)) for text in texts]
    parts: list[Sequence[int]] = []
    for (_, *others), ids in zip(cut, encoder.encode_batch([first for first, *_ in cut]), strict=True):
        parts += [(encoder.eot,), ids]
        for other in others:  # one by one: a tokenizer may take a hundred bytes for each of the text
            parts += encoder.encode_batch([other], continued=True)
    return _joined(parts)


def _parts(text: str, breaks: str) -> Iterator[str]:
    """A text in parts of about TEXT_CHUNK characters, cut as `_safe_cut` does."""
    start = 0
    while len(text) - start > TEXT_CHUNK:
        window, cut = TEXT_CHUNK, 0
        while not cut and start + window <= len(text):
            cut = _safe_cut(text[start : start + window], breaks)
            window *= 2
        if not cut:
            break
        yield text[start : start + cut]
        start += cut
    yield text[start:]


def _text_ids(encoder: tokenizers.Tokenizer, pieces: list[tuple[str, bool]]) -> Array:
    """Ids of pieces of a text, in which <|endoftext|> stands for end-of-text; each goes on from another or does not."""
    parts: list[Sequence[int]] = []
    for text, continued in pieces:
        first, *others = text.split(tokenizers.END_OF_TEXT)
        parts += encoder.encode_batch([first], continued)
        for ids in encoder.encode_batch(others):
            parts += [(encoder.eot,), ids]
    return _joined(parts)


def _joined(parts: Iterable[Sequence[int]]) -> Array:
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int32)


def _continued(pieces: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether it goes on from the one before."""
    continued = False
    for piece in pieces:
        yield piece, continued
        continued = not piece.endswith(tokenizers.END_OF_TEXT)


Group = list[tuple[str, bool]]  # texts, each with a mark
Made = TypeVar("Made")


def _in_order(work: Callable[[Group], Made], groups: Iterable[Group], threads: int | None) -> Iterator[Made]:
    """What `work` makes of each group, on several threads but in order.

    Only a few groups are under way at once, however many there are.
    """
    if threads is not None and threads < 1:
        raise ConfigError("threads", f"{threads} is not positive")
    threads = threads or _cpus()
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque[Future[Made]] = deque()
        try:
            for group in groups:
                under_way.append(pool.submit(work, group))
                if len(under_way) > 2 * threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


def _groups(texts: Iterable[tuple[str, bool]]) -> Iterator[Group]:
    """Short texts gathered: a task for each would cost a third of the time."""
    group: Group = []
    length = 0
    for text, mark in texts:
        group.append((text, mark))
        length += len(text)
        if length >= GROUP:
            yield group
            group, length = [], 0
    if group:
        yield group


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _make_folder(path: PathLike) -> Path:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ConfigError("out", f"cannot make the folder {os.fspath(path)}: {error.strerror}") from error
    return Path(path)


def _tell(stage: Stage | None, text: str) -> None:
    if stage:
        stage(text)
