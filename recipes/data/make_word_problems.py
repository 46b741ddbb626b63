"""Write the quickstart's data: word problems with worked answers, one JSONL file to train on and one held out.

    python recipes/data/make_word_problems.py [FOLDER]

Each row has a `question` and an `answer`; the answer writes every step as "a op b = c" and ends "The answer is: N".
The files depend on nothing but this script, so running it again gives the same bytes. No held-out question, and no
held-out combination of numbers within a kind of problem, occurs in the training file.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

SEED = 20250514
TRAIN_ROWS_PER_FAMILY = 200
HELDOUT_ROWS_PER_FAMILY = 20
TRAIN_FILE = "word_problems.jsonl"
HELDOUT_FILE = "word_problems_heldout.jsonl"

HIGHEST_NUMBER = 199
"""No number of a problem, intermediate results included, is above this."""

SHE = ("Mia", "Anna", "Zoe", "Lucy", "Emma", "Nina", "Ruth", "Clara", "Maya", "Iris", "Sofia", "Grace")
HE = ("Tom", "Leo", "Ben", "Omar", "Jack", "Paul", "Ravi", "Hugo", "Noah", "Carl", "Ivan", "Luke")
WARES = (
    "pens",
    "books",
    "cups",
    "plates",
    "candles",
    "posters",
    "brushes",
    "balls",
    "hats",
    "scarves",
    "lamps",
    "mugs",
)
THINGS = ("marbles", "stickers", "stamps", "coins", "cards", "beads", "shells", "buttons")
FRUITS = ("apples", "pears", "plums", "lemons", "oranges", "peaches", "cherries", "figs")
BAKES = ("cookies", "muffins", "rolls", "tarts", "buns", "scones", "waffles", "cupcakes")
CONTAINERS = ("boxes", "bags", "jars", "packs", "tins", "baskets")
SINGULAR = {"boxes": "box", "brushes": "brush", "scarves": "scarf", "peaches": "peach", "cherries": "cherry"}
SYMBOLS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Problem:
    """One word problem.

    Attributes:
        question: The text of the problem.
        sentences: The worked steps, one sentence each.
        result: The number asked for, which is the result of the last step.
        numbers: The numbers the question states, in a fixed order: with the family they identify the arithmetic.
    """

    question: str
    sentences: tuple[str, ...]
    result: int
    numbers: tuple[int, ...]

    def row(self) -> dict[str, str]:
        """Return the problem as a row of the data set."""
        return {"question": self.question, "answer": " ".join((*self.sentences, f"The answer is: {self.result}"))}


class Unsuitable(Exception):
    """The numbers drawn give a step that is too hard, too small or too large; the caller draws again."""


@dataclass(frozen=True)
class Person:
    """A name with its pronouns, so that sentences agree."""

    name: str
    they: str
    their: str

    @property
    def They(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.they.capitalize()


def main(folder: Path) -> None:
    """Write both files into `folder`.

    Args:
        folder: An existing directory.
    """
    for name, problems in zip((TRAIN_FILE, HELDOUT_FILE), draw(), strict=True):
        lines = "".join(json.dumps(problem.row()) + "\n" for _, problem in problems)
        (folder / name).write_text(lines, encoding="utf-8", newline="\n")
        print(f"{folder / name}: {len(problems)} rows")


def draw() -> tuple[list[tuple[str, Problem]], list[tuple[str, Problem]]]:
    """Draw the problems of every family, each with a combination of numbers of its own.

    Returns:
        The training problems and the held-out problems, each with the name of its family, both shuffled, every family
        equally often in each.
    """
    train: list[tuple[str, Problem]] = []
    heldout: list[tuple[str, Problem]] = []
    for family in FAMILIES:
        # A generator for each family keeps the others' rows unchanged when one is edited.
        rng = Random(f"{SEED}:{family.__name__}")
        problems: dict[tuple[int, ...], tuple[str, Problem]] = {}
        while len(problems) < HELDOUT_ROWS_PER_FAMILY + TRAIN_ROWS_PER_FAMILY:
            try:
                problem = family(rng)
            except Unsuitable:
                continue
            problems.setdefault(problem.numbers, (family.__name__, problem))
        drawn = list(problems.values())
        heldout += drawn[:HELDOUT_ROWS_PER_FAMILY]
        train += drawn[HELDOUT_ROWS_PER_FAMILY:]
    Random(SEED).shuffle(train)
    Random(SEED).shuffle(heldout)
    return train, heldout


def step(a: int, symbol: str, b: int) -> tuple[str, int]:
    """Work out one step.

    Args:
        a: The left number.
        symbol: One of + - *.
        b: The right number.

    Returns:
        The step as text, "a op b = c", and its result c.

    Raises:
        Unsuitable: c is below 2 (so that every noun stays plural) or above HIGHEST_NUMBER, or the step carries or borrows.
    """
    result = SYMBOLS[symbol](a, b)
    carries = symbol != "*" and not 0 <= SYMBOLS[symbol](a % 10, b % 10) <= 9
    if carries or not 2 <= result <= HIGHEST_NUMBER:
        raise Unsuitable
    return f"{a} {symbol} {b} = {result}", result


def person(rng: Random, other_than: Person | None = None) -> Person:
    """Draw a person, different from `other_than`."""
    people = [Person(name, "she", "her") for name in SHE] + [Person(name, "he", "his") for name in HE]
    return rng.choice([one for one in people if one != other_than])


def one(plural: str) -> str:
    """Return the singular of one of this file's nouns."""
    return SINGULAR.get(plural, plural[:-1])


