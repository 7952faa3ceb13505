"""Sampling: what is drawn, from which window, and how text comes out of it."""

from __future__ import annotations

import numpy as np
import pytest
import reference

from llmc import sampling
from llmc.errors import ConfigError, DivergenceError
from llmc.gpt2 import GPT2, Config
from llmc.sampling import choose, generate, stream, stream_text
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


def test_seeds(model: GPT2) -> None:
    first = generate(model, [3], 40, seed=1)
    assert generate(model, [3], 40, seed=1) == first
    assert generate(model, [3], 40, seed=2) != first
    assert all(0 <= token < CONFIG.vocab_size for token in first)


def test_streaming_gives_the_same(model: GPT2) -> None:
    assert list(stream(model, [3], 10, seed=5)) == generate(model, [3], 10, seed=5)


def test_top_k_of_one_is_greedy(model: GPT2) -> None:
    assert generate(model, [3], 20, top_k=1) == generate(model, [3], 20, temperature=0)


def test_nothing_is_asked_for(model: GPT2) -> None:
    assert generate(model, [3], 0) == []


def test_an_empty_prompt_is_the_end_of_a_text(model: GPT2) -> None:
    assert generate(model, [], 5, seed=3) == generate(model, [CONFIG.vocab_size - 1], 5, seed=3)
    model.tokenizer = type("Tokenizer", (), {"eot": 7})()
    try:
        assert generate(model, [], 5, seed=3) == generate(model, [7], 5, seed=3)
    finally:
        model.tokenizer = None


def test_stop(model: GPT2) -> None:
    tokens = generate(model, [3], 20, seed=4)
    stop = tokens[7]
    assert generate(model, [3], 20, seed=4, stop=stop) == tokens[: tokens.index(stop)]


# ---- one draw --------------------------------------------------------------------------------------


def draws(logits: list[float], temperature: float, top_k: int, count: int = 20000) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64(0))
    array = np.array(logits, dtype=np.float32)
    return np.bincount([choose(array, temperature, top_k, random) for _ in range(count)], minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    """Softmax of logits / temperature, to five standard deviations."""
    logits = [0.0, 1.0, -1.0, 2.0, 0.5]
    p = np.exp(np.array(logits) / temperature)
    p /= p.sum()
    assert np.all(np.abs(draws(logits, temperature, 0) - p) < 5 * np.sqrt(p * (1 - p) / 20000))


def test_top_k() -> None:
    """Only the k likeliest, in their old proportion."""
    seen = draws([0.0, 3.0, -1.0, 2.0, 2.5], 1.0, 3)
    assert seen[0] == seen[2] == 0
    p = np.exp([3.0, 2.0, 2.5])
    assert seen[[1, 3, 4]] == pytest.approx(p / p.sum(), abs=0.02)
    assert np.count_nonzero(draws([0.0] * 5, 1.0, 2)) == 2
    assert np.count_nonzero(draws([0.0] * 5, 1.0, 99)) == 5


def test_extreme_logits() -> None:
    assert draws([1e30, 0.0, -1e30], 1.0, 0, 10)[0] == 1
    assert draws([1.0, 2.0, 1.5], 1e-300, 0, 10)[1] == 1


def test_logits_that_are_not_finite() -> None:
    for wrong in (np.nan, np.inf):
        with pytest.raises(DivergenceError, match="logits are not finite"):
            choose(np.array([0.0, wrong], dtype=np.float32), 0, 0, np.random.default_rng(0))


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_tokens_outside_the_vocabulary(model: GPT2, wrong: int) -> None:
    with pytest.raises(ConfigError, match=f"{wrong} at position 1 is outside the vocabulary of 50"):
        stream(model, [1, wrong])  # at the call: nothing was asked of the iterator


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", -1), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -5)]
)
def test_options_out_of_range(model: GPT2, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        stream(model, [1], **{field: value})  # type: ignore[arg-type]


# ---- text ------------------------------------------------------------------------------------------


def test_characters_come_whole() -> None:
    """One token per byte, and yet no half character."""
    text = "naïve: 語🙂!"
    pieces = list(stream_text(ByteTokenizer(), text.encode()))
    assert "".join(pieces) == text
    assert pieces == list(text)


def test_bytes_that_are_no_text() -> None:
    assert "".join(stream_text(ByteTokenizer(), [65, 0xFF, 66, 0xE8])) == "A\ufffdB\ufffd"


def test_end_of_text(model: GPT2) -> None:
    assert sampling.end_of_text(model) == 49
