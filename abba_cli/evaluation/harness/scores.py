"""What the harness found, as one score a metric: with its error, its documents, its failures and a few answers."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from abba_cli.evaluation.harness.tasks import harness_name, primary_metric
from abba_cli.evaluation.results import Example

_EXAMPLES = 3
_PROMPT_LETTERS = 1500
_RESAMPLES = 100


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task.

    Attributes:
        task: The name that was asked for; for members of a group or tag the harness's.
        metric: Its name; where the task filters answers in several ways, `METRIC,FILTER`.
        primary: The task's number for tables. Members of a group that has a number of its own have none.
        value: As the harness computes it.
        stderr: Its standard error; None where there is no way to it.
        n: Documents.
        scores: By number of the document; None where the metric is no mean over documents.
        prompt_hash: Digest of all that was asked, in order.
        shots: Worked examples.
        extraction_failures: Answers in which a filter found nothing; None where none looks.
        examples: The first few answers.
        data: Where the rows came from.
    """

    task: str
    metric: str
    primary: bool
    value: float
    stderr: float | None
    n: int
    scores: Mapping[int, float] | None
    prompt_hash: str
    shots: int
    extraction_failures: int | None
    examples: tuple[Example, ...]
    data: str


def scores_of(asked: str, found: dict[str, Any], loaded: dict[str, Any], came_from: Mapping[str, str]) -> list[HarnessScore]:
    """The scores of what was asked for: of a group before those of its members.

    Args:
        asked: The name that was asked for.
        found: What the harness's `evaluate` returns.
        loaded: The tasks and groups it was given.
        came_from: Where the rows of each task came from.
    """
    grouped = {name for name, group in loaded.get("groups", {}).items() if group.has_aggregation}
    members = {one.task_name for name in grouped for one in loaded["groups"][name].get_all_tasks()}
    alone = len(loaded["tasks"]) == 1 and not loaded.get("groups")
    single = {
        name: _of_task(asked if alone else name, task, found, came_from.get(name, ""), is_member=name in members)
        for name, task in loaded["tasks"].items()
    }
    inner = {one.name for name in grouped for one in loaded["groups"][name].get_all_groups()}
    of_groups = [
        score
        for name in loaded.get("groups", {})
        if name in grouped
        for score in _of_group(
            asked if name == harness_name(asked) else name, loaded["groups"][name], found, single, name in inner
        )
    ]
    return of_groups + [score for scores in single.values() for score in scores]


def _of_task(shown: str, task: Any, found: dict[str, Any], data: str, is_member: bool) -> list[HarnessScore]:
    name = task.task_name
    results = found["results"][name]
    keys = _metrics(results)
    preferred = primary_metric(name)
    primary = next((key for key in keys if key.split(",")[0] == preferred), next(iter(keys), None))
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    scores = []
    for key in keys:
        metric, _, filtered = key.partition(",")
        these = [sample for sample in samples if sample["filter"] == filtered and metric in sample]
        values = {sample["doc_id"]: sample[metric] for sample in these}
        aggregate = task.aggregation().get(metric)
        is_mean = getattr(aggregate, "__name__", "") == "mean" and all(isinstance(one, Real) for one in values.values())
        fallback = _fallback(task, filtered)
        scores.append(
            HarnessScore(
                task=shown,
                metric=metric if filtered == "none" else key,
                primary=key == primary and not is_member,
                value=float(results[key]),
                stderr=_stderr(results.get(f"{metric}_stderr,{filtered}"), aggregate, list(values.values()), is_mean),
                n=len(values),
                scores={number: float(value) for number, value in values.items()} if is_mean else None,
                prompt_hash=_digest([sample["arguments"] for sample in these]),
                shots=int(found["n-shot"].get(name) or 0),
                extraction_failures=None if fallback is None else sum(_first(one["filtered_resps"]) == fallback for one in these),
                examples=tuple(_example(task, sample, metric, fallback) for sample in these[:_EXAMPLES]),
                data=data,
            )
        )
    return scores


