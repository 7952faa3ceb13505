"""Text to token ids and back.

Three tokenizers with one set of names: `ByteTokenizer` (needs nothing), `TiktokenTokenizer` (GPT-2's byte
pair encoding, through tiktoken) and `TokenizerFile` (llm.c's `gpt2_tokenizer.bin`, which holds the bytes
of every token: enough to decode, not to encode).  `load(name_or_path)` picks one.

Ids outside the vocabulary raise `ConfigError`; files that are not what they should be raise
`FileFormatError` naming the field.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmc.errors import ConfigError, DownloadError, FileFormatError, MissingDependencyError

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for the token between two texts

TOKENIZER_MAGIC = 20240328
HEADER_BYTES = 1024  # 256 int32
GPT2_EOT = 50256
GPT2_VOCAB_SIZE = 50257


class Tokenizer(Protocol):
    """What every tokenizer has."""

    @property
    def name(self) -> str:
        """What `load` takes to make this tokenizer again."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; valid ones are 0 to vocab_size - 1."""

    @property
    def eot(self) -> int:
        """The id that stands between two texts."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: names of special tokens in it are text like any other."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`."""


class ByteTokenizer:
    """The 256 byte values of UTF-8 and one id, 256, that stands between texts.

    That id has no bytes: it decodes to nothing.
    """

    name = "bytes"
    vocab_size = 257
    eot = 256

    def encode(self, text: str) -> list[int]:
        try:
            # surrogateescape: an undecodable byte of a command line comes back as that byte.
            return list(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise ConfigError("text", f"character {error.start} is a lone surrogate") from None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        _check_range(ids, self.vocab_size, self.name)
        return bytes(i for i in ids if i != self.eot)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")


class TiktokenTokenizer:
    """GPT-2's byte pair encoding, through tiktoken.

    tiktoken keeps the vocabulary in the folder TIKTOKEN_CACHE_DIR, else in a temporary folder, and
    downloads it (about 1.5 MB) where it is not there yet.  `DownloadError` where that fails.
    """

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    eot = GPT2_EOT

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        _check_range(ids, self.vocab_size, self.name)
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def tokens(self) -> list[bytes]:
        """The bytes of every token, as `write_tokenizer_file` takes them."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]


class TokenizerFile:
    """A tokenizer .bin of llm.c (version 1 or 2), for decoding.

    Version 1 has no field for the end-of-text id and was written for GPT-2 alone, so it must hold 50,257
    tokens and the id is 50256.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._tokens, self.eot = read_tokenizer_file(path)
        self.vocab_size = len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Always `ConfigError`: the file does not say how text is cut into tokens."""
        raise ConfigError(
            "tokenizer", f"{self.name} can decode but not encode text; choose the tokenizer gpt2 or bytes"
        )

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        _check_range(ids, self.vocab_size, self.name)
        return b"".join(self._tokens[i] for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return list(self._tokens)


def load(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", or the one in a tokenizer .bin file; ConfigError for anything else."""
    name = os.fspath(name_or_path)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == TiktokenTokenizer.name:
        return TiktokenTokenizer()
    if not os.path.isfile(name):
        raise ConfigError("tokenizer", f"{name!r} is neither bytes, gpt2 nor a tokenizer file")
    return TokenizerFile(name)


def read_tokenizer_file(path: str | os.PathLike[str]) -> tuple[list[bytes], int]:
    """Every token's bytes, and the end-of-text id, of a tokenizer .bin.

    The file: 256 int32 (20240328, version, number of tokens, end-of-text id in version 2), then for every
    token its length in one byte and that many bytes.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError("tokenizer", f"cannot read {os.fspath(path)}: {error.strerror}") from error
    if len(data) < HEADER_BYTES:
        raise FileFormatError(path, "header", f"truncated: {len(data)} of {HEADER_BYTES} bytes")
    magic, version, count, eot = struct.unpack_from("<4i", data)
    if magic != TOKENIZER_MAGIC:
        raise FileFormatError(path, "magic", f"{magic} is not {TOKENIZER_MAGIC}, a tokenizer's")
    if version not in (1, 2):
        raise FileFormatError(path, "version", f"{version} is neither 1 nor 2")
    # A token takes two bytes at least, so this also bounds the work below.
    if not 0 < count <= (len(data) - HEADER_BYTES) // 2:
        raise FileFormatError(path, "token count", f"{count} does not fit in a file of {len(data)} bytes")
    if version == 1:
        if count != GPT2_VOCAB_SIZE:
            raise FileFormatError(path, "token count", f"{count}: version 1 holds {GPT2_VOCAB_SIZE} tokens")
        eot = GPT2_EOT
    if not 0 <= eot < count:
        raise FileFormatError(path, "end-of-text id", f"{eot} is not among {count} tokens")
    tokens = []
    offset = HEADER_BYTES
    for i in range(count):
        length = data[offset] if offset < len(data) else -1
        if length == 0:
            raise FileFormatError(path, f"token {i}", "length 0")
        if length < 0 or offset + 1 + length > len(data):
            raise FileFormatError(path, f"token {i}", f"truncated: the file ends at byte {len(data)}")
        tokens.append(data[offset + 1 : offset + 1 + length])
        offset += 1 + length
    if offset != len(data):
        raise FileFormatError(path, "size", f"{len(data) - offset} bytes follow the last token")
    return tokens, eot


def write_tokenizer_file(
    path: str | os.PathLike[str], tokens: Sequence[bytes], eot: int, *, version: int = 2
) -> None:
    """Write llm.c's tokenizer .bin: the bytes of every token (1 to 255 of them) in order of id.

    `write_tokenizer_file(path, TiktokenTokenizer().tokens(), 50256)` gives llm.c's own file.  Version 1 is
    for GPT-2's vocabulary alone.
    """
    if version not in (1, 2):
        raise ConfigError("version", f"{version}: a tokenizer file has version 1 or 2")
    if version == 1 and (len(tokens), eot) != (GPT2_VOCAB_SIZE, GPT2_EOT):
        raise ConfigError("version", "1 is for GPT-2's vocabulary alone; write version 2")
    if not 0 <= eot < len(tokens):
        raise ConfigError("eot", f"{eot} is not among {len(tokens)} tokens")
    body = bytearray(struct.pack("<4i", TOKENIZER_MAGIC, version, len(tokens), eot if version == 2 else 0))
    body += bytes(HEADER_BYTES - len(body))
    for i, token in enumerate(tokens):
        if not 1 <= len(token) <= 255:
            raise ConfigError("tokens", f"token {i} has {len(token)} bytes; a tokenizer file holds 1 to 255")
        body.append(len(token))
        body += token
    _replace(Path(path), bytes(body))


def _replace(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all."""
    path = Path(os.path.realpath(path))  # a link stays a link, its target is replaced
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name is on disk only when its folder is
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError("out", f"cannot write {path}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _check_range(ids: list[int], vocab_size: int, name: str) -> None:
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ConfigError(
                "token ids", f"id {i} at position {position} is not one of tokenizer {name}'s {vocab_size}"
            )


def _gpt2_encoding() -> Any:
    try:
        import tiktoken
    except ImportError as error:
        raise MissingDependencyError("the gpt2 tokenizer needs tiktoken: pip install tiktoken") from error
    try:
        return tiktoken.get_encoding("gpt2")
    except ImportError as error:
        raise MissingDependencyError(f"the gpt2 tokenizer needs {error.name} to download: {error}") from error
    except (OSError, ValueError) as error:
        # requests' errors are OSErrors; tiktoken reports a vocabulary of the wrong hash as ValueError.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DownloadError(
            "the gpt2 tokenizer's vocabulary is not on this machine and could not be downloaded: connect to "
            "the network, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken has kept it "
            f"({type(error).__name__}: {reason})"
        ) from error
