"""Text to token ids and back.

Five tokenizers with one set of names, those of `Tokenizer`: `ByteTokenizer` (needs nothing), `TiktokenTokenizer`
(GPT-2's byte pair encoding, through tiktoken), `HuggingFaceTokenizer` (a tokenizer.json, through the package
tokenizers), `SentencePieceTokenizer` (a tokenizer.model, through sentencepiece) and `TokenizerFile` (llm.c's
`gpt2_tokenizer.bin`, which decodes but cannot encode).  `load(name_or_path)` picks one.

Ids outside the vocabulary raise `ConfigError`; files that are not what they should be raise
`FileFormatError` naming the field.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from llmc import tokenizer_config
from llmc._tokenizer.builtin import GPT2_EOT, GPT2_VOCAB_SIZE, ByteTokenizer, TiktokenTokenizer
from llmc._tokenizer.huggingface import HuggingFaceTokenizer
from llmc._tokenizer.ids import END_OF_TEXT, Special
from llmc._tokenizer.llmc_bin import TokenizerFile, read_tokenizer_file, write_tokenizer_file
from llmc._tokenizer.sentencepiece_model import SentencePieceTokenizer
from llmc.errors import ConfigError, FileFormatError

__all__ = [
    "END_OF_TEXT",
    "GPT2_EOT",
    "GPT2_VOCAB_SIZE",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Special",
    "TiktokenTokenizer",
    "Tokenizer",
    "TokenizerFile",
    "load",
    "read_tokenizer_file",
    "write_tokenizer_file",
]

LLMC_FILE = "tokenizer.bin"  # llm.c's, as llmc calls it in a model's folder
LLMC_FIELD = "llmc_tokenizer"  # of config.json: the name or file of a model that llmc saved


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
        """The id that stands in front of every text of a dataset: bos where the tokenizer puts one before a text,
        else the first of eos.  ConfigError where the vocabulary has neither."""

    @property
    def special(self) -> Special:
        """The ids that begin and end texts."""

    @property
    def add_bos(self) -> bool:
        """Whether a prompt of ordinary text is led by `special.bos`; `encode` itself never adds it."""

    @property
    def breaks(self) -> str:
        """The white space in front of which a text may be cut, where no white space stands before it, so that the
        tokens of the parts (`encode_batch`, continued) are those of the whole; "" if nowhere."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: names of special tokens in it are text like any other."""

    def encode_special(self, text: str) -> list[int]:
        """Ids of text in which the names of special tokens stand for them, as a chat template writes them."""

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        """As `encode`, of each text, without keeping other threads waiting.  `continued`: every text goes on where
        another ended, and what `encode` puts in front of a text (sentencepiece's space) is left out."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.  What `encode` puts in front is taken away."""

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        """The bytes of `ids`, which are the bytes of each id in a row: a text may be decoded id by id.  `start`: `ids`
        begin a text, and what `encode` puts in front is taken away, as `decode` does."""

    def files(self) -> list[Path]:
        """The files to copy into a folder that is to have this tokenizer; none for those that come with llmc."""


def load(name_or_path: str | os.PathLike[str], *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer "bytes" or "gpt2", that of a folder, or that of a file.

    Of a folder it is tokenizer.json if there, else tokenizer.model, else what llmc left there (a name in config.json,
    or tokenizer.bin).  A file in .json is taken for a tokenizer.json, one in .model for sentencepiece's, any
    other for llm.c's .bin.  `vocab_size` is the model's: FileFormatError for a tokenizer that has more ids.
    ConfigError for what is none of these, MissingDependencyError without the package that a file takes.
    """
    made = _load(os.fspath(name_or_path))
    if vocab_size is not None and made.vocab_size > vocab_size:
        detail = f"{made.vocab_size} ids are more than the {vocab_size} that the model knows"
        if not made.files():
            raise ConfigError("tokenizer", f"{made.name}: {detail}")
        raise FileFormatError(made.files()[0], "vocabulary", detail)
    return made


def _load(name: str) -> Tokenizer:
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    if name == TiktokenTokenizer.name:
        return TiktokenTokenizer()
    path = Path(name)
    if name and path.is_dir():
        return _of_folder(path)
    if not os.path.isfile(name):
        raise ConfigError("tokenizer", f"{name!r} is neither bytes, gpt2 nor a tokenizer file or folder")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    return TokenizerFile(name)


def _of_folder(folder: Path) -> Tokenizer:
    if (folder / tokenizer_config.TOKENIZER_JSON).exists():
        return HuggingFaceTokenizer(folder / tokenizer_config.TOKENIZER_JSON)
    if (folder / tokenizer_config.TOKENIZER_MODEL).exists():
        return SentencePieceTokenizer(folder / tokenizer_config.TOKENIZER_MODEL)
    config = folder / tokenizer_config.MODEL_CONFIG
    name = tokenizer_config.read_json(config).get(LLMC_FIELD)
    if name in (ByteTokenizer.name, TiktokenTokenizer.name):
        return _load(name)
    if name is not None:
        # A plain name alone: a model's folder does not speak of files elsewhere.
        if not isinstance(name, str) or os.path.basename(name) != name or not (folder / name).is_file():
            raise FileFormatError(config, LLMC_FIELD, f"{name!r} is neither bytes, gpt2 nor a file in this folder")
        return _load(str(folder / name))
    if (folder / LLMC_FILE).exists():
        return TokenizerFile(folder / LLMC_FILE)
    what = f"{tokenizer_config.TOKENIZER_JSON}, {tokenizer_config.TOKENIZER_MODEL} nor {LLMC_FILE}"
    raise ConfigError("tokenizer", f"{folder} has neither {what}")
