"""Hugging Face's tokenizer.json, through the package tokenizers.

The package cuts text into tokens.  Back to text it goes here, token by token: the file's decoder says what bytes a
token stands for, so that a text streamed id by id is the text decoded whole.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from llmc import tokenizer_config
from llmc._tokenizer.ids import END_OF_TEXT, Special, checked, require_unicode, safe_breaks
from llmc.errors import ConfigError, FileFormatError, MissingDependencyError

PIECES = 4096  # ids whose bytes are remembered at most


class HuggingFaceTokenizer:
    """The tokenizer of a tokenizer.json.

    The special tokens' roles come from the files beside it, and from what the file itself puts in front of a text.
    Raises FileFormatError for a file that the package refuses or whose decoder is not one of `_DECODERS`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        whole = self.path.name == tokenizer_config.TOKENIZER_JSON
        self.name = str(self.path.parent if whole else self.path)
        self._text, spec = _read(self.path)
        self._ordinary = self._make(self._text)
        self._ordinary.encode_special_tokens = True
        self._added = {i: token.content for i, token in self._ordinary.get_added_tokens_decoder().items()}
        ids = self._ordinary.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not self.vocab_size:
            raise FileFormatError(self.path, "model", "has no vocabulary")
        self._decoder = _Decoder(spec.get("decoder"), self.path)
        self._pieces: dict[int, bytes] = {}
        self._config = tokenizer_config.read(self.path.parent)
        self.special, self.add_bos = self._roles()

    # Further objects are made when they are needed: a large vocabulary takes half a second.

    @functools.cached_property
    def _special(self) -> Any:
        """The package's object for which names of special tokens count."""
        return self._make(self._text)

    @functools.cached_property
    def _joined(self) -> Any:
        """The package's object that puts nothing in front of a text."""
        spec = json.loads(self._text)
        parts = _without_prefix(spec.get("normalizer")), _without_prefix(spec.get("pre_tokenizer"))
        if parts == (spec.get("normalizer"), spec.get("pre_tokenizer")):
            return self._ordinary
        spec["normalizer"], spec["pre_tokenizer"] = parts
        made = self._make(json.dumps(spec))
        made.encode_special_tokens = True
        return made

    @functools.cached_property
    def breaks(self) -> str:
        return safe_breaks(map(self._bytes, range(self.vocab_size)))

    @property
    def eot(self) -> int:
        if self.add_bos and self.special.bos is not None:
            return self.special.bos
        found = self._ordinary.token_to_id(END_OF_TEXT) if not self.special.eos else self.special.eos[0]
        if found is None:
            detail = "names no token that ends a text: eos_token of a tokenizer_config.json beside it"
            raise ConfigError("tokenizer", f"{self.name} {detail}")
        return int(found)

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        return self._ordinary.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        require_unicode(text)
        return self._special.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        for text in texts:
            require_unicode(text)
        made = self._joined if continued else self._ordinary
        # Unlike `encode`, this lets other threads run meanwhile.
        return [found.ids for found in made.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Iterable[int], start: bool = False) -> bytes:
        ids = checked(ids, self.vocab_size, self.name)
        if not start or not ids:
            return b"".join(map(self._piece, ids))
        return self._decoder.first(*self._token(ids[0])) + b"".join(map(self._piece, ids[1:]))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids, start=True).decode("utf-8", "replace")

    def files(self) -> list[Path]:
        companions = self._config.companions()
        return [self.path, *(path for path in companions if path != self.path)]

    # ---- reading ---------------------------------------------------------------------------------------

    def _make(self, text: str) -> Any:
        """The package's object; FileFormatError with its reason."""
        try:
            import tokenizers
        except ImportError as error:
            raise MissingDependencyError(f"{self.path} needs tokenizers: pip install tokenizers") from error
        # Threads are llmc's own affair; the package's, beside them, would be too many.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            made = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:
            # The package raises plain Exception, and for what it did not foresee a PanicException, which is none.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise FileFormatError(self.path, "tokenizer", f"{error}") from None
        made.no_truncation()
        made.no_padding()
        return made

    def _roles(self) -> tuple[Special, bool]:
        """Which ids begin and end texts, and whether the first is put in front of a prompt."""
        config = self._config
        plain, full = (self._ordinary.encode("a", add_special_tokens=add).ids for add in (False, True))
        leader = full[0] if full and full[1 : len(plain) + 1] == plain else None
        bos, eos = (self._named(role) for role in ("bos_token", "eos_token"))
        bos = next((i for i in (bos, leader, config.bos) if i is not None and i < self.vocab_size), None)
        ends = dict.fromkeys(i for i in (eos, *config.eos) if i is not None and i < self.vocab_size)
        add_bos = leader is not None if config.add_bos is None else config.add_bos
        return Special(bos, tuple(ends)), add_bos and bos is not None

    def _named(self, role: str) -> int | None:
        name = self._config.names.get(role)
        if name is None:
            return None
        found = self._ordinary.token_to_id(name)
        if found is None:
            raise FileFormatError(self._config.where(role), role, f"{name!r} is not in the vocabulary")
        return int(found)

    # ---- tokens ----------------------------------------------------------------------------------------

    def _token(self, i: int) -> tuple[str, bool]:
        """A token's name in the file, and whether it was added: then the name is its text."""
        if i in self._added:
            return self._added[i], True
        return self._ordinary.id_to_token(i) or "", False  # "": a vocabulary may leave ids out

    def _bytes(self, i: int) -> bytes:
        return self._decoder.piece(*self._token(i))

    def _piece(self, i: int) -> bytes:
        found = self._pieces.get(i)
        if found is None:
            if len(self._pieces) >= PIECES:
                self._pieces.clear()
            found = self._pieces[i] = self._bytes(i)
        return found


