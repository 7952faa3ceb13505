"""The embedded stories: that they are what they promise, and that their entropy is exact.

The entropy is judged in three ways that share no code with it: by listing every story of small grammars,
by counting in many stories, and by coding stories with other distributions, none of which may do better.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest

from llmc import stories
from llmc.errors import ConfigError
from llmc.stories import EOT, PLOTS, ScoringTeller, Stories, Teller, scored_story, story, story_entropy, tell

MANY = [story(7, "train", i) for i in range(4000)]


# ---- the probabilities -----------------------------------------------------------------------------


def every_story(grammar: Callable[[Teller], object]) -> dict[str, float]:
    """All texts of a grammar with their probabilities: picks are made like an odometer's digits."""
    found: dict[str, float] = defaultdict(float)

    class Odometer(Teller):
        def pick(self, options: list[str], after: str = "") -> str:  # type: ignore[override]
            place = len(sizes)
            sizes.append(len(options))
            if place == len(digits):
                digits.append(0)
            self.parts.append(options[digits[place]] + after)
            return options[digits[place]]

    digits: list[int] = []
    while True:
        sizes: list[int] = []
        teller = Odometer(0)
        grammar(teller)
        found[teller.text] += 1 / math.prod(sizes)
        while digits and digits[-1] == sizes[len(digits) - 1] - 1:
            digits.pop()
        if not digits:
            return dict(found)
        digits[-1] += 1


def by_listing(texts: dict[str, float], text: str) -> list[float]:
    """log p of every byte of `text`, from the list of all texts."""
    mass = [sum(p for other, p in texts.items() if other.startswith(text[:n])) for n in range(len(text) + 1)]
    return [math.log(after / before) for before, after in itertools.pairwise(mass)]


def small(t: Teller) -> None:
    """Options that begin alike, lists that depend on choices, text that repeats them."""
    name = t.pick(("Tom", "Tommy", "Tim", "Ben"), " ")
    t.say("has ")
    thing = t.pick(("a cat", "a cart", "an owl", "nothing"), ".")
    if thing == "nothing":
        t.pick((f" Poor {name}", " Poor thing", " So it goes"), "!")
    else:
        t.say(f" {name} likes {thing}")
        t.pick(("", " a lot", " a little", " best"), ".")


@pytest.mark.parametrize(
    "grammar",
    [
        small,
        lambda t: t.pick(("a", "b", "c")),
        lambda t: t.pick(("only",)),
        lambda t: t.say("fixed"),
        lambda t: stories._person(t, None, "."),
    ],
)
def test_probabilities_equal_those_of_the_list_of_all_stories(grammar: Callable[[Teller], object]) -> None:
    texts = every_story(grammar)
    assert sum(texts.values()) == pytest.approx(1)
    seen: set[str] = set()
    for number in range(0, 5000, 7):
        teller = ScoringTeller(number)
        grammar(teller)
        if teller.text in seen or len(seen) == 100:
            continue
        seen.add(teller.text)
        assert teller.log_probabilities == pytest.approx(by_listing(texts, teller.text), abs=1e-12)
        assert sum(teller.log_probabilities) == pytest.approx(math.log(texts[teller.text]))


def test_every_byte_is_scored_and_a_whole_story_has_the_product_of_its_choices() -> None:
    class Counting(Teller):
        total = 0.0

        def pick(self, options: list[str], after: str = "") -> str:  # type: ignore[override]
            self.total -= math.log(len(options))
            return super().pick(options, after)

    for index in range(300):
        text, scores = scored_story(3, "val", index)
        teller = Counting(stories._number(3, "val", index))
        tell(teller)
        assert teller.text == text == story(3, "val", index)
        assert len(scores) == len(text)
        assert scores.dtype == np.float64
        assert (scores <= 0).all()
        assert scores.sum() == pytest.approx(teller.total)


@pytest.mark.parametrize(
    ("options", "pick"),
    [
        (("Tom", "Tommy"), 0),
        (("Tom", "Tommy"), 1),
        (("same", "same"), 0),
        (("", "a"), 0),
        (("", "a"), 1),
        (("a", "b", "ab"), 2),
    ],
)
def test_options_that_a_reader_could_not_tell_apart_are_refused(options: tuple[str, ...], pick: int) -> None:
    with pytest.raises(ValueError, match="prefix"):
        ScoringTeller(pick).pick(options)
    if len(set(options)) == len(options):
        ScoringTeller(pick).pick(options, ".")  # what follows tells them apart


