"""Sentencepiece's tokenizer.model, through the package sentencepiece.

Special tokens that a model was given later (added_tokens.json, tokenizer_config.json) are not in the file: text is
divided at their names first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llmc import tokenizer_config
from llmc._tokenizer.ids import Special, checked, require_unicode, safe_breaks
from llmc.errors import ConfigError, FileFormatError, MissingDependencyError

SPACE = "\u2581"  # a space within a piece
# normalizer_spec { add_dummy_prefix: false } of sentencepiece's ModelProto, fields 3 and 3: messages of protocol
# buffers that follow one another are merged, and the last value counts.
NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer:
    """The tokenizer of a tokenizer.model.

    Control pieces (<s>, </s>) and the unknown piece decode to their names.  Pieces that the model's makers defined
    as "user defined" count in ordinary text, too: the file has no way to switch them off.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        whole = self.path.name == tokenizer_config.TOKENIZER_MODEL
        self.name = str(self.path.parent if whole else self.path)
        self._model, self._joined = self._read()
        size = int(self._model.vocab_size())
        self._prefixed = str(self._model.id_to_piece(self._model.encode("a")[0])).startswith(SPACE)
        self._config = tokenizer_config.read(self.path.parent)
        added = self._config.added
        self.vocab_size = max(size, *(i + 1 for i in added)) if added else size
        self._tokens = [self._bytes(i) for i in range(size)] + [b""] * (self.vocab_size - size)
        for i in range(size, self.vocab_size):
            if i in added:
                self._tokens[i] = added[i].content.encode()
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        ordinary = {token.content: i for i, token in added.items() if i >= size and not token.special}
        self._later, self._named = ordinary, control | {token.content: i for i, token in added.items()}
        self.special, self.add_bos = self._roles()
        self.breaks = safe_breaks(self._tokens)

    @property
    def eot(self) -> int:
        if self.add_bos and self.special.bos is not None:
            return self.special.bos
        if not self.special.eos:
            detail = "names no token that ends a text: eos_token of a tokenizer_config.json beside it"
            raise ConfigError("tokenizer", f"{self.name} {detail}")
        return self.special.eos[0]

    def encode(self, text: str) -> list[int]:
        return self._divided(text, self._later)

    def encode_special(self, text: str) -> list[int]:
        return self._divided(text, self._named)

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        if self._later:
            return [self._divided(text, self._later, continued) for text in texts]
        for text in texts:
            require_unicode(text)
        return (self._joined if continued else self._model).encode(list(texts), num_threads=1)

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        found = b"".join(self._tokens[i] for i in checked(ids, self.vocab_size, self.name))
        return found.removeprefix(b" ") if start and self._prefixed else found

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids, start=True).decode("utf-8", "replace")

    def files(self) -> list[Path]:
        companions = self._config.companions()
        return [self.path, *(path for path in companions if path != self.path)]

    def _read(self) -> tuple[Any, Any]:
        """The package's object, and another that puts no space in front of a text."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ConfigError("tokenizer", f"cannot read {self.path}: {error.strerror}") from error
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingDependencyError(f"{self.path} needs sentencepiece: pip install sentencepiece") from error
        try:
            made = [sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in (data, data + NO_PREFIX)]
        except (RuntimeError, ValueError) as error:
            raise FileFormatError(self.path, "model", f"is not sentencepiece's: {error}") from None
        return made[0], made[1]

    def _bytes(self, i: int) -> bytes:
        piece = str(self._model.id_to_piece(i))
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()

    def _roles(self) -> tuple[Special, bool]:
        """Which ids begin and end texts, and whether the first is put in front of a prompt."""
        config = self._config
        known = {self._model.id_to_piece(i): i for i in range(self._model.vocab_size())} | self._named
        found = {}
        for role in ("bos_token", "eos_token"):
            name = config.names.get(role)
            if name is not None and name not in known:
                raise FileFormatError(config.where(role), role, f"{name!r} is not in the vocabulary")
            found[role] = None if name is None else known[name]
        # The model has -1 for what it lacks.
        starts = (found["bos_token"], self._model.bos_id(), config.bos)
        bos = next((int(i) for i in starts if i is not None and 0 <= i < self.vocab_size), None)
        own = self._model.eos_id() if found["eos_token"] is None else found["eos_token"]
        ends = dict.fromkeys(int(i) for i in (own, *config.eos) if 0 <= i < self.vocab_size)
        return Special(bos, tuple(ends)), bos is not None and config.add_bos is not False

    def _divided(self, text: str, names: dict[str, int], continued: bool = False) -> list[int]:
        """Ids of text in which `names` stand for their ids, the longest first."""
        require_unicode(text)
        if not names:
            return (self._joined if continued else self._model).encode(text)
        pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
        ids: list[int] = []
        for n, part in enumerate(re.split(f"({pattern})", text)):
            if n % 2:
                ids.append(names[part])
            elif part:
                # Llama 2 was trained with a space after its special tokens, others were not.
                bare = continued if n == 0 else not self._config.legacy
                ids += (self._joined if bare else self._model).encode(part)
        return ids
