"""The two tokenizers that come with llmc: bytes, which needs nothing, and GPT-2's, through tiktoken."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmc._tokenizer.ids import END_OF_TEXT, Special, checked
from llmc.errors import ConfigError, DownloadError, MissingDependencyError

GPT2_EOT = 50256
GPT2_VOCAB_SIZE = 50257


class ByteTokenizer:
    """The 256 byte values of UTF-8 and one id, 256, that stands between texts.

    That id has no bytes: it decodes to nothing.  Where special tokens count, <|endoftext|> is its name.
    """

    name = "bytes"
    vocab_size = 257
    eot = 256
    special = Special(256, (256,))
    add_bos = True  # the training windows of llmc's own models begin so
    breaks = " \n\r\t"

    def encode(self, text: str) -> list[int]:
        try:
            # surrogateescape: an undecodable byte of a command line comes back as that byte.
            return list(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError as error:
            raise ConfigError("text", f"character {error.start} is a lone surrogate") from None

    def encode_special(self, text: str) -> list[int]:
        first, *others = text.split(END_OF_TEXT)
        ids = self.encode(first)
        for part in others:
            ids += [self.eot, *self.encode(part)]
        return ids

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        return bytes(i for i in checked(ids, self.vocab_size, self.name) if i != self.eot)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self) -> list[Path]:
        return []


class TiktokenTokenizer:
    """GPT-2's byte pair encoding, through tiktoken.

    tiktoken keeps the vocabulary in the folder TIKTOKEN_CACHE_DIR, else in a temporary folder, and
    downloads it (about 1.5 MB) where it is not there yet.  `DownloadError` where that fails.
    """

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    eot = GPT2_EOT
    special = Special(GPT2_EOT, (GPT2_EOT,))
    add_bos = False
    # GPT-2's pattern never joins what stands before white space with what follows it.
    breaks = " \n\r\t"

    def __init__(self) -> None:
        self._encoding = _gpt2_encoding()

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_special(self, text: str) -> list[int]:
        return self._encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        return self._encoding.decode_bytes(checked(ids, self.vocab_size, self.name))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def files(self) -> list[Path]:
        return []

    def tokens(self) -> list[bytes]:
        """The bytes of every token, as `write_tokenizer_file` takes them."""
        return [self._encoding.decode_single_token_bytes(i) for i in range(self.vocab_size)]


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
