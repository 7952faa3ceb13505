"""The embedded corpus: endless short stories from a seeded grammar, with their exact entropy.

Every story is one line of plain English in ASCII: somebody with a name, a kind and a pronoun, a day, a
thing or a meal or a fear, what went wrong and why, a friend who helped, and how it ended.  What was said
once comes back later (the name, the friend's name, the thing, the feeling), so a model has to look back.

    On a foggy Monday, Rosa the mole lost her shiny green drum. She looked under the bed, ...

Story `index` of a split is a function of (seed, split, index) alone.  Training and validation are two
independent streams of the same distribution; the grammar has some e^45 stories, so they share none in
practice, and what the ideal model achieves is the same for both.

The entropy is exact.  A story is a chain of choices, each uniform over a list of texts of which none is a
prefix of another, and the list depends on earlier choices alone.  So what has been written at any moment
tells every finished choice for certain, and of the choice under way that it is one of the texts that begin
like this: the probability of the next byte is the share of those that go on with it, and 1 between
choices.  That is the best any model can do; `Stories.floor` averages it over the windows that are served.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llmc.errors import ConfigError

Array = np.ndarray[Any, Any]

EOT = 256  # the byte tokenizer's id between texts
VOCAB_SIZE = 257
SHORTEST = 100  # bytes: every story is longer
SPLITS = ("train", "val")


# ---- telling ---------------------------------------------------------------------------------------


class Teller:
    """Writes a story down.  `number` holds all the chance there is, in mixed radix, lowest digit first."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[str] = []

    def say(self, text: str) -> None:
        """Text that follows from what was chosen before."""
        self.parts.append(text)

    def pick(self, options: Sequence[str], after: str = "") -> str:
        """One of `options`, all equally likely; it is written with `after` behind it, and returned.

        No option with `after` behind it may be a prefix of another: then the text tells which it was.
        """
        self.number, index = divmod(self.number, len(options))
        chosen = options[index]
        self.parts.append(chosen + after)
        return chosen

    @property
    def text(self) -> str:
        return "".join(self.parts)


class ScoringTeller(Teller):
    """A teller that also keeps, per byte, the logarithm of its probability under the grammar."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.log_probabilities: list[float] = []

    def say(self, text: str) -> None:
        super().say(text)
        self.log_probabilities += [0.0] * len(text)

    def pick(self, options: Sequence[str], after: str = "") -> str:
        chosen = super().pick(options, after)
        # Walk down the trie of the options: `alive` are those that begin as the chosen one does.
        written = chosen + after
        alive = [option + after for option in options]
        for place, letter in enumerate(written):
            if len(alive) == 1:
                self.log_probabilities += [0.0] * (len(written) - place)
                break
            going_on = [text for text in alive if text[place : place + 1] == letter]
            if any(len(text) == place for text in alive):
                raise ValueError(f"an option of {list(options)} is a prefix of {written!r}")
            self.log_probabilities.append(math.log(len(going_on) / len(alive)))
            alive = going_on
        if len(alive) != 1:
            raise ValueError(f"{written!r} is a prefix of another option, or is there twice")
        return chosen


# ---- words -----------------------------------------------------------------------------------------


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.replace("\n", " ").split(","))


# Short lists of short words: a small model must meet each of them often within a few million bytes.
_GIRLS = _list("""
    Mia, Lily, Anna, Rosa, Emma, Nora, Ella, Ivy, Lucy, Zoe, Ruby, Maya, Tess, Jane, Clara, Daisy, Olive,
    Poppy, Greta, Kate
""")
_BOYS = _list("""
    Tom, Ben, Max, Sam, Leo, Jack, Finn, Hugo, Oscar, Felix, Otto, Paul, Pete, Simon, Toby, Victor, Adam,
    Bruno, Gus, Henry
""")
_NAMES = _GIRLS + _BOYS
_IS_GIRL = frozenset(_GIRLS)
_KINDS = _list("""
    fox, bear, rabbit, mouse, cat, dog, duck, frog, hen, pig, goat, lamb, hedgehog, squirrel, badger, mole,
    otter, beaver, deer, panda, owl, turtle, pony, crow
""")
_WEATHERS = _list("sunny, rainy, windy, warm, cold, foggy, snowy, cloudy, bright, quiet, stormy, mild")
_TIMES = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, morning, afternoon, evening")
_PLACES = _list("""
    river, lake, pond, forest, meadow, market, mill, farm, beach, hill, park, village, barn, bridge, garden,
    school, castle, station, bakery, tower
