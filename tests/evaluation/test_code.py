"""Programs out of answers, tests out of rows, and pass@k, on problems made up for it in the sources' own columns."""

from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.code import extract_code, humaneval_program, humaneval_tests, mbpp_program, mbpp_tests, pass_at_k
from abba_cli.evaluation.sandbox import Limits, missing_protections, run_tests

WEAKER = bool(missing_protections())
FUNCTION = "def add(a, b):\n    return a + b\n"


def passes(program: str, tests: str) -> bool:
    return run_tests(program, tests, weaker=WEAKER, limits=Limits(wall_seconds=40)).passed


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (f"```python\n{FUNCTION}```", FUNCTION),
        (f"Here it is:\n\n```python\n{FUNCTION}```\nIt adds.", FUNCTION),
        (f"```Python\n{FUNCTION}```", FUNCTION),
        (f"```py\n{FUNCTION}```", FUNCTION),
        (f"```python3 title=x\n{FUNCTION}```", FUNCTION),
        (f"```\n{FUNCTION}```", FUNCTION),
        (f"```bash\npip install x\n```\n```python\n{FUNCTION}```", FUNCTION),
        (f"```\nadd(1, 2) -> 3\n```\n```python\n{FUNCTION}```", FUNCTION),
        (f"```python\n{FUNCTION}```\n```python\nprint(add(1, 2))\n```", FUNCTION),
        (f"```python\n{FUNCTION}", FUNCTION),
        (f"Sure:\n```\n{FUNCTION}", FUNCTION),
        (f"```python\n{FUNCTION}```".replace("\n", "\r\n"), FUNCTION),
        (FUNCTION, FUNCTION),
        (f"{FUNCTION}```\nThis function adds.", FUNCTION),
        ("    return a + b\n", "    return a + b\n"),
        ("    total = a\n    total += b\n    return total", "    total = a\n    total += b\n    return total"),
        ("x.append(3)", "x.append(3)"),
        ("import math", "import math"),
        ("", None),
        ("\n\n", None),
        ("I cannot help with that.", None),
        ("The answer is 42", None),
        ("Yes, we return to this if needed (as they say)", None),
    ],
)
def test_code_in_an_answer(response: str, code: str | None) -> None:
    assert extract_code(response) == code


# Columns of HumanEval: a helper and an import in the prompt, and a test that uses the helper.
ROTATE: dict[str, Any] = {
    "task_id": "Made/0",
    "prompt": '''import math
from typing import List


def shift(items: List[int], by: int):
    return items[by:] + items[:by]


def back(items: List[int], by: int) -> List[int]:
    """ Undo shift; by may be a float.
    >>> back([2, 1], 1)
    [1, 2]
    """
''',
    "entry_point": "back",
    "canonical_solution": "    by = len(items) - math.floor(by)\n    return items[by:] + items[:by]\n",
    "test": """

METADATA = {}


def check(candidate):
    for by in range(4):
        assert candidate(shift([1, 2, 3], by), by) == [1, 2, 3]
""",
}
BODY = ROTATE["canonical_solution"]
WHOLE = f"def back(items, by):\n{BODY}"


@pytest.mark.parametrize(
    "response",
    [
        BODY,
        BODY.strip(),
        BODY.replace("\n    ", "\n").lstrip(),
        f"```python\n{BODY}```",
        f"\n{BODY}\n\n",
        f"{BODY}\nThis turns the list back.\nIt's simple!",
        f"{BODY}\n\ndef unfinished(",
        f"{BODY}```\n\nExplanation",
        WHOLE,
        ROTATE["prompt"] + BODY,
        f"Sure.\n```python\n{WHOLE}```\nDone.",
        f"```python\nimport math\n\n{WHOLE}\nprint(back([1], 0))\n```",
        "back = lambda items, by: items[len(items) - by:] + items[:len(items) - by]",
        WHOLE.replace("List[int]", "list") + "\n\nif __name__ == '__main__':\n    raise SystemExit(input())\n",
        f"def other(x: List[int]): return x\n\n{WHOLE}",
        BODY.replace("    return", "    pattern = '\\d'\n    return"),
    ],
)
def test_every_form_of_a_completion(response: str) -> None:
    assert passes(humaneval_program(ROTATE, response), humaneval_tests(ROTATE))


