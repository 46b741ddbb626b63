"""The quickstart's data: reproducible, disjoint, right in every step, in plain English; and how answers are graded."""

import importlib.util
import json
import re
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
FILES = ("word_problems.jsonl", "word_problems_heldout.jsonl")
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def load_script(path: Path) -> ModuleType:
    """Import a script by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_word_problems = load_script(RECIPES / "data" / "make_word_problems.py")
score = load_script(RECIPES / "quickstart" / "score.py")

SINGULARS = [
    *("box", "tin", "jar", "bag", "pack", "basket", "tray", "dollar", "mile", "page", "hour", "day", "week", "friend"),
    *("child", "player", "person"),
    *map(make_word_problems.one, make_word_problems.WARES),
]


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (RECIPES / "data" / name).read_text(encoding="utf-8").splitlines()]


def test_regeneration_gives_the_same_bytes(tmp_path: Path) -> None:
    make_word_problems.main(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (RECIPES / "data" / name).read_bytes(), f"{name} is not what the script writes"


def test_sizes() -> None:
    assert len(read(FILES[0])) >= 2000
    assert len(read(FILES[1])) == 200
    assert sum((RECIPES / "data" / name).stat().st_size for name in FILES) < 700_000


def test_no_held_out_question_is_trained_on() -> None:
    train, heldout = (read(name) for name in FILES)
    assert not {row["question"] for row in train} & {row["question"] for row in heldout}
    assert len({row["question"] for row in heldout}) == len(heldout)


def test_no_held_out_combination_of_numbers_is_trained_on() -> None:
    names = {family.__name__ for family in make_word_problems.FAMILIES}
    seen = [{(family, problem.numbers) for family, problem in problems} for problems in make_word_problems.draw()]
    assert [len(combinations) for combinations in seen] == [len(read(name)) for name in FILES]
    assert [{family for family, _ in combinations} for combinations in seen] == [names, names]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", FILES)
def test_numbers_of_a_problem_are_those_of_its_question(name: str) -> None:
    problems = make_word_problems.draw()[FILES.index(name)]
    for _, problem in problems:
        assert Counter(map(int, re.findall(r"\d+", problem.question))) == Counter(problem.numbers), problem.question


@pytest.mark.parametrize("name", FILES)
def test_every_step_is_right_and_uses_known_numbers(name: str) -> None:
    for row in read(name):
        known = set(map(int, re.findall(r"\d+", row["question"])))
        steps = [(int(a), operation, int(b), int(c)) for a, operation, b, c in STEP.findall(row["answer"])]
        assert len(steps) in (2, 3), row
        assert row["answer"].count("=") == len(steps), row
        for a, operation, b, c in steps:
            right = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b * c == a}[operation]
            assert right, row
            assert {a, b} <= known, row
            known.add(c)
        assert row["answer"].endswith(f" The answer is: {steps[-1][-1]}"), row


@pytest.mark.parametrize("name", FILES)
def test_plain_english(name: str) -> None:
    for row in read(name):
        text = f"{row['question']} {row['answer']}"
        assert re.fullmatch(r"[A-Z0-9].*[.?] ?.*\?", row["question"]), row
        assert not re.search(r"\b[01] [a-z]", text), f"a plural after 0 or 1: {text}"
        assert not re.search(rf"\d ({'|'.join(SINGULARS)})\b", text), f"a singular after a number: {text}"
        assert not re.search(r"  |[{}_]|\b[Aa] [aeiou]|\b([a-z]+) \1\b", row["question"]), row
        assert len({"she", "he"} & set(re.findall(r"[a-z]+", row["question"].lower()))) <= 1, row


@pytest.mark.parametrize("plural", [*make_word_problems.WARES])
def test_singulars(plural: str) -> None:
    singular = make_word_problems.one(plural)
    endings = {"brushes": "brush", "scarves": "scarf"}
    assert singular == endings.get(plural, plural.removesuffix("s"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 4 = 12. The answer is: 12", "12"),
        ("The answer is: 12.", "12"),
        ("The answer is: $1,234.50 in all", "1234.50"),
        ("The answer is: -7", "-7"),
        ("The answer is: **42** apples, 3 more than 39", "42"),
        ("the answer is 5", "5"),
        ("The answer is: 3. No, wait. The answer is: 4", "4"),
        ("The answer is: 12.50", "12.5"),
        ("She has 20 - 8 = 12 left.", "12"),
        ("That makes 20-8", "8"),
        ("(20)-8", "8"),
        ("It is -8", "-8"),
        ("It costs -$8", "-8"),
        ("It was 1,234,567", "1234567"),
        ("Take 1, 2, 3", "3"),
        ("Take 12,34", "34"),
        ("0.5", "0.5"),
    ],
)
def test_extract_answer(text: str, number: str) -> None:
    assert score.extract_answer(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "I do not know.", "It is 5, and the answer is: unknown", "The answer is:"])
def test_extract_answer_of_a_text_without_one(text: str) -> None:
    assert score.extract_answer(text) is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is: 12", True),
        ("So there are 12.0 of them", True),
        ("The answer is: 12.4", False),
        ("The answer is: 120", False),
        ("The answer is: -12", False),
        ("Nothing", False),
    ],
)
def test_is_correct_compares_exactly(text: str, right: bool) -> None:
    assert score.is_correct(text, "4 * 3 = 12. The answer is: 12") is right


def test_every_reference_is_graded_right() -> None:
    for row in read(FILES[1]):
        assert score.is_correct(row["answer"], row["answer"])
