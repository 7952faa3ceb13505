"""One token out of logits: what is left to choose from, as transformers has it, and the draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc import choice
from llmc.choice import Sampling, choose, remaining
from llmc.errors import ConfigError, DivergenceError


def left(scores: np.ndarray, **options: Any) -> np.ndarray:
    """(V,) probabilities of every token."""
    ids, weights = remaining(scores, Sampling(**options))
    found = np.zeros(scores.size)
    found[slice(None) if ids is None else ids] = weights
    return found / found.sum()


# ---- as transformers does it -----------------------------------------------------------------------

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.5},
    {"top_k": 900},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "temperature": 0.5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 0.9, "repetition_penalty": 1.2},
)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("V", [5, 1000, 50257])
def test_the_processors_of_transformers(V: int, spread: float, rng: np.random.Generator) -> None:
    """The same tokens are left, with the same probabilities, from few tokens and from many, peaked or nearly flat."""
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = (rng.normal(size=V) * spread).astype(np.float32)
    history = rng.integers(0, V, 30)
    seen = np.zeros(V, bool)
    seen[history] = True
    for options in OPTIONS:
        s = Sampling(**options)
        if s.top_k > V:
            continue
        # As in its generate(), and in that order.
        chain = [process.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)] if s.repetition_penalty != 1 else []
        chain += [process.TemperatureLogitsWarper(float(s.temperature))] if s.temperature != 1 else []
        chain += [process.TopKLogitsWarper(s.top_k)] if s.top_k else []
        chain += [process.TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
        chain += [process.MinPLogitsWarper(s.min_p)] if s.min_p else []
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for step in chain:
            scores = step(torch.from_numpy(history)[None], scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        ours = choice._penalised(logits, s.repetition_penalty, seen) if s.repetition_penalty != 1 else logits
        found = left(ours, **options)
        assert np.array_equal(found > 0, expected > 0), options
        # float32: the scores, their difference, its product with 1/temperature, exp; of a score of up to 13.
        assert np.all(np.abs(found - expected) <= 2e-5 * expected), options


def test_equal_scores_stand_or_fall_together() -> None:
    tied = np.array([0.0, 2.0, 1.0, 1.0, 1.0, -1.0], np.float32)
    assert np.flatnonzero(left(tied, top_k=2)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(left(tied, top_p=0.6)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(left(np.zeros(20000, np.float32), top_p=0.5)).size == 20000


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30000), st.floats(0.001, 0.999), st.sampled_from([0.01, 1.0, 30.0]), st.integers(0, 99))
def test_the_nucleus_is_the_smallest(V: int, top_p: float, spread: float, seed: int) -> None:
    """It makes up top_p, and without its least it would not."""
    scores = (np.random.default_rng(seed).normal(size=V) * spread).astype(np.float32)
    whole, kept = left(scores), left(scores, top_p=top_p) > 0
    least = whole[kept].min()
    assert not kept[whole < least].any() and kept[whole > least].all()
    assert whole[kept].sum() >= top_p - 1e-6
    assert whole[kept & (whole > least)].sum() <= top_p + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30000), st.integers(1, 600), st.integers(0, 99))
def test_the_kth_largest(V: int, k: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=V).round(2).astype(np.float32)
    k = min(k, V)
    assert choice._kth_largest(scores, k) == np.sort(scores)[-k]


# ---- the draw --------------------------------------------------------------------------------------


def draws(logits: list[float], count: int = 20000, **options: Any) -> np.ndarray:
    sampling = Sampling(**options)
    random, array = sampling.random(0), np.array(logits, dtype=np.float32)
    return np.bincount([choose(array, sampling, random) for _ in range(count)], minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    """Softmax of logits / temperature, to five standard deviations."""
    logits = [0.0, 1.0, -1.0, 2.0, 0.5]
    p = np.exp(np.array(logits) / temperature)
    p /= p.sum()
    assert np.all(np.abs(draws(logits, temperature=temperature) - p) < 5 * np.sqrt(p * (1 - p) / 20000))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12000), st.floats(0, 1, exclude_max=True), st.integers(0, 9))
def test_a_draw_is_a_place_in_the_running_sum(n: int, uniform: float, seed: int) -> None:
    """The token that a running sum over all of them finds, in double precision; at a border perhaps its neighbour."""
    random = np.random.default_rng(seed)
    weights = np.exp(random.normal(size=n) * 3).astype(np.float32)
    weights *= random.random(n) < 0.5
    weights[random.integers(n)] = 1
    sums = np.cumsum(weights, dtype=np.float64)
    place = choice._draw(weights, uniform)
    assert weights[place] > 0
    slack = 1e-5 * sums[-1]
    assert sums[place] - weights[place] - slack <= uniform * sums[-1] <= sums[place] + slack


def test_the_last_number_below_one_finds_a_token_that_can_be() -> None:
    for n in (10, 10000):
        weights = np.zeros(n, np.float32)
        weights[:3] = 0.1
        assert choice._draw(weights, np.nextafter(1.0, 0.0)) == 2
        assert choice._draw(weights, 0.0) == 0


def test_extreme_logits() -> None:
    assert draws([1e30, 0.0, -1e30], 10)[0] == 1
    assert draws([1.0, 2.0, 1.5], 10, temperature=1e-300)[1] == 1
    assert draws([1.0, 2.0, 1.5], 10, temperature=1e300).sum() == pytest.approx(1)


def test_greedy_takes_no_random_number() -> None:
    sampling = Sampling(temperature=0)
    random = sampling.random(0)
    assert choose(np.array([0.0, 3.0, 3.0], np.float32), sampling, random) == 1
    assert random.random() == sampling.random(0).random()


def test_the_penalty_leaves_the_logits_alone() -> None:
    logits, seen = np.array([2.0, 1.9, -1.0, -1.1], np.float32), np.array([True, False, True, False])
    kept = logits.copy()
    assert choose(logits, Sampling(temperature=0, repetition_penalty=1.5), None, seen) == 1  # type: ignore[arg-type]
    assert np.array_equal(logits, kept)
    assert choice._penalised(logits, 2.0, seen).tolist() == [1.0, np.float32(1.9), -2.0, np.float32(-1.1)]
    with pytest.raises(ConfigError, match="^repetition_penalty: "):
        choose(logits, Sampling(repetition_penalty=2.0), np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(wrong: float) -> None:
    logits = np.zeros(1000, np.float32)
    logits[700] = wrong
    with pytest.raises(DivergenceError, match="logits are not finite"):
        choose(logits, Sampling(temperature=0), np.random.default_rng(0))


def test_every_sequence_has_its_own_stream() -> None:
    numbers = {Sampling(seed=seed).random(i).random() for seed in (0, 1) for i in range(3)}
    assert len(numbers) == 6
    assert Sampling(seed=1).random(2).random() in numbers


# ---- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -1), ("max_new_tokens", 1.5), ("temperature", -0.1), ("temperature", float("nan")),
        ("temperature", float("inf")), ("top_k", -5), ("top_p", 0.0), ("top_p", 1.1), ("top_p", float("nan")),
        ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
        ("seed", -1), ("stop", ["", "x"]),
    ],
)  # fmt: skip
def test_options_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Sampling(**{field: value})


def test_one_stop_string_is_not_its_letters() -> None:
    assert Sampling(stop="end").stop == ("end",)
    assert Sampling(stop=["a", "b"], stop_ids=np.array([3])).stop_ids == (3,)