@pytest.mark.parametrize(
    "response",
    [
        "",
        "I cannot do that.",
        "    pass",
        "    return items",
        "    return None\n",
        BODY.replace("len(items) -", "len(items) - 1 -"),
        "    return (",
        "def back(items, by): return items",
        "def forth(items, by): return items",
        # The prompt's helper is the tests' own: redefining it wins nothing.
        "def shift(items, by): return items\n\ndef back(items, by): return items",
        "    return [1, 2, 3][:2]",
    ],
)
def test_wrong_completions_fail(response: str) -> None:
    assert not passes(humaneval_program(ROTATE, response), humaneval_tests(ROTATE))


# Columns of MBPP's full set, with a class of the program's own in the setup, and of its sanitized set.
TREE: dict[str, Any] = {
    "task_id": 1,
    "text": "Write a function to add the values of a tree.",
    "code": "class Node:\r\n\tdef __init__(self, v):\r\n\t\tself.v = v\r\n\t\tself.left = None\r\n"
    "def total(n):\r\n\treturn n.v + total(n.left) if n else 0",
    "test_setup_code": "root = Node(1) \r\nroot.left = Node(2) \r\nroot.left.left = Node(4)",
    "test_list": ["assert total(root) == 7", "assert total(root.left)==6", "assert (total(None)) == 0"],
    "challenge_test_list": ["assert total(root) == 'never run'"],
}
HALF: dict[str, Any] = {
    "task_id": 2,
    "prompt": "Write a function to halve.",
    "code": "def half(x):\n  return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(half(3), 1.5)", "assert half(0) == 0"],
}
# A function under a builtin's name, as MBPP has one.
SUM: dict[str, Any] = {
    "task_id": 3,
    "code": "def sum(a, b): return a * b",
    "test_list": ["assert sum(2, 3) == 6", "assert sum(1, 1) == 1"],
}


@pytest.mark.parametrize("row", [TREE, HALF, SUM])
def test_mbpp_rows(row: dict[str, Any]) -> None:
    for response in (row["code"], f"```python\n{row['code']}\n```", f"Here:\n```\n{row['code']}\n```\nBye"):
        assert passes(mbpp_program(row, response), mbpp_tests(row))
    wrong = row["code"].replace("return", "return 5 or")
    for response in ("", "No.", "pass", wrong, row["code"].replace("def ", "def x")):
        assert not passes(mbpp_program(row, response), mbpp_tests(row))


@pytest.mark.parametrize("tests", [None, [], "assert f() == 1"])
def test_a_row_without_tests_is_an_error(tests: object) -> None:
    with pytest.raises(DataError, match="MBPP row 7: found no tests; expected a list of asserts in the column test_list"):
        mbpp_tests({"task_id": 7, "test_list": tests})


def test_a_row_with_a_hole_is_an_error() -> None:
    for column in ("prompt", "entry_point", "test"):
        with pytest.raises(DataError, match=f"row Made/0: found None in the column {column}; expected text"):
            humaneval_tests({**ROTATE, column: None})


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(1, 1, 1) == 1
    assert pass_at_k(1, 0, 1) == 0
    assert pass_at_k(10, 3, 1) == 0.3
    assert pass_at_k(4, 2, 2) == 5 / 6  # of six pairs, one has no right answer
    assert pass_at_k(5, 1, 5) == 1
    assert pass_at_k(200, 1, 100) == 0.5
    assert pass_at_k(10**5, 0, 10**4) == 0


def test_pass_at_k_is_the_share_of_draws_with_a_pass() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(one < c for one in draw) for draw in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == float(Fraction(sum(draws), len(draws)))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_outside_its_range(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)