# The families. Each draws its numbers and words, works the steps out, and tells the story in one of several ways.
# The numbers were sized by trial to what a model of 135 M parameters learns within minutes: products of small numbers, and
# sums and differences without carrying. With division, borrowing and carrying among the steps it got many more wrong.


def shopping(rng: Random) -> Problem:
    """Two kinds of things at two prices: a * p + b * q."""
    who, (ware, other) = person(rng), rng.sample(WARES, 2)
    a, p, b, q = (rng.randint(2, 6) for _ in range(4))
    first, cost = step(a, "*", p)
    second, other_cost = step(b, "*", q)
    total, result = step(cost, "+", other_cost)
    prices = f"{ware} for {p} dollars each and {b} {other} for {q} dollars each"
    stories = (
        f"{who.name} buys {a} {prices}. How many dollars does {who.they} spend?",
        f"{who.name} orders {a} {prices}. How much does {who.they} pay in dollars?",
        f"A shop sells {a} {prices}. How many dollars does it take in?",
    )
    sentences = (
        f"The {ware} cost {first} dollars.",
        f"The {other} cost {second} dollars.",
        f"The total is {total} dollars.",
    )
    return Problem(rng.choice(stories), sentences, result, (a, p, b, q))


def delivery(rng: Random) -> Problem:
    """A price with something on top: a * p + c."""
    who, ware = person(rng), rng.choice(WARES)
    a, p, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    price, cost = step(a, "*", p)
    total, result = step(cost, "+", c)
    stories = (
        f"{who.name} buys {a} {ware} for {p} dollars each and pays {c} dollars for delivery. How many dollars is that?",
        f"One {one(ware)} costs {p} dollars. {who.name} buys {a} and a card for {c} dollars. What does {who.they} pay?",
        f"{who.name} sells {a} {ware} for {p} dollars each and gets a tip of {c} dollars. How many dollars is that?",
    )
    sentences = (f"The {ware} cost {price} dollars.", f"The total is {total} dollars.")
    return Problem(rng.choice(stories), sentences, result, (a, p, c))


def parcels(rng: Random) -> Problem:
    """Containers that each hold two kinds: (a + b) * k."""
    who, container, (thing, other) = person(rng), rng.choice(CONTAINERS), rng.sample(THINGS, 2)
    a, b, k = rng.randint(2, 7), rng.randint(2, 7), rng.choice((*range(2, 13), 20, 30))
    inside, each = step(a, "+", b)
    everything, result = step(each, "*", k)
    stories = (
        f"{who.name} packs {a} {thing} and {b} {other} into each of {k} {container}. How many things is that?",
        f"There are {k} {container} with {a} {thing} and {b} {other} in each. How many things are there?",
        f"{who.name} buys {k} {container}. Each holds {a} {thing} and {b} {other}. How many things does {who.they} get?",
    )
    sentences = (f"Each holds {inside} things.", f"The total is {everything} things.")
    return Problem(rng.choice(stories), sentences, result, (a, b, k))


def distance(rng: Random) -> Problem:
    """A steady journey and a last stretch: h * v + d."""
    who, vehicle = person(rng), rng.choice(("train", "bus", "truck", "van"))
    h, v, d = rng.randint(2, 4), 10 * rng.randint(2, 6), rng.randint(2, 30)
    steady, part = step(h, "*", v)
    whole, result = step(part, "+", d)
    stories = (
        f"A {vehicle} goes {v} miles an hour for {h} hours and then {d} more miles. How many miles is that?",
        f"{who.name} drives for {h} hours at {v} miles an hour and then {d} miles. How far does {who.they} drive?",
        f"{who.name} cycles {v} miles a day for {h} days, then {d} miles home. How many miles is that?",
    )
    sentences = (f"The first part is {steady} miles.", f"The total is {whole} miles.")
    return Problem(rng.choice(stories), sentences, result, (h, v, d))


def savings(rng: Random) -> Problem:
    """Money saved every week, on top of some: w * a + s."""
    who = person(rng)
    w, a, s = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    weekly, saved = step(w, "*", a)
    everything, result = step(saved, "+", s)
    stories = (
        f"{who.name} has {s} dollars and saves {a} dollars a week. How many dollars are there after {w} weeks?",
        f"{who.name} earns {a} dollars a week for {w} weeks and had {s} dollars before. How many dollars is that?",
        f"A jar holds {s} dollars. For {w} weeks {who.name} adds {a} dollars a week. How many dollars does it hold?",
    )
    sentences = (f"The {w} weeks bring {weekly} dollars.", f"The total is {everything} dollars.")
    return Problem(rng.choice(stories), sentences, result, (w, a, s))


