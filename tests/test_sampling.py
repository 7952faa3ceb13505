"""Texts that go on: from which window, in which batch, where they end, and how text comes out of tokens."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference

from llmc import gemma, gpt2, llama, sampling
from llmc.choice import Sampling
from llmc.errors import ConfigError
from llmc.gpt2 import GPT2, Config
from llmc.model import Model
from llmc.sampling import Context, Piece, Speed, Text, generate, stream, write
from llmc.tokenizer import ByteTokenizer

CONFIG = Config(max_seq_len=8, vocab_size=50, num_layers=2, num_heads=2, channels=32)


@pytest.fixture(scope="module")
def model() -> GPT2:
    model = GPT2(CONFIG, reference, dtype="float64")
    model.initialise(1)
    # Large weights, for peaked logits in which all of the history matters; a final norm with signs, because
    # else the tied head repeats its input.
    for row, tensor in model.params:
        if len(row.shape) == 2:
            tensor *= 50 if row.name in ("qkvw", "attprojw") else 10
    model.params.lnfw[...] = np.random.default_rng(0).normal(size=CONFIG.channels)
    return model


EOT = CONFIG.vocab_size - 1


def by_forward(model: GPT2, prompt: list[int], count: int) -> list[int]:
    """Greedy, without a cache: every token from a forward pass over the window it is documented to see."""
    full, out = list(prompt), []
    window = full[-CONFIG.max_seq_len :]
    for _ in range(count):
        if len(window) > CONFIG.max_seq_len:
            recent = full[-CONFIG.max_seq_len :]
            texts = [place for place, token in enumerate(recent) if token == EOT and place > 0]
            window = recent[texts[-1] :] if texts else recent[-(CONFIG.max_seq_len // 2) :]
        logits = model.logits(np.array([window], dtype=np.int32))[0, -1]
        token = int(np.argmax(logits))
        out.append(token)
        full.append(token)
        window = [*window, token]
    return out


@pytest.mark.parametrize(
    "prompt", [[3], [3, 1, 4, 1], list(range(8)), list(range(20)), [*range(6), EOT, 3], [EOT, *range(7)]]
)
def test_greedy_is_the_forward_pass(model: GPT2, prompt: list[int]) -> None:
    """Within the window, at its edge, and long after it was used up."""
    expected = by_forward(model, prompt, 30)
    assert len(set(expected)) > 3, "a test on a constant would show nothing"
    assert generate(model, prompt, 30, temperature=0) == expected
    if len(prompt) <= 8 and EOT not in prompt:
        assert by_forward(model, [9, *prompt[1:]], 30) != expected, "the first token must matter"


def test_a_window_of_one() -> None:
    small = GPT2(Config(1, 50, 1, 1, 8), reference, dtype="float64")
    small.initialise(1)
    assert len(generate(small, [3, 4], 5)) == 5


def test_a_long_prompt_is_read_in_parts(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, read = generate(model, [3, 1, 4, 1, 5], 20, temperature=0), []
    monkeypatch.setattr(sampling, "CHUNK", 2)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda c, t, p: read.append(t.shape) or decode(c, t, p))
    assert generate(model, [3, 1, 4, 1, 5], 20, temperature=0) == expected
    assert read[:4] == [(1, 2), (1, 2), (1, 1), (1, 1)] and max(read) == (1, 2)


def test_seeds(model: GPT2) -> None:
    first = generate(model, [3], 40, seed=1)
    assert generate(model, [3], 40, seed=1) == first
    assert generate(model, [3], 40, seed=2) != first
    assert all(0 <= token < CONFIG.vocab_size for token in first)


def test_streaming_gives_the_same(model: GPT2) -> None:
    assert list(stream(model, [3], Sampling(10, seed=5))) == generate(model, [3], 10, seed=5)


def test_nothing_is_asked_for(model: GPT2) -> None:
    assert generate(model, [3], 0) == []
    assert list(write(model, [], Sampling())) == []


def test_an_empty_prompt_is_the_end_of_a_text(model: GPT2) -> None:
    assert generate(model, [], 5, seed=3) == generate(model, [CONFIG.vocab_size - 1], 5, seed=3)
    model.tokenizer = type("Tokenizer", (), {"eot": 7})()
    try:
        assert generate(model, [], 5, seed=3) == generate(model, [7], 5, seed=3)
    finally:
        model.tokenizer = None


def test_a_penalty_counts_the_prompt_and_what_was_written(model: GPT2) -> None:
    """One so large that nothing comes twice, as long as there is another token with a positive logit."""
    plain = generate(model, [3, 1, 4], 12, temperature=0)
    assert len(set(plain) | {3, 1, 4}) < 15, "else a penalty could not be seen"
    penalised = generate(model, [3, 1, 4], 12, temperature=0, repetition_penalty=1e6)
    assert len({3, 1, 4, *penalised}) == 15


# ---- batches ---------------------------------------------------------------------------------------


def by_sequence(pieces: Iterator[Piece], count: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(count)]
    for sequence, token, _ in pieces:
        if token is not None:
            found[sequence].append(token)
    return found


PROMPTS = [[3, 1, 4, 1], [9], list(range(20)), [2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize("config", [
    CONFIG,
    llama.Config(8, 50, 2, 4, 32, num_kv_heads=2, head_size=8, hidden=40, window=3),
    gemma.Config(8, 50, 2, 4, 32, num_kv_heads=2, head_size=8, hidden=40, version=2, query_scale=8, window=3,
                 attn_softcap=5.0, final_softcap=3.0),
], ids=["gpt2", "llama", "gemma"])  # fmt: skip
def test_a_batch_writes_what_each_prompt_would_alone(config: Any, cpu: Any) -> None:
    """Prompts of different lengths, on the CPU's kernels in fp32, past the window; three end on the way, in an order
    that moves others to their rows."""
    model = config.build(cpu)
    model.initialise(3)
    for row, tensor in model.params:
        if len(row.shape) == 2:
            tensor *= 12
    alone = [generate(model, prompt, 24, temperature=0) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == 4
    # Every other sequence ends with a token of its own that the others do not write before they end.
    for stop in ([], [alone[0][5]], [alone[3][2], alone[1][9]]):
        expected = [tokens[: min([tokens.index(t) for t in stop if t in tokens], default=24)] for tokens in alone]
        found = by_sequence(write(model, PROMPTS, Sampling(24, temperature=0, stop_ids=stop)), 4)
        assert found == expected
    assert len({len(tokens) for tokens in expected}) > 1, "some end before others"


def test_pieces_come_in_turn_and_every_sequence_has_an_end(model: GPT2) -> None:
    pieces = list(write(model, PROMPTS, Sampling(3, temperature=0)))
    assert [piece.sequence for piece in pieces if piece.token is not None] == [0, 1, 2, 3] * 3
    assert sorted(piece.sequence for piece in pieces if piece.token is None) == [0, 1, 2, 3]
    none = list(write(model, PROMPTS[:2], Sampling(0), ByteTokenizer()))
    assert none == [Piece(0, None, ""), Piece(1, None, "")]


def test_sequences_of_a_batch_are_drawn_apart(model: GPT2) -> None:
    same = by_sequence(write(model, [[3]] * 3, Sampling(20)), 3)
    assert len({tuple(tokens) for tokens in same}) == 3
    assert same[0] == generate(model, [3], 20)


def test_the_cache_has_room_for_what_can_come(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    made, new_cache = [], model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda B, T: made.append((B, T)) or new_cache(B, T))
    for prompts, count in (([[1, 2, 3]], 2), ([[1], [2, 3]], 4), ([[1]], 100), ([range(20)], 1)):
        list(write(model, prompts, Sampling(count)))
    assert made == [(1, 5), (2, 6), (1, 8), (1, 8)]


def test_what_a_run_took(model: GPT2) -> None:
    speed = Speed()
    list(write(model, [[1, 2, 3], [4]], Sampling(4), speed=speed))
    assert (speed.prompt_tokens, speed.tokens, speed.decoded) == (4, 8, 6)
    reads = [np.array(positions) for positions in ((3, 1), (4, 2), (5, 3))]
    assert speed.nbytes == sum(model.decode_nbytes(positions) for positions in reads)
    assert speed.prompt_seconds > 0 and speed.tokens_per_second == 6 / speed.seconds
    assert speed.bandwidth == speed.nbytes / speed.seconds
    assert Speed().tokens_per_second == Speed().bandwidth == 0


def test_bytes_of_a_step() -> None:
    """By hand: matrices once, the head without its padding, of the other tables a row, of the cache what is seen."""
    C, V, F = 32, 50, 40
    small = gpt2.Config(8, V, 2, 2, C).build(reference, dtype="float64")
    layer = 12 * C * C + 13 * C
    assert small.decode_nbytes(np.array([5])) == 8 * (V * C + C + 2 * layer + 2 * C + 2 * 2 * 6 * C)
    own_head = llama.Config(8, V, 2, 4, C, num_kv_heads=2, head_size=8, hidden=F, window=3)
    untied = own_head.build(reference, dtype="float64")
    layer = 2 * C + (32 + 2 * 16) * C + C * 32 + 3 * F * C
    seen = (1 + 3) * 2 * 16  # positions 0 and 5: one token, and the window's three
    assert untied.decode_nbytes(np.array([0, 5])) == 8 * (V * C + 2 * C + 2 * layer + C + 2 * seen)
    both = gemma.Config(8, V, 2, 4, C, num_kv_heads=2, head_size=8, hidden=F, version=2, query_scale=8, window=3)
    model = both.build(reference, dtype="float64")
    more = model.decode_nbytes(np.array([7])) - model.decode_nbytes(np.array([0]))
    assert more == 8 * 2 * 16 * ((3 - 1) + (8 - 1)), "one layer has a window, the other sees all"


# ---- a cache that is kept --------------------------------------------------------------------------


def test_a_context_reads_only_what_is_new(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    context, decode, read = Context(model, 8), model.decode, []
    monkeypatch.setattr(model, "decode", lambda c, t, p: read.append((int(p[0]), t[0].tolist())) or decode(c, t, p))

    def next_token(prompt: list[int]) -> int:
        ((_, token, _), _) = write(model, [prompt], Sampling(1, temperature=0), context=context)
        return token

    for prompt, expected in (
        ([3, 1, 4], (0, [3, 1, 4])),
        ([3, 1, 4, 1, 5], (3, [1, 5])),
        ([3, 1, 2], (2, [2])),  # from where it goes on differently
        ([3, 1, 2], (2, [2])),  # the same again: its last token's logits are needed
        ([9], (0, [9])),
    ):
        read.clear()
        token = next_token(prompt)
        assert read == [expected] and context.tokens == prompt
        assert generate(model, prompt, 1, temperature=0) == [token]


def test_a_context_left_early_is_in_order(model: GPT2) -> None:
    context = Context(model, 8)
    expected = generate(model, [3, 1], 6, temperature=0)
    pieces = write(model, [[3, 1]], Sampling(6, temperature=0), context=context)
    first = [next(pieces).token for _ in range(3)]
    pieces.close()  # type: ignore[attr-defined]
    assert first == expected[:3] and context.tokens == [3, 1, *expected[:2]]
    again = write(model, [[3, 1, *first]], Sampling(3, temperature=0), context=context)
    assert [token for _, token, _ in again if token is not None] == expected[3:]


def test_what_a_context_does_not_take(model: GPT2) -> None:
    context = Context(model, 6)
    for prompts, count, message in (([[1]], 6, "1 tokens and 6 new ones exceed its 6"), ([[1], [2]], 1, "one prompt")):
        with pytest.raises(ConfigError, match=f"^context: .*{message}"):
            write(model, prompts, Sampling(count), context=context)


# ---- ends ------------------------------------------------------------------------------------------


def test_stop_ids(model: GPT2) -> None:
    tokens = generate(model, [3], 20, seed=4)
    for stop in ((tokens[7],), (tokens[12], tokens[7])):
        end = min(tokens.index(token) for token in stop)
        assert generate(model, [3], 20, seed=4, stop_ids=stop) == tokens[:end]


@pytest.fixture(scope="module")
def writer() -> Model:
    """Knows bytes."""
    model = GPT2(Config(64, 257, 1, 1, 8), reference, dtype="float64")
    model.initialise(1)
    model.tokenizer = ByteTokenizer()
    return model


def test_stop_strings(writer: Model) -> None:
    """Cut from the text; tokens go on to the one that completes it."""
    tokens = generate(writer, [3], 30, seed=9, stop_ids=[256])
    assert len(tokens) == 30
    text = "".join(piece.text for piece in write(writer, [[3]], Sampling(30, seed=9), ByteTokenizer()))
    place = next(i for i in range(5, 20) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[place : place + 2]
    pieces = list(write(writer, [[3]], Sampling(30, seed=9, stop=["never this", stop]), ByteTokenizer()))
    assert "".join(piece.text for piece in pieces) == text[:place]
    some = generate(writer, [3], 30, seed=9, stop=stop)
    assert some == tokens[: len(some)] and ByteTokenizer().decode(some).endswith(stop)
    with pytest.raises(ConfigError, match="^stop: .* no tokenizer"):
        write(writer, [[3]], Sampling(stop="x"))


def test_only_what_the_tokenizer_knows_is_chosen() -> None:
    model = GPT2(Config(64, 300, 1, 1, 8), reference, dtype="float64")
    model.initialise(1)
    assert max(generate(model, [3], 200)) > 256
    assert max(piece.token or 0 for piece in write(model, [[3]], Sampling(200), ByteTokenizer())) <= 256


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_tokens_outside_the_vocabulary(model: GPT2, wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"{wrong} at position 1 is outside the vocabulary of 50"):
        stream(model, [1, wrong], Sampling())  # at the call: nothing was asked of the iterator


# ---- text ------------------------------------------------------------------------------------------


def pushed(tokens: Any, *stop: str) -> tuple[list[str], str, bool]:
    """The pieces that are not empty, what `finish` adds, and whether a stop string was found."""
    text = Text(ByteTokenizer(), stop)
    pieces = [text.push(token) for token in tokens]
    return [piece for piece in pieces if piece], text.finish(), text.ended


def test_characters_come_whole() -> None:
    """One token per byte, and yet no half character."""
    text = "naïve: 語🙂!"
    assert pushed(text.encode()) == (list(text), "", False)


def test_bytes_that_are_no_text() -> None:
    assert pushed([65, 0xFF, 66, 0xE8]) == (["A", "\ufffd", "B"], "\ufffd", False)


@pytest.mark.parametrize(
    ("text", "stop", "pieces", "rest", "ended"),
    [
        ("one\ntwo", ["\n"], ["o", "n", "e"], "", True),
        ("a\nUx\nUs\nUser:b", ["\nUser:"], ["a", "\nUx", "\nUs"], "", True),  # held back, and let go
        ("a\nUse", ["\nUser:"], ["a"], "\nUse", False),  # what was held back comes at the end
        ("aaab", ["aab"], ["a"], "", True),
        ("abcd", ["bcx", "cd"], ["a", "b"], "", True),  # the held-back beginning of one, in which another begins
        ("xabc", ["bc", "abc"], ["x"], "", True),  # the earliest counts
        ("zé語", ["語"], ["z", "é"], "", True),
    ],
)
def test_stop_strings_in_text(text: str, stop: list[str], pieces: list[str], rest: str, ended: bool) -> None:
    assert pushed(text.encode(), *stop) == (pieces, rest, ended)


def test_a_stop_string_within_a_token() -> None:
    tokenizer = type("Words", (), {"decode_bytes": lambda self, ids, start=False: b"".join(ids)})()
    text = Text(tokenizer, ["end"])
    assert [text.push(word) for word in (b"the ", b"bends", b" more")] == ["the ", "b", ""]
    assert text.ended and text.finish() == ""


def test_a_text_from_its_beginning() -> None:
    """A tokenizer that puts a space in front of a text is asked to leave it out where a text begins."""

    class Spaced(ByteTokenizer):
        def decode_bytes(self, ids: Any, start: bool = False) -> bytes:
            found = bytes(ids)
            return found.lstrip() if start else found

    for start, expected in ((True, "a "), (False, " a ")):
        text = Text(Spaced(), start=start)
        assert "".join(text.push(token) for token in b" a ") == expected
    small = GPT2(Config(16, 257, 1, 1, 8), reference, dtype="float64")
    small.initialise(1)
    small.tokenizer = Spaced()
    for prompt, begins in (([256], True), ([], True), ([256, 65], False)):
        first = next(write(small, [prompt], Sampling(1, temperature=0), small.tokenizer))
        assert first.token is not None
        assert first.text == Text(Spaced(), start=begins).push(first.token)


def test_end_of_text(model: GPT2) -> None:
    assert sampling.end_of_text(model) == 49


def test_a_vocabulary_without_an_end_of_text(model: GPT2) -> None:
    """What needs none does without: a prompt with tokens, and windows that are full."""

    class Endless:
        @property
        def eot(self) -> int:
            raise ConfigError("tokenizer", "names no token that ends a text")

    prompt = [3, 1, 4, 1]
    expected = generate(model, prompt, 20, temperature=0)
    assert EOT not in expected, "else windows would differ"
    model.tokenizer = Endless()
    try:
        assert generate(model, prompt, 20, temperature=0) == expected
        with pytest.raises(ConfigError, match="names no token"):
            generate(model, [], 20)
    finally:
        model.tokenizer = None


# ---- a step that is recorded -----------------------------------------------------------------------


def test_a_step_goes_to_its_own_cache_and_backend(model: GPT2) -> None:
    """Two caches in turn, then another backend: what was recorded for one is not used for another."""

    def step(cache: Any, token: int, position: int) -> list[float]:
        one = np.array([[token]], np.int32), np.array([position], np.int32)
        return np.array(model.decode(cache, *one))[0].tolist()

    expected = [step(model.new_cache(), token, 0) for token in (3, 9)]
    caches = [model.new_cache(), model.new_cache()]
    assert [step(cache, token, 0) for cache, token in zip(caches, (3, 9), strict=True)] == expected
    after = [step(cache, 5, 1) for cache in caches]
    assert after[0] != after[1] and [step(cache, 5, 1) for cache in caches] == after
    called: list[None] = []

    def head_logits(*args: Any) -> None:
        called.append(reference.head_logits(*args))

    model.ops = SimpleNamespace(**{**vars(reference), "head_logits": head_logits})  # type: ignore[assignment]
    try:
        assert [step(cache, 5, 1) for cache in reversed(caches)] == after[::-1] and len(called) == 2
    finally:
        model.ops = reference  # type: ignore[assignment]
    assert step(caches[0], 5, 1) == after[0] and len(called) == 2


def test_ops_are_looked_up_once(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, decode_pass = [], model._decode_pass
    monkeypatch.setattr(model, "_decode_pass", lambda s, cache: passes.append(s.tokens.shape) or decode_pass(s, cache))
    generate(model, [3, 1], 6)
    assert passes == [(1, 2), (1, 1)]
    passes.clear()
    list(write(model, [[3], [4], [5, 6]], Sampling(5)))
    assert passes == [(1, 1), (1, 1), (1, 2), (3, 1)]


def test_a_cache_goes_when_nobody_holds_it(model: GPT2) -> None:
    cache = model.new_cache()
    gone = weakref.ref(cache)
    keys = weakref.ref(cache.layer(0).keys)
    model.decode(cache, np.array([[1]], np.int32), np.array([0], np.int32))
    del cache
    assert gone() is None and keys() is None