""")
_A_SIZES = _list("""
    a small, a big, an old, a new, a tiny, a shiny, a pretty, a funny, a plain, a huge, a lovely, an ugly
""")
_SIZES = tuple(size.split(" ", 1)[1] for size in _A_SIZES)
_COLOURS = _list("red, blue, green, yellow, orange, purple, pink, brown, black, white, grey, golden")
_FEELINGS = _list("""
    sad, upset, worried, cross, unhappy, gloomy, angry, tearful, glum, lonely, grumpy, annoyed
""")
_ACTIVITIES = _list("""
    fishing, reading, singing, baking, knitting, picking plums, chopping wood, digging a hole, taking a nap,
    counting clouds, drinking tea, eating soup, playing chess, planting beans, mending a net, flying a kite
""")
_ARRIVALS = _list("came over, ran up, stopped, saw it, got up, hurried over, looked up, turned round")
_FOODS = _list("""
    bread, honey, jam, cheese, milk, plums, apples, pears, nuts, soup, cake, pie, tea, rice, beans, carrots,
    berries, cherries, grapes, eggs, butter, toast, melon, corn
""")
_SPOTS = _list("""
    under the bed, behind the door, in the barn, on the roof, in the attic, by the well, by the pond,
    under the stairs, behind the mill, in the kitchen, on the shelf, in the oven, near the gate, in the grass,
    up in a tree, in the bath, by the river, on the swing, behind the shed, in the hay
""")
_FLAVOURS = _list("""
    a plum, an apple, a pear, a cherry, a carrot, a nut, a lemon, an orange, a peach, a honey, a ginger,
    a berry
""")
_PASTRIES = _list("cake, pie, tart, pudding")
_INGREDIENTS = _list("flour, eggs, butter, milk, sugar, cream, salt, yeast, oats, syrup, raisins, cocoa")
_MISHAPS = _list("""
    missed lunch, lost the way, torn a coat, broken a cup, lost a race, slept badly, missed the bus,
    burnt the toast, spilt the milk, hurt a toe, had a bad dream, come too late, found no friends, lost a key,
    got wet feet, sat on a thistle
