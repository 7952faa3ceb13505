"""llm.c's tokenizer .bin: the bytes of every token, enough to decode, not to encode."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from llmc._tokenizer.builtin import GPT2_EOT, GPT2_VOCAB_SIZE
from llmc._tokenizer.ids import Special, checked
from llmc.errors import ConfigError, FileFormatError
from llmc.files import atomic_write

TOKENIZER_MAGIC = 20240328
HEADER_BYTES = 1024  # 256 int32


class TokenizerFile:
    """A tokenizer .bin of llm.c (version 1 or 2), for decoding.

    Version 1 has no field for the end-of-text id and was written for GPT-2 alone, so it must hold 50,257
    tokens and the id is 50256.
    """

    add_bos = False
    breaks = ""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        self._tokens, self.eot = read_tokenizer_file(path)
        self.vocab_size = len(self._tokens)
        self.special = Special(self.eot, (self.eot,))

    def encode(self, text: str) -> list[int]:
        """Always `ConfigError`: the file does not say how text is cut into tokens."""
        raise ConfigError(
            "tokenizer", f"{self.name} can decode but not encode text; choose the tokenizer gpt2 or bytes"
        )

    encode_special = encode

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        return b"".join(self._tokens[i] for i in checked(ids, self.vocab_size, self.name))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self) -> list[Path]:
        return [Path(self.name)]

    def tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return list(self._tokens)


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
    with atomic_write(path) as file:
        file.write(body)
