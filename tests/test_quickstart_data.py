"""The quickstart's data: reproducible, disjoint, right in every step, in plain English; and its references are graded right."""

import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from abba_cli.evaluation.grading.judging import grade
from abba_cli.evaluation.questions import read_items
from abba_cli.evaluation.tasks import read_task

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


def test_every_reference_is_graded_right() -> None:
    items = read_items(read_task(RECIPES / "tasks" / "word_problems.yaml"))
    assert len(items.items) == len(read(FILES[1]))
    assert not items.unreadable
    for item in items.items:
        assert grade(items.task, item.row, item.answer, item.row["answer"]).score == 1.0