""")

# What can go wrong with a thing, and two ways to put it right.
_Troubles = dict[str, tuple[str, str]]
_CLOTH: _Troubles = {
    "tore on a nail": ("sewed it up", "put a patch on it"),
    "fell in the mud": ("washed it with soap", "scrubbed it clean"),
    "blew into a tree": ("shook it down", "fetched a ladder"),
}
_WHEELS: _Troubles = {
    "lost a wheel": ("put on a new one", "made one from a plate"),
    "rolled into a ditch": ("pulled it out", "pushed it back up"),
    "would not move": ("oiled the wheels", "gave it a big push"),
}
_MUSIC: _Troubles = {
    "made no sound": ("blew the dust out", "shook a pea out of it"),
    "fell off a bench": ("tapped out the dent", "made it whole again"),
    "filled with sand": ("tipped the sand out", "brushed it clean"),
}
_DISHES: _Troubles = {
    "fell and broke": ("glued it together", "fixed it with clay"),
    "rolled under a shed": ("raked it out", "crawled in for it"),
    "sank in a pond": ("dived in for it", "fished it out"),
}
_TOYS: _Troubles = {
    "landed on a roof": ("climbed up for it", "knocked it down"),
    "got stuck in a hedge": ("cut the twigs", "pulled it free"),
    "floated downstream": ("waded in for it", "caught it with a net"),
}
_TROUBLES: dict[str, _Troubles] = {
    **dict.fromkeys(_list("scarf, coat, hat, blanket, flag, glove"), _CLOTH),
    **dict.fromkeys(_list("cart, bike, wagon, scooter, pram, truck"), _WHEELS),
    **dict.fromkeys(_list("drum, flute, fiddle, horn, bell, trumpet"), _MUSIC),
    **dict.fromkeys(_list("cup, jug, bowl, teapot, vase, bucket"), _DISHES),
    **dict.fromkeys(_list("ball, kite, boat, doll, hoop, plane"), _TOYS),
}
_THINGS = tuple(_TROUBLES)


class _Fear(NamedTuple):
    """Three reasons to be afraid, and three things a friend does; {her} is her or him."""

    reasons: tuple[str, str, str]
    cures: tuple[str, str, str]


_LOUD = _Fear(
    ("The noise is so loud", "My ears hurt", "I jump every time"),
    ("sang louder than that", "gave {her} ear muffs", "told {her} what it was"),
)
_DARK = _Fear(
    ("I cannot see a thing", "Something may hide there", "It feels so empty"),
    ("brought a lantern", "went in and whistled", "walked beside {her}"),
)
_HIGH = _Fear(
    ("I am sure to slip", "It is a long way down", "My knees are shaking"),
    ("tied a rope to {her}", "went ahead and waved", "held {her} tight"),
)
_ALIVE = _Fear(
    ("They might bite", "They look so strange", "I think they hate me"),
    ("showed {her} a friendly one", "drew one with a smile", "fed them crumbs"),
)
_FEARS_OF: dict[str, _Fear] = {
    **dict.fromkeys(_list("thunder, the bell, the train, drums"), _LOUD),
    **dict.fromkeys(_list("the dark, the cellar, the cave, the night"), _DARK),
    **dict.fromkeys(_list("the cliff, the slide, the ladder, the swing"), _HIGH),
    **dict.fromkeys(_list("bees, spiders, bats, crabs"), _ALIVE),
}
_FEARS = tuple(_FEARS_OF)


# ---- the stories -----------------------------------------------------------------------------------


class _Person(NamedTuple):
    name: str
    kind: str
    she: str  # she or he
    her: str  # her or him
    hers: str  # her or his

    @property
    def She(self) -> str:
        return self.she.capitalize()


def _person(t: Teller, other: _Person | None, after: str) -> _Person:
    """Somebody, with another name and kind than `other`: "Mia the fox"."""
    name = t.pick(_NAMES if other is None else [n for n in _NAMES if n != other.name], " the ")
    kind = t.pick(_KINDS if other is None else [k for k in _KINDS if k != other.kind], after)
    return _Person(name, kind, *(("she", "her", "her") if name in _IS_GIRL else ("he", "him", "his")))


def _friend(t: Teller, hero: _Person, after: str) -> _Person:
    """Somebody comes along: "Soon Ben the owl"."""
    t.pick(("Then", "Soon", "Just then", "Luckily"), " ")
    return _person(t, hero, after)


def _meal(t: Teller, after: str) -> str:
    """Two things to eat: "bread and honey"."""
    first = t.pick(_FOODS, " and ")
    second = t.pick([food for food in _FOODS if food != first], after)
    return f"{first} and {second}"


def _mend(t: Teller, hero: _Person) -> None:
    """A thing breaks or gets away, and a friend puts it right."""
    t.say(f"{hero.hers} ")
    t.pick(_SIZES, " ")
    t.pick(_COLOURS, " ")
    thing = t.pick(_THINGS, " to the ")
    t.pick(_PLACES, ". But ")
    t.pick(("it", f"the {thing}"), " ")
    troubles = _TROUBLES[thing]
    trouble = t.pick(tuple(troubles), ", ")
    t.pick([f"{word} {who}" for word in ("and", "so") for who in (hero.name, hero.she)], " was ")
    feeling = t.pick(_FEELINGS, ". ")
    friend = _friend(t, hero, " ")
    t.pick(_ARRIVALS, " and ")
    t.pick(troubles[trouble], ". ")
    endings = {
        f"{hero.name} was {feeling} no more, and they had": ".",
        "They had": f", and {hero.name} was {feeling} no more.",
        f"No longer {feeling}, {hero.name} gave {friend.her}": ".",
        f'"Thank you, {friend.name}!" said {hero.name} and gave {friend.her}': ".",
    }
    beginning = t.pick(tuple(endings), " ")
    _meal(t, endings[beginning])


def _share(t: Teller, hero: _Person) -> None:
    """A friend is met who feels bad, and is given something to eat."""
    meal = _meal(t, ". ")
    t.pick((f"Then {hero.she} met", f"On the way {hero.she} met", f"Soon {hero.name} met", "Along came"), " ")
    friend = _person(t, hero, ", who was ")
    feeling = t.pick(_FEELINGS, f" because {friend.she} had ")
    t.pick(_MISHAPS, ". ")
    t.pick(
        (
            f'"Have some {meal}," said {hero.name}.',
            f'"Try my {meal}," said {hero.name}.',
            f"So {hero.name} shared the {meal}.",
            f"So {hero.name} gave {friend.her} the {meal}.",
        ),
        " ",
    )
    t.pick(
        (
            f"Soon {friend.name} was {feeling} no more and gave {hero.her}",
            f"{friend.She} was {feeling} no more and gave {hero.name}",
            f"No longer {feeling}, {friend.name} gave {hero.her}",
            f"To thank {hero.her}, {friend.name} gave {hero.her}",
        ),
        " ",
    )
    t.pick(_A_SIZES, " ")
    t.pick(_COLOURS, " ")
    t.pick(_THINGS, ".")


def _comfort(t: Teller, hero: _Person) -> None:
    """Somebody is afraid, and a friend knows what to do."""
    fear = t.pick(_FEARS, '. "')
    reasons, cures = _FEARS_OF[fear]
    t.pick(reasons, ',"')
    t.pick((f" {hero.she} said", f" said {hero.name}", f" {hero.she} cried", f" cried {hero.name}"), ". ")
    friend = _friend(t, hero, ", who was ")
    t.pick(_ACTIVITIES, ", ")
    t.pick([cure.format(her=hero.her) for cure in cures], ". ")
    endings = {
        f"{hero.name} feared {fear} no more, and they had": ".",
        "They had": f", and {hero.name} feared {fear} no more.",
        f"No longer afraid, {hero.name} gave {friend.her}": ".",
        f'"Thank you, {friend.name}!" said {hero.name} and gave {friend.her}': ".",
    }
    beginning = t.pick(tuple(endings), " ")
    _meal(t, endings[beginning])


def _search(t: Teller, hero: _Person) -> None:
    """A thing is looked for in three places and is in a fourth."""
    t.say(f"{hero.hers} ")
    t.pick(_SIZES, " ")
    colour = t.pick(_COLOURS, " ")
    thing = t.pick(_THINGS, f". {hero.She} looked ")
    left = list(_SPOTS)
    left.remove(t.pick(left, ", "))
    left.remove(t.pick(left, " and "))
    left.remove(t.pick(left, ", but "))
    t.pick(("it was not there", "could not find it", "found nothing", "in vain"), ". ")
    friend = _friend(t, hero, " found it ")
    spot = t.pick(left, ". ")
    t.pick(
        (
            f"It had been {spot} all the time!",
            f"{hero.name} hugged the {colour} {thing} and thanked {friend.name}.",
            f'"So it was {spot}!" said {hero.name}.',
            f'"My {thing}!" said {hero.name}. "Thank you, {friend.name}!"',
        )
    )


def _bake(t: Teller, hero: _Person) -> None:
    """A treat to cheer a friend up lacks one ingredient, which has a price."""
    flavour = t.pick(_FLAVOURS, " ").split(" ", 1)[1]
    pastry = t.pick(_PASTRIES, " for ")
    friend = _person(t, hero, ", who was ")
    feeling = t.pick(_FEELINGS, f". {hero.She} had ")
    first = t.pick(_INGREDIENTS, " and ")
    second = t.pick([i for i in _INGREDIENTS if i != first], ", but no ")
    third = t.pick([i for i in _INGREDIENTS if i not in (first, second)], ". ")
    t.pick(
        (f"So {hero.she} gave", f"{hero.name} swapped", f"So {hero.name} sold", f"{hero.She} traded"),
        f" {hero.hers} ",
    )
    t.pick(_SIZES, " ")
    t.pick(_COLOURS, " ")
    t.pick(_THINGS, f" for {third}. ")
    t.pick(
        (
            f"{friend.name} ate the {flavour} {pastry} and was {feeling} no more.",
            f'"What a good {flavour} {pastry}!" said {friend.name}, no longer {feeling}.',
            f"Soon {friend.name} had the {flavour} {pastry} and was {feeling} no more.",
            f"After the {flavour} {pastry} {friend.name} was {feeling} no more.",
        )
    )


# By the words that begin them, which tell them apart.
PLOTS: dict[str, Callable[[Teller, _Person], None]] = {
    "took": _mend,
    "packed": _share,
    "was afraid of": _comfort,
    "lost": _search,
    "wanted to bake": _bake,
}


def tell(t: Teller, plot: str | None = None) -> None:
    """One story, of any plot or of the one named."""
    t.pick(("On a", "One"), " ")
    t.pick(_WEATHERS, " ")
    t.pick(_TIMES, ", ")
    hero = _person(t, None, " ")
    if plot is None:
        plot = t.pick(tuple(PLOTS), " ")
    else:
        t.say(plot + " ")
    PLOTS[plot](t, hero)
    t.say("\n")


def story(seed: int, split: str, index: int) -> str:
    """Story `index` of a split, one line; always the same for the same arguments."""
    teller = Teller(_number(seed, split, index))
    tell(teller)
    return teller.text


def scored_story(seed: int, split: str, index: int) -> tuple[str, Array]:
    """The same, and float64 log p(byte | story so far) in nats for every byte."""
    teller = ScoringTeller(_number(seed, split, index))
    tell(teller)
    return teller.text, np.array(teller.log_probabilities)


def story_entropy() -> float:
    """Entropy of one story in nats, exactly.

    Stories of one plot are all equally likely, because how many options a choice has depends on the plot
    alone; so it is log(plots) and the mean over plots of -log p(any story of it).
    """
    total = 0.0
    for plot in PLOTS:
        teller = ScoringTeller(0)
        tell(teller, plot)
        total -= sum(teller.log_probabilities)
    return math.log(len(PLOTS)) + total / len(PLOTS)


def _number(seed: int, split: str, index: int) -> int:
    """512 pseudo-random bits; a story uses up about 80, so picks by remainder are uniform to 1e-100."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {split} {index}".encode()).digest(), "little")


