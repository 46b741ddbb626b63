"""From the judgements of a task's rows to its numbers: mean, error, interval, and the difference from the baseline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abba_cli.evaluation.grading.code import pass_at_k
from abba_cli.evaluation.grading.judging import has_released_rules
from abba_cli.evaluation.options import EvaluationOptions
from abba_cli.evaluation.questions import Question, TaskItems, prompt_hash
from abba_cli.evaluation.reporting.statistics import mean_and_error, paired_test
from abba_cli.evaluation.results import Difference, Example, ModelRecord, TaskResult

_EXAMPLES = 3
_EXAMPLE_CHARACTERS = 2000


@dataclass(frozen=True)
class TaskScore:
    """A result, and the score of each row for a paired test; None where the metric is no mean over rows."""

    result: TaskResult
    scores: Mapping[int, float] | None


def task_scores(
    items: TaskItems, judged: Sequence[tuple[Question, Mapping[str, Any]]], model: ModelRecord, options: EvaluationOptions
) -> list[TaskScore]:
    """Add up the judgements of a task: one number, and pass@k besides where there are several samples of programs.

    Args:
        items: The task.
        judged: Each question with the record of one answer; several for a question if it was asked several times.
        model: Whose answers they are.
        options: The settings.
    """
    rows: dict[int, list[Mapping[str, Any]]] = {}
    questions: dict[int, Question] = {}
    for question, record in judged:
        rows.setdefault(question.item.number, []).append(record)
        questions[question.item.number] = question
    decoding = options.decoding(items.task)
    records = [record for found in rows.values() for record in found]
    others = [record for record in records if record["other_grader"] is not None]
    code = items.task.runs_code
    found = []
    for k in [1, *(k for k in (10, 100) if code and k <= decoding.samples)]:
        scores = {number: _score(answers, k) for number, answers in rows.items()}
        value, error, interval = mean_and_error(list(scores.values()))
        result = TaskResult(
            task=items.task.name,
            model=model.label,
            protocol="paper",
            metric=f"pass@{k}" if code else "accuracy",
            primary=k == 1,
            value=value,
            n=len(scores),
            stderr=None if math.isnan(error) else error,  # of a single row nothing is known
            interval=interval,
            prompt_hash=prompt_hash(list(questions.values())),
            shots=len(items.shots),
            sampling=str(decoding),
            grader=options.grader if has_released_rules(items.task) else "abba",
            extraction_failures=sum(record["prediction"] is None for record in records),
            unmarked=sum(record["prediction"] is not None and not record["marked"] for record in records),
            disagreements=sum(record["other_grader"] != record["score"] for record in others) if others else None,
            unreadable_rows=len(items.unreadable),
            data=items.source,
            difference=None,
            examples=tuple(_example(record) for _, record in judged[:_EXAMPLES]),
        )
        found.append(TaskScore(result, scores))
    return found


def beside_baseline(score: TaskScore, baseline: Sequence[TaskScore]) -> TaskResult:
    """A result with its difference from the baseline's, where that answered the same rows.

    Args:
        score: Of the model.
        baseline: All of the baseline's.
    """
    result = score.result
    same = [
        one
        for one in baseline
        if (one.result.task, one.result.metric, one.result.protocol) == (result.task, result.metric, result.protocol)
    ]
    if not same:
        return result
    [other] = same
    shared = sorted(set(score.scores or ()) & set(other.scores or ()))
    if not shared or score.scores is None or other.scores is None:
        return result
    p_value, test = paired_test([score.scores[row] for row in shared], [other.scores[row] for row in shared])
    difference = Difference(
        baseline=other.result.value, difference=result.value - other.result.value, p_value=p_value, test=test, n=len(shared)
    )
    return result.model_copy(update={"difference": difference})


def _score(answers: Sequence[Mapping[str, Any]], k: int) -> float:
    right = sum(record["score"] for record in answers)
    return right / len(answers) if k == 1 else pass_at_k(len(answers), int(right), k)


def _example(record: Mapping[str, Any]) -> Example:
    prompt = record["prompt"]
    return Example(
        prompt=prompt if len(prompt) <= _EXAMPLE_CHARACTERS else "..." + prompt[-_EXAMPLE_CHARACTERS:],
        response=record["response"][:_EXAMPLE_CHARACTERS],
        prediction=record["prediction"],
        gold=record["gold"][:_EXAMPLE_CHARACTERS],
        score=record["score"],
    )