def test_no_list_of_the_grammar_has_options_that_cannot_be_told_apart() -> None:
    """Every option of every list that 3,000 stories meet, not only those picked."""
    met = set()

    class Checking(Teller):
        def pick(self, options: list[str], after: str = "") -> str:  # type: ignore[override]
            written = tuple(sorted(option + after for option in options))
            if written not in met:
                met.add(written)
                # In sorted order a prefix stands directly before something it begins.
                for one, next_one in itertools.pairwise(written):
                    assert not next_one.startswith(one), (one, next_one)
            return super().pick(options, after)

    for index in range(3000):
        tell(Checking(stories._number(0, "train", index)))
    assert len(met) > 5000


def test_frequencies_agree_with_probabilities() -> None:
    """After a beginning that many stories share, each next letter comes as often as is said."""
    scores = {}
    for index in range(2000):
        text, logs = scored_story(7, "train", index)
        for n in (0, 3, 4):
            scores[text[: n + 1]] = logs[n]
    checked = 0
    for beginning in {text[:-1] for text in scores}:
        followers = Counter(text[len(beginning)] for text in MANY if text.startswith(beginning))
        total = sum(followers.values())
        if total < 300:
            continue
        for letter, count in followers.items():
            p = math.exp(scores.get(beginning + letter, -math.inf))
            assert abs(count / total - p) < 5 * math.sqrt(p * (1 - p) / total) + 1e-9, (beginning, letter)
            checked += 1
    assert checked >= 12


def test_story_entropy_is_what_stories_cost() -> None:
    costs = [-scored_story(11, "train", index)[1].sum() for index in range(3000)]
    error = np.std(costs) / math.sqrt(len(costs))
    assert error > 0
    assert abs(np.mean(costs) - story_entropy()) < 4 * error


def test_stories_of_one_plot_are_equally_likely() -> None:
    """`story_entropy` rests on it."""
    for plot in PLOTS:
        costs = []
        for index in range(200):
            teller = ScoringTeller(stories._number(0, "train", index))
            tell(teller, plot)
            costs.append(sum(teller.log_probabilities))
        assert np.ptp(costs) < 1e-9


# ---- the floor -------------------------------------------------------------------------------------


