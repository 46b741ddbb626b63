"""EvalPlus rows: their own tests, from the hub's form (a ready `test`) or the releases' (inputs and a reference)."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abba_cli.errors import DataError
from abba_cli.evaluation.grading import plus_rules

_RELEASE = ("base_input", "plus_input", "canonical_solution", "entry_point")


def plus_tests(row: Mapping[str, Any]) -> str:
    """The tests of a row of HumanEval+ or MBPP+, as Python text.

    Args:
        row: Of the hub's sets (`test`, and for HumanEval+ `entry_point`), or of a release's JSON lines (`base_input`,
            `plus_input`, `canonical_solution`, `entry_point`, `prompt`, `atol`).

    Raises:
        DataError: It is neither.
    """
    test = row.get("test")
    if isinstance(test, str):
        # HumanEval+ defines check(candidate); MBPP+ calls the function by its name.
        starts = isinstance(row.get("entry_point"), str) and re.search(r"^def check\(", test, re.MULTILINE)
        return f"{test}\ncheck({row['entry_point']})\n" if starts else test
    holes = [column for column in _RELEASE if row.get(column) is None]
    if holes:
        raise DataError(
            f"EvalPlus row {row.get('task_id')}: found neither the column test (the hub's form) nor {', '.join(holes)} "
            "(the form of the releases' JSON lines); expected one of the two"
        )
    name = row["entry_point"]
    values = {
        "task_id": str(row.get("task_id", "")),
        "name": name,
        "reference": f"{row.get('prompt') or ''}{row['canonical_solution']}",
        # As text, because only JSON's reader knows NaN and Infinity by those names.
        "inputs": json.dumps([*row["base_input"], *row["plus_input"]]),
        "tolerance": float(row.get("atol") or 0.0),
    }
    rules = Path(plus_rules.__file__).read_text(encoding="utf-8")
    return f"{rules}\n\nagree({name}, {', '.join(f'{key}={value!r}' for key, value in values.items())})\n"
