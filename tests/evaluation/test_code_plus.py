"""EvalPlus's two forms of rows, small ones made for this, and its rules where a plain comparison would be wrong."""

import json
from typing import Any

import pytest

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.code import humaneval_program, mbpp_program, plus_tests
from abba_cli.evaluation.grading.plus_rules import agrees, as_given
from abba_cli.evaluation.sandbox import Limits, missing_protections, run_tests

WEAKER = bool(missing_protections())

ASSERTION = """import numpy as np
from math import inf

def assertion(out, exp, atol):
    exact_match = out == exp
    if atol == 0 and isinstance(exp, float):
        atol = 1e-6
    if not exact_match and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert exact_match, f"out: {out}, exp: {exp}"

"""
LOOP = "for i, (inp, exp) in enumerate(zip(inputs, results)):\n"
HUB_HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'def third(x: float) -> float:\n    """ A third of x. """\n',
    "canonical_solution": "    return x / 3\n",
    "entry_point": "third",
    "test": f"{ASSERTION}def check(candidate):\n    inputs = [[3], [1], [inf]]\n    results = [1.0, 0.3333333, inf]\n"
    f"    {LOOP}        assertion(candidate(*inp), exp, 0)\n",
}
HUB_MBPP = {
    "task_id": 901,
    "code": "def both(a, b):\n    return tuple(sorted(set(a) & set(b)))",
    "prompt": "Write a function to find what two tuples share.",
    "test_imports": [],
    "test_list": ["assert both((1, 2), (2, 3)) == (2,)"],
    "test": f"{ASSERTION}inputs = [[(1, 2), (2, 3)], [(), (1,)]]\nresults = [(2,), ()]\n"
    f"{LOOP}    assertion(both(*inp), exp, 0)\n",
}
RELEASE_HUMANEVAL = {
    "task_id": "HumanEval/902",
    "prompt": 'import math\n\ndef root(x: float) -> float:\n    """ The square root. """\n',
    "contract": "    assert x >= 0\n",
    "canonical_solution": "    return math.sqrt(x)\n",
    "entry_point": "root",
    "base_input": [[4], [9]],
    "plus_input": [[2], [0.25], [float("inf")]],
    "atol": 0,
}
RELEASE_MBPP = {
    "task_id": "Mbpp/261",  # one whose arguments are tuples that JSON has made lists
    "prompt": '"""\nWrite a function to divide tuples item by item.\n"""\n',
    "canonical_solution": "def quotients(a, b):\n    assert isinstance(a, tuple)\n"
    "    return tuple(x // y for x, y in zip(a, b))\n",
    "entry_point": "quotients",
    "base_input": [[[10, 4], [5, 2]]],
    "plus_input": [[[9], [2]], [[], []]],
    "atol": 0,
}


def passes(program: str, row: dict[str, Any]) -> bool:
    return run_tests(program, plus_tests(row), weaker=WEAKER, limits=Limits(wall_seconds=60)).passed


@pytest.mark.parametrize("row", [HUB_HUMANEVAL, RELEASE_HUMANEVAL])
def test_humaneval_plus(row: dict[str, Any]) -> None:
    read = json.loads(json.dumps(row))  # as a line of a file
    assert passes(humaneval_program(read, row["canonical_solution"]), read)
    for wrong in ("    return 1.0 if x == 3 else 2.0\n", "    pass\n", "    return str(x)\n", "    import os; os._exit(0)\n"):
        assert not passes(humaneval_program(read, wrong), read)


def test_mbpp_plus() -> None:
    for row, right in ((HUB_MBPP, HUB_MBPP["code"]), (RELEASE_MBPP, RELEASE_MBPP["canonical_solution"])):
        assert passes(mbpp_program(row, right), row)
        for wrong in (
            right.replace("tuple(", "list("),
            right.replace("return", "return () and"),
            right.replace("def ", "def no_"),
        ):
            assert not passes(mbpp_program(row, wrong), row)


def test_the_plus_inputs_find_what_the_base_inputs_do_not() -> None:
    only_base = "def root(x): return {4: 2.0, 9: 3.0}.get(x)"
    assert not passes(only_base, RELEASE_HUMANEVAL)
    assert passes(only_base, {**RELEASE_HUMANEVAL, "plus_input": []})


def test_a_program_that_changes_its_arguments_does_not_change_the_references() -> None:
    row = {
        **RELEASE_MBPP,
        "task_id": "Mbpp/3",
        "entry_point": "f",
        "canonical_solution": "def f(x):\n    x.append(1)\n    return x\n",
    }
    row |= {"base_input": [[[1]]], "plus_input": [[[]]]}
    assert passes("def f(x): return [*x, 1]", row)
    assert not passes("def f(x):\n    x.clear()\n    return x", row)