def test_the_floor_is_the_ideal_model_s_loss_on_the_windows_served() -> None:
    """Put together again from the windows themselves, byte by byte, with a table of all stories in them."""
    B, T, batches = 3, 300, 4
    reader = Stories(B, T, seed=5, split="val")
    total, count = 0.0, 0
    for batch in range(batches):
        x, y = reader.next()
        for row in range(B):
            ids = [int(x[row, 0]), *y[row].tolist()]
            index = (batch * B + row) * (T // stories.SHORTEST + 1)
            cost: list[float] = []
            while len(cost) < len(ids):
                text, scores = scored_story(5, "val", index)
                cost += [0.0, *-scores]
                position = len(cost) - len(text) - 1
                assert ids[position : len(cost)] == [EOT, *text.encode()][: len(ids) - position]
                index += 1
            total += sum(cost[1 : len(ids)])
            count += T
    assert reader.floor(batches) == pytest.approx(total / count, rel=1e-12)


def test_parts_of_the_floor_average_to_the_whole() -> None:
    reader = Stories(4, 100, seed=1, split="val")
    parts = [reader.floor(1, first=batch) for batch in range(5)]
    assert reader.floor(5) == pytest.approx(np.mean(parts))
    assert len(set(parts)) == 5
    with pytest.raises(ConfigError, match="num_batches"):
        reader.floor(0)


def test_the_floor_does_not_move_the_reader_and_is_the_same_for_any_shape_of_batch() -> None:
    reader = Stories(4, 100, seed=1, split="val")
    assert reader.floor(3) == pytest.approx(Stories(12, 100, seed=1, split="val").floor(1))
    assert (reader.next()[0] == Stories(4, 100, seed=1, split="val").next()[0]).all()


def test_the_floor_lies_where_a_small_model_can_come_near() -> None:
    floor = Stories(16, 256, seed=0, split="val").floor(10)
    assert 0.18 < floor < 0.5
    # Windows hold more of the unpredictable beginnings, fewer of the predictable ends.
    lengths = [len(text) + 1 for text in MANY]
    assert story_entropy() / np.mean(lengths) < floor < 1.3 * story_entropy() / np.mean(lengths)


def test_no_other_distribution_does_better() -> None:
    """Models that know less lose, each more than one that knows more; on the very windows."""
    T = 256
    train = Stories(16, T, seed=0, split="train")
    windows = [train.next() for _ in range(60)]
    held_out = Stories(16, T, seed=0, split="val")
    floor = held_out.floor(8)
    losses = []
    for order in (0, 1, 2, 4):
        counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for x, y in windows:
            for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
                for t in range(T):
                    counts[tuple(tokens[max(0, t + 1 - order) : t + 1])][targets[t]] += 1
        held_out.reset()
        total = 0.0
        for _ in range(8):
            x, y = held_out.next()
            for tokens, targets in zip(x.tolist(), y.tolist(), strict=True):
                for t in range(T):
                    seen = counts.get(tuple(tokens[max(0, t + 1 - order) : t + 1]), Counter())
                    total -= math.log((seen[targets[t]] + 0.01) / (seen.total() + 0.01 * stories.VOCAB_SIZE))
        losses.append(total / (8 * 16 * T))
    assert losses[0] > losses[1] > losses[2] > losses[3] > floor + 0.05


# ---- the windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "T"), [(1, 1), (2, 7), (3, 256), (2, 1000)])
def test_windows(B: int, T: int) -> None:
    """Each begins with end-of-text and a story, holds whole stories but for the last, and goes to its end."""
    reader = Stories(B, T, seed=2)
    seen: set[str] = set()
    for _ in range(4):
        x, y = reader.next()
        for array in (x, y):
            assert array.shape == (B, T)
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        assert (x[:, 1:] == y[:, :-1]).all()
        assert (x[:, 0] == EOT).all()
        for row in range(B):
            ids = [*x[row].tolist(), int(y[row, -1])]
            texts = bytes(i if i != EOT else 0 for i in ids).decode("ascii").split("\0")[1:]
            assert all(text[-2] in '.!"' for text in texts[:-1])
            assert not seen & set(texts[:-1])
            seen.update(texts[:-1])


def test_batches_are_new_arrays() -> None:
    reader = Stories(2, 20)
    x, y = reader.next()
    before = x.copy(), y.copy()
    reader.next()
    assert (x == before[0]).all()
    assert (y == before[1]).all()


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    def first(seed: int, split: str) -> bytes:
        return Stories(2, 300, seed=seed, split=split).next()[0].tobytes()

    assert first(1, "train") == first(1, "train")
    assert len({first(seed, split) for seed in (0, 1, -1, 2**80) for split in ("train", "val")}) == 8


def test_training_and_validation_share_no_story() -> None:
    train = {story(0, "train", index) for index in range(4000)}
    val = {story(0, "val", index) for index in range(4000)}
    assert len(train) == len(val) == 4000
    assert not train & val


def test_stories_do_not_change_between_versions() -> None:
    """Written down: a seed must give the same run next year."""
    assert story(0, "train", 0) == FIRST
    assert story(0, "val", 10**12).encode("ascii")


FIRST = (
    "On a rainy Sunday, Ruby the dog packed toast and eggs. Soon Ruby met Mia the beaver, who was "
    "lonely because she had missed lunch. So Ruby shared the toast and eggs. She was lonely no more and"
    " gave Ruby a big pink ball.\n"
)


def test_reset_and_state() -> None:
    reader = Stories(2, 50, seed=4)
    first = [reader.next()[0].tolist() for _ in range(5)]
    state = json.loads(json.dumps(reader.state()))
    following = reader.next()[0].tolist()
    reader.reset()
    assert [reader.next()[0].tolist() for _ in range(5)] == first
    other = Stories(2, 50, seed=4)
    other.restore(state)
    assert other.next()[0].tolist() == following
    for wrong in (
        Stories(3, 50, seed=4),
        Stories(2, 51, seed=4),
        Stories(2, 50),
        Stories(2, 50, seed=4, split="val"),
    ):
        with pytest.raises(ConfigError, match="data state"):
            wrong.restore(state)
    with pytest.raises(ConfigError, match="data state: batch"):
        other.restore({**state, "batch": -1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5), "batch size"), ((5, 0), "sequence length")],
)
def test_windows_without_tokens_are_refused(arguments: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stories(*arguments)
    with pytest.raises(ConfigError, match="split"):
        Stories(1, 1, split="test")


def test_generating_is_fast() -> None:
    """The 3 million tokens of a run must be a small part of it; the limits are ten times the usual."""
    reader = Stories(16, 256)
    began = time.process_time()
    for _ in range(25):
        reader.next()
    assert time.process_time() - began < 1.0  # 100 thousand tokens
    began = time.process_time()
    reader.floor(20)
    assert time.process_time() - began < 3.0


# ---- the prose -------------------------------------------------------------------------------------


def test_stories_are_single_lines_of_ascii_that_fit_a_window() -> None:
    lengths = [len(text) for text in MANY]
    for text in MANY:
        assert text.isascii()
        assert text.endswith("\n")
        assert text.count("\n") == 1
        assert "  " not in text
        assert "{" not in text
    assert min(lengths) > stories.SHORTEST
    assert 200 < np.mean(lengths) < 245
    assert max(lengths) < 280
    assert np.mean(np.array(lengths) > 255) < 0.01  # a window of 256 holds nearly every story whole


def test_articles_agree() -> None:
    for text in MANY:
        for article, word in re.findall(r"\b(a|an) (\w+)", text):
            assert (article == "an") == (word[0] in "aeiou"), text


def test_pronouns_agree_with_names() -> None:
    """The hero is the first named; plots with "took", "lost" and some others say her or his at once."""
    for text in MANY:
        hero = re.match(r"O\w+(?: a)? \w+ \w+, (\w+) the", text)
        assert hero is not None, text
        girl = hero[1] in stories._IS_GIRL
        own = re.search(r"(?:took|lost|swapped|sold|traded) (her|his) \w+ \w+ \w+", text)
        if own:
            assert own[1] == ("her" if girl else "his"), text
        friend = re.search(r"(\w+) the \w+, who was \w+ because (she|he) ", text)
        if friend:
            assert friend[2] == ("she" if friend[1] in stories._IS_GIRL else "he"), text


def test_what_was_said_once_comes_back() -> None:
    """Names, feelings, things, places and meals are kept, and the cure fits the trouble."""
    plots: Counter[str] = Counter()
    for text in MANY:
        names = re.findall(r"(\w+) the \w+", text)
        hero, friend = names[0], next(name for name in names[1:] if name[0].isupper())
        assert hero != friend, text
        plot = re.search(r"the \w+ (took|packed|was afraid of|lost|wanted to bake) ", text)
        assert plot is not None, text
        plots[plot[1]] += 1
        if plot[1] == "took":
            thing, trouble = re.findall(r"\w+ \w+ (\w+) to the \w+\. But (?:it|the \w+) ([\w ]+),", text)[0]
            cure = re.search(f" (?:{'|'.join(stories._ARRIVALS)}) and ([a-z ]+)\\. ", text)
            assert cure is not None
            assert cure[1] in stories._TROUBLES[thing][trouble], text
        if plot[1] == "packed":
            meal = re.findall(r"packed (\w+ and \w+)\.", text)[0]
            assert text.count(meal) == 2, text
        if plot[1] == "was afraid of":
            fear, reason = re.findall(r"was afraid of ([\w ]+)\. \"([\w ]+),\"", text)[0]
            assert reason in stories._FEARS_OF[fear].reasons, text
        if plot[1] == "lost":
            one, two, three, found = re.findall(
                r"looked ([\w ]+), ([\w ]+) and ([\w ]+), but .* found it ([\w ]+)\.", text
            )[0]
            assert len({one, two, three, found}) == 4, text
        if plot[1] == "wanted to bake":
            treat, missing = re.findall(r"bake an? (\w+ \w+) for .* but no (\w+)\.", text)[0]
            assert text.count(treat) == 2, text
            assert f" for {missing}. " in text, text
        feelings = set(stories._FEELINGS) & set(re.findall(r"\w+", text))
        assert len(feelings) <= 1, text
    assert set(plots) == set(PLOTS)
    assert min(plots.values()) > 0.8 * len(MANY) / len(PLOTS)