def _without_prefix(spec: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text; None where nothing is left of it."""
    if not isinstance(spec, dict):
        return spec
    kind = spec.get("type")
    if kind == "Sequence":
        field = "normalizers" if "normalizers" in spec else "pretokenizers"
        parts = [_without_prefix(part) for part in spec[field]]
        return spec | {field: [part for part in parts if part is not None]}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {key: value for key, value in spec.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return spec | {"add_prefix_space": False} if kind == "ByteLevel" else spec


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """A tokenizer.json's text and its object; FileFormatError."""
    try:
        text = path.read_bytes().decode()
        spec = json.loads(text)
    except OSError as error:
        raise ConfigError("tokenizer", f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, "JSON", f"{error}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise FileFormatError(path, "model", "not found: that is no tokenizer.json")
    return text, spec


# ---- decoders --------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet of bytes: those that print as Latin-1 are themselves, the others U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


ALPHABET = _byte_alphabet()
Step = Callable[[str, bool, bool], "str | bytes"]  # token, whether added, whether first -> what it becomes


class _Decoder:
    """A file's decoder, for one token at a time.

    It is a chain of steps, each of which maps a token's text; ByteLevel and ByteFallback give bytes, which later steps
    leave alone.  Strip works on the joined text, so of it only the front counts, in the first token.
    """

    def __init__(self, spec: Any, path: Path) -> None:
        self._path = path
        self._steps: list[Step] = []
        self._lead = ""  # what Strip takes from the front of a text
        fused = False
        chain = spec.get("decoders") if isinstance(spec, dict) and spec.get("type") == "Sequence" else [spec]
        if not isinstance(chain, list):
            raise FileFormatError(path, "decoder", "a Sequence without a list of decoders")
        for part in chain:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "Fuse":
                fused = True
            elif kind == "Strip":
                self._strip(part, fused)
            elif kind in _DECODERS:
                self._steps.append(_DECODERS[kind](part, path))
            else:
                raise FileFormatError(path, "decoder", f"{kind} is not one of {', '.join(_DECODERS)}, Fuse, Strip")

    def _strip(self, spec: dict[str, Any], fused: bool) -> None:
        content, start, stop = spec.get("content"), spec.get("start"), spec.get("stop")
        if not fused or not isinstance(content, str) or start not in (0, 1) or stop != 0:
            known = "of one character at the front, after Fuse"
            raise FileFormatError(self._path, "decoder", f"Strip {spec} is not {known}")
        self._lead = content * start

    def piece(self, token: str, added: bool) -> bytes:
        """The bytes of a token."""
        return self._run(token, added, False)

    def first(self, token: str, added: bool) -> bytes:
        """The bytes of a token with which a text begins."""
        return self._run(token, added, True).removeprefix(self._lead.encode())

    def _run(self, token: str, added: bool, first: bool) -> bytes:
        value: str | bytes = token
        for step in self._steps:
            if isinstance(value, bytes):
                break
            value = step(value, added, first)
        return value if isinstance(value, bytes) else value.encode()


def _byte_level(spec: dict[str, Any], path: Path) -> Step:
    def step(token: str, added: bool, first: bool) -> str | bytes:
        # An added token is text as it stands; so is one with characters from outside the alphabet.
        if added or not all(character in ALPHABET for character in token):
            return token
        return bytes(ALPHABET[character] for character in token)

    return step


def _byte_fallback(spec: dict[str, Any], path: Path) -> Step:
    def step(token: str, added: bool, first: bool) -> str | bytes:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token

    return step


def _replace(spec: dict[str, Any], path: Path) -> Step:
    pattern, content = spec.get("pattern"), spec.get("content")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    if not isinstance(old, str) or not isinstance(content, str):
        raise FileFormatError(path, "decoder", f"Replace {pattern} is not of one string by another")
    return lambda token, added, first: token.replace(old, content)


def _metaspace(spec: dict[str, Any], path: Path) -> Step:
    mark = spec.get("replacement", "\u2581")
    if not isinstance(mark, str):
        raise FileFormatError(path, "decoder", f"Metaspace has {mark!r} for a space")
    scheme = spec.get("prepend_scheme", "always" if spec.get("add_prefix_space", True) else "never")
    prefixed = scheme != "never"
    return lambda token, added, first: token.replace(mark, "" if first and prefixed else " ")


_DECODERS: dict[str, Callable[[dict[str, Any], Path], Step]] = {
    "ByteLevel": _byte_level,
    "ByteFallback": _byte_fallback,
    "Metaspace": _metaspace,
    "Replace": _replace,
}
