"""Code benchmarks: the program in an answer, the tests of a row, and pass@k."""

import re
import warnings
from collections.abc import Iterator, Mapping
from math import comb
from typing import Any

from abba_cli.errors import DataError
from abba_cli.evaluation.grading.plus import plus_tests

__all__ = ["extract_code", "humaneval_program", "humaneval_tests", "mbpp_program", "mbpp_tests", "pass_at_k", "plus_tests"]

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n", re.MULTILINE)
_CLOSING = re.compile(r"^[ \t]*```", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")
_CODE_LINE = re.compile(
    r"^[ \t]*("
    r"(async\s+)?def\s+\w+\s*\(|class\s+\w+\s*[(:]|@\w|import\s+\w|from\s+[\w.]+\s+import\s"
    r"|(return|yield|raise|assert)\b|(pass|break|continue)\s*$"
    r"|(for|while|if|elif|with|except)\b.*:\s*(#.*)?$|(else|try|finally)\s*:"
    r"|[\w.]+(\[.*\])?\s*([+\-*/%|&^]|//|\*\*|>>|<<)?=[^=]|[\w.]+\(.*\)\s*$"
    r")",
    re.MULTILINE,
)
_DEFINITION = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)|^(\w+)\s*=[^=]", re.MULTILINE)


def extract_code(response: str) -> str | None:
    """The program in an answer.

    The first complete Python fence (one without a language counts where there is none), else one that was not closed, else the
    text itself, up to a lone closing fence.

    Returns:
        The code with its indentation, or None if nothing like code is there.
    """
    text = response.replace("\r\n", "\n").replace("\r", "\n")
    fences = list(_fences(text))
    complete = [(language, code) for language, code, closed in fences if closed]
    if complete:
        return min(complete, key=lambda fence: not fence[0])[1]
    before = _CLOSING.split(text, maxsplit=1)[0]
    if fences and not _CODE_LINE.search(before):
        return fences[0][1]
    return before if _CODE_LINE.search(before) else None


def humaneval_program(row: Mapping[str, Any], response: str) -> str:
    """The whole program that an answer makes with its prompt.

    Args:
        row: With `prompt` and `entry_point`.
        response: A body that goes on from the prompt, the whole function, or either in a fence.
    """
    prompt, name = _text(row, "prompt"), _text(row, "entry_point")
    code = extract_code(response)
    if code is None:
        return prompt
    if name in _defined(code):
        return _before(prompt, name) + "\n" + code
    forms = (prompt + code, prompt + "    " + code.lstrip(" "), prompt + _indented(code))
    return next((form for form in forms if _compiles(form)), None) or _longest_start(prompt, code)


def humaneval_tests(row: Mapping[str, Any]) -> str:
    """The row's tests, and the call that starts them.

    The prompt's helper functions stand before them: some tests use these, and the program must not give its own.

    Args:
        row: With `prompt`, `entry_point` and `test`.
    """
    name = _text(row, "entry_point")
    return f"{_before(_text(row, 'prompt'), name)}\n{_text(row, 'test')}\ncheck({name})\n"


def mbpp_program(row: Mapping[str, Any], response: str) -> str:
    """The program in an answer to an MBPP row; empty if there is none."""
    return extract_code(response) or ""


def mbpp_tests(row: Mapping[str, Any]) -> str:
    """The row's three asserts, after the imports or the setup that it has for them.

    Args:
        row: With `test_list`, and `test_imports` (sanitized set) or `test_setup_code` (full set). `challenge_test_list` is left
            out, as everywhere.
    """
    tests = row.get("test_list")
    if not isinstance(tests, (list, tuple)) or not tests:
        raise DataError(f"MBPP row {row.get('task_id')}: found no tests; expected a list of asserts in the column test_list")
    parts = [*(row.get("test_imports") or ()), row.get("test_setup_code") or "", *tests]
    return "\n".join(str(part) for part in parts).replace("\r\n", "\n") + "\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k draws passes, estimated without bias from n draws of which c passed.

    1 - C(n-c, k) / C(n, k), in whole numbers up to the last division (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Raises:
        ValueError: Not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} in {n}: expected 0 <= c <= n and 1 <= k <= n")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def _fences(text: str) -> Iterator[tuple[str, str, bool]]:
    """Language, content, and whether it was closed, of each fence that may hold Python."""
    position = 0
    while opening := _FENCE.search(text, position):
        closing = _CLOSING.search(text, opening.end())
        position = closing.end() if closing else len(text)
        if opening[1].lower() in _PYTHON:
            yield opening[1].lower(), text[opening.end() : closing.start() if closing else len(text)], closing is not None


def _defined(code: str) -> set[str]:
    """Names that code defines at its top, or begins to, where it cannot be parsed."""
    return {match[1] or match[2] for match in _DEFINITION.finditer(code)}


def _before(prompt: str, name: str) -> str:
    """The imports and helpers of a prompt: all that comes before the function asked for."""
    start = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", prompt, re.MULTILINE)
    return prompt[: start.start()] if start else ""


def _indented(code: str) -> str:
    return "".join("    " + line for line in code.splitlines(keepends=True))


def _longest_start(prompt: str, code: str) -> str:
    """The prompt and as many of the code's lines as make a program: what follows a body is often prose."""
    lines = code.splitlines(keepends=True)
    for kept in range(len(lines) - 1, 0, -1):
        form = prompt + "".join(lines[:kept])
        if _compiles(form):
            return form
    return prompt + code


def _compiles(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as "\d" outside a raw string: a model's style is no news to the user
            compile(code, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"row {row.get('task_id')}: found {value!r:.40} in the column {column}; expected text")
    return value.replace("\r\n", "\n")
