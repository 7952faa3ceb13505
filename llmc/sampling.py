"""Text from a model: a batch of prompts, each continued token by token, with a key-value cache.

    for piece in write(model, [ids, others], Sampling(temperature=0.8), tokenizer):
        print(piece.sequence, piece.text)

Prompts may differ in length.  Each is read into its own part of the cache; then all advance together, one token each,
every one from its own position, so that the weights are read once for all of them.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from llmc.arena import Array, table_nbytes
from llmc.choice import Sampling, choose
from llmc.errors import ConfigError
from llmc.model import Cache, Config, Model

CHUNK = 512  # tokens of a prompt that are read in at once: more need more scratch and are no faster


class Decoder(Protocol):
    """The part of a tokenizer that text needs."""

    def decode_bytes(self, ids: Sequence[int], start: bool = False) -> bytes:
        """The bytes that `ids` stand for."""


class Piece(NamedTuple):
    """What `write` gives: a token of a sequence, and the text that has become certain with it.

    Text may be "" (half a character, what may be the beginning of a stop string).  A sequence's last piece has None
    for a token, and the text that was held back.
    """

    sequence: int
    token: int | None
    text: str


@dataclass
class Speed:
    """What a run took.  Seconds are those spent on making tokens, not on whoever takes them."""

    prompt_tokens: int = 0  # read in
    prompt_seconds: float = 0.0
    tokens: int = 0  # written, the first of each sequence too, which comes with its prompt
    decoded: int = 0  # written by steps of one token per sequence
    seconds: float = 0.0  # of those steps
    nbytes: int = 0  # that they read, at least

    @property
    def tokens_per_second(self) -> float:
        """Of the steps after the prompts; 0 where there was none."""
        return self.decoded / self.seconds if self.seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """B/s that weights and cache were read with."""
        return self.nbytes / self.seconds if self.seconds else 0.0


class Context:
    """A cache for one sequence that is written to again and again: `tokens` are those whose keys and values it has.

    A prompt that begins as they do is read in from where it goes on differently.
    """

    def __init__(self, model: Model, length: int) -> None:
        self.cache = model.new_cache(1, length)
        self.tokens: list[int] = []


# ---- what to call ----------------------------------------------------------------------------------


def generate(model: Model, token_ids: Sequence[int], max_new_tokens: int = 64, **options: Any) -> list[int]:
    """The tokens that `model` writes after `token_ids`: `options` are the other fields of Sampling, errors those of
    `write`."""
    return list(stream(model, token_ids, Sampling(max_new_tokens, **options)))


def stream(model: Model, token_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """Yield the tokens that continue `token_ids` as they are made.

    Stop strings are those of the text in the model's own tokenizer; the tokens that hold one are the last.
    """
    pieces = write(model, [token_ids], sampling, model.tokenizer if sampling.stop else None)
    return (piece.token for piece in pieces if piece.token is not None)


def write(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, tokenizer: Decoder | None = None, *,
    context: Context | None = None, speed: Speed | None = None,
) -> Iterator[Piece]:
    """Yield what continues each of `prompts`, token by token, as `sampling` says.

    An empty prompt means the end-of-text token, after which a text begins.  A sequence ends with `max_new_tokens`, or
    before a token of `stop_ids`, or where its text holds a stop string.  Without a tokenizer there is no text; with
    one, no token is chosen that it does not know.

    The model looks back over `max_seq_len` tokens.  When they are used up, a fresh window is read in, from the last
    end-of-text token on if there is one among them, else their later half, and writing goes on from there.  Of a
    longer prompt only the last `max_seq_len` tokens are seen.

    With a `context`, which is for one prompt, and for one that fits with what is to be written, its cache is used and
    kept; it is in order whenever the iterator is left.  `speed` is added to.

    ConfigError for a token outside the vocabulary, or for what does not fit, at the call and not at the first token;
    DivergenceError if the model's logits are not finite.
    """
    if sampling.stop and tokenizer is None:
        raise ConfigError("stop", "strings are found in text, and there is no tokenizer")
    sequences = [_Sequence(model, i, prompt, sampling, tokenizer) for i, prompt in enumerate(prompts)]
    if context is None:
        length = max((len(s.history) for s in sequences), default=0) + sampling.max_new_tokens
        cache = model.new_cache(max(1, len(sequences)), max(1, min(model.config.max_seq_len, length)))
    else:
        if len(sequences) != 1:
            raise ConfigError("context", f"is for one prompt, got {len(sequences)}")
        cache, first = context.cache, sequences[0]
        if len(first.history) + sampling.max_new_tokens > cache.length:
            detail = f"{len(first.history)} tokens and {sampling.max_new_tokens} new ones exceed its {cache.length}"
            raise ConfigError("context", detail)
        first.resume(context.tokens)
    return _write(model, sequences, cache, Speed() if speed is None else speed)


def nbytes(config: Config, max_new_tokens: int, dtype: str = "float32") -> tuple[int, int]:
    """Bytes of the cache and of the most scratch that `stream` needs for so many tokens after a prompt of one."""
    cache = config.cache_rows(1, min(config.max_seq_len, 1 + max_new_tokens), dtype)
    return table_nbytes(cache), table_nbytes(config.decode_rows(1, longest(config, max_new_tokens), dtype))


def longest(config: Config, max_new_tokens: int) -> int:
    """The most tokens that `stream` reads in at once, for so many tokens after a prompt of one."""
    window = config.max_seq_len
    # A fresh window leaves room for a token, and the last of it is read with the step that follows.
    return 1 if max_new_tokens <= window else min(CHUNK, max(1, window - 2))


def end_of_text(model: Model) -> int:
    """The token that separates texts: the tokenizer's, else the vocabulary's last, as in GPT-2's.  ConfigError for a
    tokenizer that has none."""
    return model.config.vocab_size - 1 if model.tokenizer is None else int(model.tokenizer.eot)


# ---- the loop --------------------------------------------------------------------------------------


class _Sequence:
    """One text of a batch."""

    def __init__(
        self, model: Model, index: int, prompt: Sequence[int], sampling: Sampling, tokenizer: Decoder | None
    ) -> None:
        V = model.config.vocab_size
        self.index, self.sampling = index, sampling
        self.eot = _text_start(model)
        self.history = [int(token) for token in prompt] or [end_of_text(model)]
        for place, token in enumerate(self.history):
            if not 0 <= token < V:
                raise ConfigError("token_ids", f"{token} at position {place} is outside the vocabulary of {V}")
        self.cached: list[int] = []  # whose keys and values lie in the cache
        self.left = sampling.max_new_tokens
        self.ended = not self.left
        self._random = sampling.random(index)
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = np.zeros(V, bool)
            self._seen[self.history] = True
        self._known = min(V, getattr(tokenizer, "vocab_size", V))
        self._text = None if tokenizer is None else Text(tokenizer, sampling.stop, start=self._begins(tokenizer))

    def _begins(self, tokenizer: Decoder) -> bool:
        """Whether the prompt has no text that what is written goes on from."""
        special: Any = getattr(tokenizer, "special", None)
        return self.history[-1] in ((self.eot,) if special is None else (self.eot, special.bos, *special.eos))

    def resume(self, cached: list[int]) -> None:
        """Take over a cache that holds `cached`, as far as it begins like the prompt; one token is left to read."""
        same = 0
        for old, new in zip(cached, self.history[:-1], strict=False):
            if old != new:
                break
            same += 1
        del cached[same:]
        self.cached = cached

    def unread(self, window: int) -> list[int]:
        """What of the prompt is not in the cache yet."""
        return self.history[-window:] if not self.cached else self.history[len(self.cached) :]

    def choose(self, logits: Array) -> int:
        seen = None if self._seen is None else self._seen[: self._known]
        return choose(logits[: self._known], self.sampling, self._random, seen)

    def take(self, token: int) -> Iterator[Piece]:
        """Write `token`, unless it ends the text."""
        if token not in self.sampling.stop_ids:
            self.history.append(token)
            if self._seen is not None:
                self._seen[token] = True
            self.left -= 1
            text = "" if self._text is None else self._text.push(token)
            self.ended = not self.left or (self._text is not None and self._text.ended)
            yield Piece(self.index, token, text)
        else:
            self.ended = True
        if self.ended:
            yield self.last()

    def last(self) -> Piece:
        return Piece(self.index, None, "" if self._text is None else self._text.finish())


def _write(model: Model, sequences: list[_Sequence], cache: Cache, speed: Speed) -> Iterator[Piece]:
    window = model.config.max_seq_len
    live: list[_Sequence] = []  # each in the cache's row of its place here
    for s in sequences:
        if s.ended:  # before it began
            yield s.last()
            continue
        began, tokens = time.perf_counter(), s.unread(window)
        token = s.choose(_read(model, cache.sequence(len(live)), s.cached, tokens))
        speed.prompt_seconds += time.perf_counter() - began
        speed.prompt_tokens += len(tokens)
        speed.tokens += 1
        yield from s.take(token)
        if not s.ended:
            live.append(s)
    while live:
        began = time.perf_counter()
        for row, s in enumerate(live):
            if len(s.cached) == window:
                fresh = _fresh_window(s.history[-window:], s.eot)
                s.cached.clear()
                if fresh[:-1]:
                    _read(model, cache.sequence(row), s.cached, fresh[:-1])
        read = time.perf_counter()
        positions = np.array([len(s.cached) for s in live], np.int32)
        last = np.array([[s.history[-1]] for s in live], np.int32)
        logits = model.ops.fetch(model.decode(cache.first(len(live)), last, positions))()
        # All at once: whoever takes the pieces may let the model write over its logits.
        tokens = [s.choose(row) for s, row in zip(live, logits, strict=True)]
        del logits  # the model's scratch, which would live on beside another
        for s in live:
            s.cached.append(s.history[-1])
        speed.prompt_seconds += read - began
        speed.seconds += time.perf_counter() - read
        speed.nbytes += model.decode_nbytes(positions)
        speed.decoded += len(live)
        speed.tokens += len(live)
        for s, token in zip(live, tokens, strict=True):
            yield from s.take(token)
        _drop_ended(model, live, cache)


def _read(model: Model, cache: Cache, cached: list[int], tokens: list[int]) -> Array:
    """Append `tokens` to a sequence's cache; logits (V,) of the token after them."""
    final = (len(tokens) - 1) // CHUNK * CHUNK
    for start in range(0, final, CHUNK):
        _decode(model, cache, cached, tokens[start : start + CHUNK])
    # No name for the logits: they would keep the scratch alive when the next call makes another.
    return model.ops.fetch(_decode(model, cache, cached, tokens[final:]))()[0]