def test_a_row_of_neither_form() -> None:
    with pytest.raises(DataError, match=r"EvalPlus row 5: found neither the column test .* nor base_input, plus_input"):
        plus_tests({"task_id": 5, "canonical_solution": "", "entry_point": "f"})


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance", "right"),
    [
        (0.1 + 0.2, 0.3, 0, True),
        (0.3001, 0.3, 0, False),
        (0.3001, 0.3, 1e-3, True),
        ([0.1 + 0.2, 1.0], [0.3, 1.0], 0, True),
        ([0.1 + 0.2], [0.3, 1.0], 0, False),
        ((0.3 + 1e-9,), [0.3], 0, False),
        (3, 3.0, 0, True),
        (1e12 + 1, 1e12, 0, True),
        (10**12 + 1, 10**12, 0, False),
        (float("nan"), 1.0, 0, False),
        (float("nan"), float("nan"), 0, False),
        (float("inf"), float("inf"), 0, True),
        (float("inf"), 1e308, 0, False),
        (1.0, float("inf"), 0, False),
        ("0.3", 0.3, 0, False),
        (None, 0.0, 0, False),
        ([], [], 0, True),
        (True, True, 0, True),
        ([[1.0, 2.0 + 1e-9]], [[1.0, 2.0]], 1e-6, True),
        ({1}, [1], 0, False),
    ],
)
def test_floats_agree_within_a_tolerance_and_all_else_exactly(answer: Any, expected: Any, tolerance: float, right: bool) -> None:
    assert agrees("f", [], answer, expected, tolerance) is right


@pytest.mark.parametrize(
    ("name", "arguments", "answer", "expected", "right"),
    [
        ("find_zero", [[-2, 1]], 2.00001, None, True),
        ("find_zero", [[-4, 0, 1, 0]], -2.0, 2.0, True),
        ("find_zero", [[-2, 1]], 2.1, 2.0, False),
        ("find_char_long", [], ["b", "a", "a"], ["a", "b"], True),
        ("find_char_long", [], ["a"], ["a", "b"], False),
        ("text_match_three", [], "anything", "found", True),
        ("text_match_three", [], None, "found", False),
        ("text_match_three", [], True, "found", True),
        ("text_match_three", [], False, "found", False),
        ("text_match_three", [], False, None, True),
        ("are_equivalent", [], "anything", False, True),
        ("sum_div", [], 0, 7, True),
        ("sum_div", [], 6, 7, False),
        ("surface_Area", [3, 4], 35, 33, True),  # 9 + 6 sqrt(1.5^2 + 4^2) = 34.6 with the pyramid's height
        ("surface_Area", [3, 4], 34, 33, False),
        ("surface_Area", [3, 4], 33, 33, True),
        ("digit_distance_nums", [23, 156], 1 + 3 + 3, 2, True),
        ("digit_distance_nums", [23, 156], 6, 2, False),
    ],
)
def test_questions_with_more_than_one_right_answer(name: str, arguments: Any, answer: Any, expected: Any, right: bool) -> None:
    assert agrees(name, arguments, answer, expected, 1e-4) is right


@pytest.mark.parametrize(
    ("task_id", "read", "given"),
    [
        ("Mbpp/2", [[1], [2, [3]]], [(1,), (2, [3])]),
        ("Mbpp/809", [[1], [2]], [(1,), (2,)]),
        ("Mbpp/63", [[[1], [2]]], [[(1,), (2,)]]),
        ("Mbpp/75", [[[1]], [2]], [[(1,)], [2]]),
        ("Mbpp/750", [[1], [2]], [[1], (2,)]),
        ("Mbpp/115", [[[1, 1], [], 3]], [[{1}, {}, {}]]),
        ("Mbpp/124", ["1", "2j"], [1.0, 2j]),
        ("Mbpp/252", ["(1+2j)"], [1 + 2j]),
        ("Mbpp/250", [[1], 2], [(1,), 2]),
        ("Mbpp/307", [[1], 2, [3]], [(1,), 2, [3]]),
        ("Mbpp/259", [[[1]], [[2]]], [((1,),), ((2,),)]),
        ("Mbpp/278", [[1, [2, [3]]]], [(1, (2, [3]))]),
        ("Mbpp/722", [{"a": [1, 2]}, 3], [{"a": (1, 2)}, 3]),
        ("Mbpp/580", [[1, [2, [3]]]], [(1, (2, (3,)))]),
        ("Mbpp/20", [[1]], [[1]]),
        ("HumanEval/2", [[1]], [[1]]),
        ("Mbpp/4", [], []),
    ],
)
def test_arguments_get_back_the_types_that_json_lost(task_id: str, read: list[Any], given: list[Any]) -> None:
    assert as_given(task_id, read) == given
    assert repr(as_given(task_id, read)) == repr(given)
