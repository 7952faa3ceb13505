"""Text from a model: one token at a time, with a key-value cache."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from llmc.arena import Arena, Array, table_nbytes
from llmc.errors import ConfigError, DivergenceError
from llmc.gpt2 import GPT2, Config, cache_rows, decode_rows


class Decoder(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for."""


def generate(
    model: GPT2, token_ids: Sequence[int], max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    seed: int = 0, stop: int | None = None,
) -> list[int]:
    """The tokens that `model` writes after `token_ids`: arguments and errors as in `stream`."""
    return list(stream(model, token_ids, max_new_tokens, temperature, top_k, seed, stop))


def stream(
    model: GPT2, token_ids: Sequence[int], max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    seed: int = 0, stop: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` tokens that continue `token_ids`, as they are made.

    Each is drawn from softmax(logits / temperature) over the `top_k` likeliest tokens (0: over all of
    them); temperature 0 always takes the likeliest.  The same `seed` gives the same tokens.  Nothing
    follows `stop`, if given, which is itself not yielded.  An empty prompt means the end-of-text token,
    after which a text begins.

    The model looks back over `max_seq_len` tokens.  When they are used up, a fresh window is read in, from
    the last end-of-text token on if there is one among them, else their later half, and writing goes on from
    there.  Of a longer prompt only the last `max_seq_len` tokens are seen.

    ConfigError for a token outside the vocabulary or an option out of range, at the call and not at the
    first token; DivergenceError if the model's logits are not finite.
    """
    V = model.config.vocab_size
    for name, value in (("max_new_tokens", max_new_tokens), ("temperature", temperature), ("top_k", top_k)):
        if not 0 <= value < math.inf:
            raise ConfigError(name, f"must be a number from 0 up, got {value}")
    if seed < 0:
        raise ConfigError("seed", f"must be at least 0, got {seed}")
    prompt = [int(token) for token in token_ids] or [end_of_text(model)]
    for place, token in enumerate(prompt):
        if not 0 <= token < V:
            raise ConfigError("token_ids", f"{token} at position {place} is outside the vocabulary of {V}")
    random = np.random.Generator(np.random.PCG64(seed))
    return _stream(model, prompt, max_new_tokens, temperature, top_k, random, stop)


def nbytes(config: Config, max_new_tokens: int, dtype: str = "float32") -> tuple[int, int]:
    """Bytes of the cache and of the most scratch that `stream` needs for so many tokens after a prompt of one."""
    scratch = decode_rows(config, 1, longest(config, max_new_tokens), dtype)
    return table_nbytes(cache_rows(config, 1, dtype)), table_nbytes(scratch)


def longest(config: Config, max_new_tokens: int) -> int:
    """The most tokens that `stream` reads in at once, for so many tokens after a prompt of one."""
    window = config.max_seq_len
    return 1 if max_new_tokens <= window else max(1, window - 1)  # a fresh window leaves room for a token


def end_of_text(model: GPT2) -> int:
    """The token that separates texts: the tokenizer's, else the vocabulary's last, as in GPT-2's."""
    return model.config.vocab_size - 1 if model.tokenizer is None else int(model.tokenizer.eot)


def _stream(
    model: GPT2, history: list[int], count: int, temperature: float, top_k: int, random: np.random.Generator,
    stop: int | None,
) -> Iterator[int]:
    window = model.config.max_seq_len
    cache = model.new_cache(1)
    eot = end_of_text(model)
    new, position = history[-window:], 0
    for _ in range(count):
        if position + len(new) > window:
            new, position = _fresh_window(history[-window:], eot), 0
        # No name for the logits: they would keep the scratch alive when the next call makes another.
        token = choose(_decode(model, cache, new, position), temperature, top_k, random)
        position += len(new)
        if token == stop:
            return
        yield token
        history.append(token)
        new = [token]


def _fresh_window(recent: list[int], eot: int) -> list[int]:
    """What to read in when the window is full: a text from its beginning is better than from its middle."""
    for place in range(len(recent) - 1, 0, -1):
        if recent[place] == eot:
            return recent[place:]
    return recent[-max(1, len(recent) // 2) :]


def _decode(model: GPT2, cache: Arena, tokens: list[int], position: int) -> Array:
    """Logits (V,) of the token after `tokens`."""
    logits = model.decode(cache, np.array([tokens], dtype=np.int32), position)
    return model.ops.fetch(logits)()[0]


def choose(logits: Array, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """One token drawn from logits (V,), as `stream` says.

    The uniform number is looked up in the cumulative sum of the probabilities, in float64.
    """
    if not np.isfinite(logits).all():
        raise DivergenceError("sampling: the model's logits are not finite")
    if temperature == 0:
        return int(np.argmax(logits))
    if 0 < top_k < logits.size:
        candidates = np.sort(np.argpartition(logits, -top_k)[-top_k:])
    else:
        candidates = np.arange(logits.size)
    scores = logits[candidates].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose probability is rightly 0
        cumulative = np.cumsum(np.exp((scores - scores.max()) / temperature))
    place = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(candidates[min(int(place), candidates.size - 1)])


def stream_text(tokenizer: Decoder, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` piece by piece, each character whole even where its bytes span several tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in ids:
        piece = decoder.decode(tokenizer.decode_bytes([token]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