def _decode(model: Model, cache: Cache, cached: list[int], tokens: list[int]) -> Array:
    logits = model.decode(cache, np.array([tokens], np.int32), np.array([len(cached)], np.int32))
    cached.extend(tokens)
    return logits


def _drop_ended(model: Model, live: list[_Sequence], cache: Cache) -> None:
    """Take what has ended out of `live`; the last sequence moves to the row that is free."""
    for row in reversed(range(len(live))):
        if not live[row].ended:
            continue
        last = live.pop()
        if row < len(live):
            cache.move(model.ops, len(live), row, len(last.cached))
            live[row] = last


def _text_start(model: Model) -> int | None:
    """`end_of_text`, None where the vocabulary has no such token."""
    try:
        return end_of_text(model)
    except ConfigError:
        return None


def _fresh_window(recent: list[int], eot: int | None) -> list[int]:
    """What to read in when the window is full: a text from its beginning is better than from its middle."""
    for place in range(len(recent) - 1, 0, -1):
        if recent[place] == eot:
            return recent[place:]
    return recent[-max(1, len(recent) // 2) :]


# ---- text ------------------------------------------------------------------------------------------


@dataclass
class Text:
    """Tokens to text, piece by piece: each character whole even where its bytes span several tokens, and nothing of a
    stop string, nor of what may become one.  `start`: the first token begins a text."""

    tokenizer: Decoder
    stop: Sequence[str] = ()
    start: bool = False
    ended: bool = False  # a stop string was found
    _held: str = ""
    _bytes: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def push(self, token: int) -> str:
        """What has become certain with another token; nothing after the end."""
        found = self.tokenizer.decode_bytes([token], start=True) if self.start else self.tokenizer.decode_bytes([token])
        self.start = False
        return self._found(self._bytes.decode(found), final=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        return self._found(self._bytes.decode(b"", final=True), final=True)

    def _found(self, text: str, final: bool) -> str:
        if self.ended:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        self.ended = bool(places)
        keep = min(places) if places else len(text) if final else len(text) - self._beginning(text)
        self._held = "" if final or self.ended else text[keep:]
        return text[:keep]

    def _beginning(self, text: str) -> int:
        """How many characters at the end of `text` may begin a stop string."""
        longest = min(len(text), max(map(len, self.stop), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return size
        return 0


