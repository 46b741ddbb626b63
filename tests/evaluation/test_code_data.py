"""The whole of HumanEval and MBPP's test split: every canonical solution passes, every spoiled one fails."""

import ast
import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from abba_cli.evaluation.grading.code import humaneval_program, humaneval_tests, mbpp_program, mbpp_tests
from abba_cli.evaluation.sandbox import Limits, missing_protections, run_tests

DATA = Path(__file__).parents[3] / "shared" / "data"
LIMITS = Limits(wall_seconds=120, cpu_seconds=60)  # MBPP/123 alone takes seconds of pure Python

pytestmark = [
    pytest.mark.slow,
    # Some of the data sets' programs have "\d" outside a raw string.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning"),
    pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not at ../shared/data"),
]


@pytest.fixture(scope="module")
def humaneval() -> list[dict[str, Any]]:
    with gzip.open(DATA / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def mbpp() -> list[dict[str, Any]]:
    lines = (DATA / "mbpp" / "mbpp.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if 11 <= row["task_id"] <= 510]


def passed(jobs: list[tuple[Any, str, str]]) -> dict[Any, bool]:
    weaker = bool(missing_protections())
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda job: run_tests(job[1], job[2], weaker=weaker, limits=LIMITS).passed, jobs)
        return {name: found for (name, _, _), found in zip(jobs, runs, strict=True)}


def emptied(code: str, name: str) -> str:
    """The code with `pass` for the body of a function."""
    tree = ast.parse(code)
    (*_, function) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    function.body = [ast.Pass()]
    return ast.unparse(tree)


OFF = """
def _off(x):
    if isinstance(x, bool): return not x
    if isinstance(x, (int, float, complex)): return x + 1
    if isinstance(x, str): return x + "x"
    if isinstance(x, (list, tuple)): return x[:-1] if x else type(x)([0])
    if isinstance(x, (set, frozenset)): return x | {"x"}
    if isinstance(x, dict): return {**x, "x": 1}
"""


def spoiled(code: str, name: str) -> str:
    """The code with a function whose results are off by one, or by one item."""
    return f"{code}\n{OFF}\n_right = {name}\ndef {name}(*arguments): return _off(_right(*arguments))\n"


def name_of_function(row: dict[str, Any]) -> str:
    """The function that an MBPP row tests."""
    defined = {node.name for node in ast.walk(ast.parse(row["code"].replace("\r", ""))) if isinstance(node, ast.FunctionDef)}
    used = [node.id for node in ast.walk(ast.parse(row["test_list"][0])) if isinstance(node, ast.Name)]
    return next(name for name in used if name in defined)


def test_humaneval(humaneval: list[dict[str, Any]]) -> None:
    right = passed(
        [(row["task_id"], humaneval_program(row, row["canonical_solution"]), humaneval_tests(row)) for row in humaneval]
    )
    assert len(right) == 164
    assert [name for name, found in right.items() if not found] == []
    for spoil in (emptied, spoiled):
        wrong = [
            (row["task_id"], spoil(row["prompt"] + row["canonical_solution"], row["entry_point"]), humaneval_tests(row))
            for row in humaneval
        ]
        assert [name for name, found in passed(wrong).items() if found] == []


def test_mbpp(mbpp: list[dict[str, Any]]) -> None:
    right = passed([(row["task_id"], mbpp_program(row, row["code"]), mbpp_tests(row)) for row in mbpp])
    assert len(right) == 500
    assert [name for name, found in right.items() if not found] == []
    for spoil in (emptied, spoiled):
        wrong = [(row["task_id"], spoil(row["code"].replace("\r", ""), name_of_function(row)), mbpp_tests(row)) for row in mbpp]
        assert [name for name, found in passed(wrong).items() if found] == []