def _of_group(
    shown: str, group: Any, found: dict[str, Any], single: Mapping[str, list[HarnessScore]], is_member: bool
) -> list[HarnessScore]:
    results = found["results"][group.name]
    scores: list[HarnessScore] = []
    for key in _metrics(results):
        metric, _, filtered = key.partition(",")
        label = metric if filtered == "none" else key
        parts = [score for one in group.get_all_tasks() for score in single[one.task_name] if score.metric == label]
        values = [value for part in parts if part.scores is not None for _, value in sorted(part.scores.items())]
        n = sum(part.n for part in parts)
        # Weighted by size it is a mean over documents; else one over tasks.
        weighted = {one.metric: one.weight_by_size for one in group.aggregate_metric_list}.get(metric, False)
        is_mean = bool(weighted) and len(values) == n
        sources = list(dict.fromkeys(part.data for part in parts))
        failures = [part.extraction_failures for part in parts if part.extraction_failures is not None]
        scores.append(
            HarnessScore(
                task=shown,
                metric=label,
                primary=not scores and not is_member,
                value=float(results[key]),
                stderr=_stderr(results.get(f"{metric}_stderr,{filtered}"), None, values, is_mean),
                n=n,
                scores=dict(enumerate(values)) if is_mean else None,
                prompt_hash=_digest([part.prompt_hash for part in parts]),
                shots=max((part.shots for part in parts), default=0),
                extraction_failures=sum(failures) if failures else None,
                examples=tuple(example for part in parts for example in part.examples[:1])[:_EXAMPLES],
                data=sources[0] + (f" and {len(sources) - 1} more" if len(sources) > 1 else ""),
            )
        )
    return scores


def _metrics(results: Mapping[str, Any]) -> list[str]:
    """The keys METRIC,FILTER of what is a number."""
    return [key for key in results if "," in key and "_stderr," not in key and _number(results[key]) is not None]


def _stderr(
    theirs: Any, aggregate: Callable[[Sequence[Any]], float] | None, values: Sequence[Any], is_mean: bool
) -> float | None:
    if (number := _number(theirs)) is not None or len(values) < 2:
        return number
    if is_mean:
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    if aggregate is None:
        return None
    draw = random.Random(0)
    again = [float(aggregate(draw.choices(values, k=len(values)))) for _ in range(_RESAMPLES)]
    mean = sum(again) / len(again)
    return math.sqrt(sum((value - mean) ** 2 for value in again) / (len(again) - 1))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, Real) else None


def _fallback(task: Any, filtered: str) -> str | None:
    """What a task's filter writes where it finds nothing; None where it does not look for anything."""
    for one in task.config.filter_list or ():
        steps = one["filter"] if one["name"] == filtered else ()
        for step in steps:
            if "regex" in str(step["function"]):
                return str(step.get("fallback", "[invalid]"))
    return None


def _first(response: Any) -> Any:
    """The first of answers that may be lists of lists."""
    while isinstance(response, list) and response:
        response = response[0]
    return response


def _example(task: Any, sample: Mapping[str, Any], metric: str, fallback: str | None) -> Example:
    arguments = sample["arguments"]
    prompt = str(arguments[0][0])
    value = sample[metric]
    score = float(value) if isinstance(value, Real) else 0.0
    if task.OUTPUT_TYPE == "multiple_choice":
        response, gold = _choice(task, sample, normalised=metric == "acc_norm")
        prediction: str | None = response
    elif task.OUTPUT_TYPE == "generate_until":
        response = str(_first(sample["resps"]))
        found = _first(sample["filtered_resps"])
        prediction = None if fallback is not None and found == fallback else str(found)
        gold = str(sample["target"])
    else:
        response = prediction = f"log-likelihood {_first([list(one) for one in sample['filtered_resps']])}"
        gold = str(arguments[0][1]) if len(arguments[0]) > 1 else ""
    return Example(prompt=prompt[-_PROMPT_LETTERS:], response=response, prediction=prediction, gold=gold, score=score)


def _choice(task: Any, sample: Mapping[str, Any], normalised: bool) -> tuple[str, str]:
    """The likeliest choice and the right one, as texts."""
    choices = task.doc_to_choice(sample["doc"])
    likelihoods = [answer[0] for answer in sample["filtered_resps"]][: len(choices)]
    if normalised:
        likelihoods = [one / max(1, len(choice)) for one, choice in zip(likelihoods, choices, strict=True)]
    best = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
    # Where the choices stand before the text that is judged, the prompt's place holds the number of the right one.
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    gold = gold[0] if isinstance(gold, list) and gold else gold
    return str(best).strip(), str(choices[gold] if isinstance(gold, int) and 0 <= gold < len(choices) else gold).strip()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]