def baking(rng: Random) -> Problem:
    """Two batches of trays: t * c + u * d."""
    who, (bake, other) = person(rng), rng.sample(BAKES, 2)
    t, c, u, d = (rng.randint(2, 6) for _ in range(4))
    first, baked = step(t, "*", c)
    second, more = step(u, "*", d)
    everything, result = step(baked, "+", more)
    stories = (
        f"{who.name} bakes {t} trays of {c} {bake} and {u} trays of {d} {other}. How many pieces is that?",
        f"A baker fills {t} trays with {c} {bake} each and {u} trays with {d} {other} each. How many pieces is that?",
        f"At a party there are {t} plates of {c} {bake} and {u} plates of {d} {other}. How many pieces are there?",
    )
    sentences = (
        f"There are {first} {bake}.",
        f"There are {second} {other}.",
        f"The total is {everything} pieces.",
    )
    return Problem(rng.choice(stories), sentences, result, (t, c, u, d))


def reading(rng: Random) -> Problem:
    """Pages read at a steady rate and some more: d * p + q."""
    who, work = person(rng), rng.choice(("book", "novel", "comic", "story", "diary", "guide"))
    d, p, q = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    daily, read = step(d, "*", p)
    everything, result = step(read, "+", q)
    stories = (
        f"{who.name} reads {p} pages of a {work} a day for {d} days and {q} pages on Sunday. How many pages is that?",
        f"For {d} days {who.name} reads {p} pages of a {work} a day, then {q} more. How many pages is that?",
        f"{who.name} writes {p} pages of a {work} on each of {d} days, then {q} more. How many pages does it have?",
    )
    sentences = (f"The {d} days make {daily} pages.", f"The total is {everything} pages.")
    return Problem(rng.choice(stories), sentences, result, (d, p, q))


def wages(rng: Random) -> Problem:
    """Hours of two days at an hourly wage, with tips: (h + g) * p + t."""
    who, (day, next_day) = person(rng), rng.sample(("Monday", "Tuesday", "Friday", "Saturday", "Sunday"), 2)
    h, g, p, t = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 9), rng.randint(2, 9)
    together, hours = step(h, "+", g)
    paid, wage = step(hours, "*", p)
    everything, result = step(wage, "+", t)
    times = f"{h} hours on {day} and {g} hours on {next_day} for {p} dollars an hour"
    stories = (
        f"{who.name} works {times}, and gets {t} dollars in tips. How many dollars is that?",
        f"{who.name} paints {times}, plus {t} dollars for the way. How many dollars does {who.they} get?",
        f"{who.name} mows lawns {times}, and finds {t} dollars. How many dollars does {who.they} have?",
    )
    sentences = (
        f"That is {together} hours.",
        f"The hours bring {paid} dollars.",
        f"The total is {everything} dollars.",
    )
    return Problem(rng.choice(stories), sentences, result, (h, g, p, t))


def picking(rng: Random) -> Problem:
    """A multiple of another's, and some more: k * a + c."""
    who, fruit = person(rng), rng.choice(FRUITS)
    friend = person(rng, other_than=who)
    k, a, c = rng.randint(2, 5), rng.randint(2, 12), rng.randint(2, 20)
    times, many = step(k, "*", a)
    everything, result = step(many, "+", c)
    stories = (
        f"{who.name} has {a} {fruit}. {friend.name} has {k} times as many and gets {c} more. How many is that?",
        f"{friend.name} picks {k} times as many {fruit} as {who.name}, who picks {a}, and then {c} more. How many is that?",
        f"{who.name} buys {a} {fruit}. {friend.name} buys {k} times as many, then {c} more. How many does {friend.name} buy?",
    )
    sentences = (f"First {friend.name} has {times} {fruit}.", f"The total is {everything} {fruit}.")
    return Problem(rng.choice(stories), sentences, result, (k, a, c))


def passengers(rng: Random) -> Problem:
    """People getting off and on: a - b + c."""
    vehicle, driver = rng.choice(("bus", "train", "tram", "ferry", "boat")), person(rng)
    a, b, c = rng.randint(12, 79), rng.randint(2, 9), rng.randint(2, 9)
    off, fewer = step(a, "-", b)
    on, result = step(fewer, "+", c)
    stories = (
        f"A {vehicle} has {a} people. At a stop {b} people get off and {c} get on. How many people are on it now?",
        f"{driver.name} drives a {vehicle} with {a} people. Then {b} leave and {c} come in. How many people are there?",
        f"Of {a} people on a {vehicle}, {b} get off, and {c} others get on. How many people does it carry now?",
    )
    sentences = (f"First there are {off} people.", f"Then there are {on} people.")
    return Problem(rng.choice(stories), sentences, result, (a, b, c))


FAMILIES: tuple[Callable[[Random], Problem], ...] = (
    shopping,
    delivery,
    parcels,
    distance,
    savings,
    baking,
    reading,
    wages,
    picking,
    passengers,
)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
