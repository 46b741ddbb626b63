"""One answer, judged by its task's metric: what was found in it, whether that is right, what the other grader says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from abba_cli.errors import DataError
from abba_cli.evaluation.grading import code, latex, numbers, released
from abba_cli.evaluation.grading.answers import Prediction, find_choice, find_pattern, same_text
from abba_cli.evaluation.sandbox import Limits, run_tests
from abba_cli.evaluation.tasks import Task

Grader = Literal["abba", "released"]
# MBPP/123's own solution takes six seconds of a slow machine.
_LIMITS = Limits(wall_seconds=30, cpu_seconds=30)


@dataclass(frozen=True)
class Grade:
    """The judgement of one answer.

    Args:
        score: 1 for a right answer, else 0.
        prediction: What was found in the answer; None where nothing was.
        marked: Whether it stood behind a mark such as `The answer is:`.
        other: The judgement of the other grader; None where it has no rules for this task.
        note: What the tests of a program said.
    """

    score: float
    prediction: str | None
    marked: bool = True
    other: float | None = None
    note: str = ""


def gold_of(task: Task, answer: str) -> str:
    """What of the source's answer is compared.

    Raises:
        DataError: It is empty, holds no number or formula, or is none of the task's choices.
    """
    if not answer.strip():
        raise DataError("the answer is empty")
    match task.metric:
        case "choice":
            gold = answer.strip()
            if gold not in task.choices:
                raise DataError(f"the answer is {gold[:40]!r}; expected one of {', '.join(task.choices)}")
            return gold
        case "number":
            return numbers.gold_number(answer)
        case "latex":
            return latex.gold_latex({"solution": answer} if "\\boxed" in answer else {"answer": answer})
    return answer.strip()


def grade(
    task: Task, row: Mapping[str, Any], answer: str, response: str, grader: Grader = "abba", weaker_sandbox: bool = False
) -> Grade:
    """Judge an answer.

    Args:
        task: The task.
        row: The row's columns; code tasks have their tests there.
        answer: The right answer, as the source has it.
        response: What the model wrote.
        grader: abba's rules, or those of the paper's released code.
        weaker_sandbox: Run tests where some of the sandbox's protections are missing.

    Raises:
        RunError: Protections are missing, and `weaker_sandbox` is off.
    """
    if task.runs_code:
        return _grade_code(task, row, response, weaker_sandbox)
    gold = gold_of(task, answer)
    found = _find(task, response)
    right = found.text is not None and _same(task, gold, found.text)
    theirs = _released(task, answer, gold, response)
    if theirs is None or grader == "abba":
        return Grade(float(right), found.text, found.marked, None if theirs is None else float(theirs))
    return Grade(float(theirs), found.text, found.marked, float(right))


def has_released_rules(task: Task) -> bool:
    """Whether the paper's released code has rules for a task: for built-in tasks without a pattern, but not for code."""
    return task.metric in ("choice", "number", "latex") and task.pattern is None


def _find(task: Task, response: str) -> Prediction:
    if task.pattern is not None:
        return find_pattern(response, task.pattern)
    match task.metric:
        case "choice":
            return find_choice(response, task.choices)
        case "number":
            return numbers.find_number(response)
    return latex.find_latex(response)


def _same(task: Task, gold: str, prediction: str) -> bool:
    match task.metric:
        case "choice":
            return gold == prediction
        case "number":
            return numbers.same_number(gold, prediction)
        case "latex":
            return latex.same_latex(gold, prediction)
    return same_text(gold, prediction)


def _released(task: Task, answer: str, gold: str, response: str) -> bool | None:
    if not has_released_rules(task):
        return None
    match task.metric:
        case "choice":
            return released.released_choice(response, task.choices, gold)
        case "number":
            return released.released_number(response, answer)
    return released.released_latex(response, gold)


def _grade_code(task: Task, row: Mapping[str, Any], response: str, weaker: bool) -> Grade:
    program = code.humaneval_program(row, response) if "humaneval" in task.metric else code.mbpp_program(row, response)
    if task.metric.endswith("_plus"):
        tests = code.plus_tests(row)
    else:
        tests = code.humaneval_tests(row) if task.metric == "humaneval" else code.mbpp_tests(row)
    verdict = run_tests(program, tests, weaker=weaker, limits=_LIMITS)
    return Grade(float(verdict.passed), code.extract_code(response), note=verdict.reason)