# ---- windows ---------------------------------------------------------------------------------------


class Stories:
    """Batches of B windows of T tokens, without end.

    A window is the end-of-text id, a story, end-of-text, the next story and so on, T+1 ids of the byte
    tokenizer in all, cut off where it ends; so the context that a story needs is always in its window.
    Every window begins a new story, and no story is served twice within a split.

    `num_batches` and `num_tokens` are None: there is always more.
    """

    num_batches: None = None
    num_tokens: None = None
    vocab_size = VOCAB_SIZE

    def __init__(self, B: int, T: int, *, seed: int = 0, split: str = "train") -> None:
        for name, value in (("batch size", B), ("sequence length", T)):
            if value < 1:
                raise ConfigError(name, f"{value} is not positive")
        if split not in SPLITS:
            raise ConfigError("split", f"{split!r}; choose from {', '.join(SPLITS)}")
        self.B, self.T, self.seed, self.split = B, T, seed, split
        self._batch = 0

    @staticmethod
    def nbytes(B: int, T: int) -> tuple[int, int]:
        """Bytes of one batch, tokens and targets, and of the order of batches, which is none."""
        return 2 * 4 * B * T, 0

    def reset(self) -> None:
        """Begin again at the first batch."""
        self._batch = 0

    def next(self) -> tuple[Array, Array]:
        """The next batch: tokens and targets, both int32 (B,T), C-contiguous and new in every call."""
        windows = np.empty((self.B, self.T + 1), dtype=np.int32)
        for row in range(self.B):
            self._fill(windows[row], self._batch * self.B + row)
        self._batch += 1
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def state(self) -> dict[str, int | str | None]:
        """Where the reader stands, in values that JSON can hold; `restore` goes back there."""
        return {"batch": self._batch, **self._identity()}

    def restore(self, state: dict[str, int | str | None]) -> None:
        """Go to where `state()` was taken; ConfigError where shape, seed or split are not the same."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError("data state", f"{name} was {state.get(name)} when saved and is {value} now")
        batch = state.get("batch")
        if not isinstance(batch, int) or batch < 0:
            raise ConfigError("data state", f"batch {batch} is no whole number")
        self._batch = batch

    def floor(self, num_batches: int, first: int = 0) -> float:
        """The least mean loss possible, in nats per target, on batches first to first + num_batches.

        The mean of -log p(target | everything before it in its window) under the grammar itself: what the
        ideal model gets on the very windows that `next` serves after `reset` (for first = 0).
        """
        if num_batches < 1:
            raise ConfigError("num_batches", f"{num_batches} is not positive")
        total = 0.0
        for window in range(first * self.B, (first + num_batches) * self.B):
            room, index = self.T, self._first_story(window)
            while room > 0:
                text, log_probabilities = scored_story(self.seed, self.split, index)
                total -= float(log_probabilities[:room].sum())
                room -= len(text) + 1  # end-of-text after a story is certain: nothing to add
                index += 1
        return total / (num_batches * self.B * self.T)

    def _identity(self) -> dict[str, int | str | None]:
        return {"batch_size": self.B, "sequence_length": self.T, "seed": self.seed, "split": self.split}

    def _first_story(self, window: int) -> int:
        # Windows have stories of their own, however many fit: any batch can be made without the others.
        return window * (self.T // SHORTEST + 1)

    def _fill(self, row: Array, window: int) -> None:
        """Write one window into an int32 vector of T+1."""
        at, index = 0, self._first_story(window)
        while at < len(row):
            row[at] = EOT
            text = np.frombuffer(story(self.seed, self.split, index).encode("ascii"), dtype=np.uint8)
            text = text[: len(row) - at - 1]
            row[at + 1 : at + 1 + len(text)] = text
            at += 1 + len(text)
            index += 1
