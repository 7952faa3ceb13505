"""Ids with a meaning, and the checks that every tokenizer makes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from llmc.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for the token between two texts


class Special(NamedTuple):
    """Ids with a meaning: `bos` begins a text (None: there is none), each of `eos` ends what a model writes."""

    bos: int | None
    eos: tuple[int, ...]


def checked(ids: Iterable[int], vocab_size: int, name: str) -> list[int]:
    """`ids` as ints, each of them in [0, vocab_size); ConfigError otherwise."""
    ids = [int(i) for i in ids]
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ConfigError(
                "token ids", f"id {i} at position {position} is not one of tokenizer {name}'s {vocab_size}"
            )
    return ids


def require_unicode(text: str) -> None:
    """ConfigError for text with half a character in it, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("text", f"character {error.start} is a lone surrogate") from None


def safe_breaks(tokens: Iterable[bytes]) -> str:
    """`Tokenizer.breaks` of a vocabulary: a space, unless a token reaches from anything else but white space into one.

    What is joined within a token then lies on one side of such a space, whatever the rules of joining are.
    """
    reaches = re.compile(r"\S ")
    return "" if any(reaches.search(token.decode("utf-8", "replace")) for token in tokens if b" " in token) else " "
