"""Running an evaluation and looking at what it left behind."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from abba_cli.errors import DataError, ModelError, RunError
from abba_cli.evaluating import evaluate
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Completion, Request
from abba_cli.evaluation.options import EvaluationOptions
from abba_cli.evaluation.results import Results, TaskResult, read_results
from abba_cli.events import Event, Scored
from abba_cli.speakers import Source

Heard = list[Event]


def scored(source: Source, output: Path, data: Path, *tasks: str, **options: Any) -> tuple[Results, Heard]:
    heard: Heard = []
    given = {"data_dir": data, "output": output, "batch_size": 4} | options
    named = tuple(str(data / "sums.yaml") if task == "sums" else task for task in tasks or ("sums",))
    results, folder = evaluate(source, EvaluationOptions(named, **given), heard.append)
    assert folder == output
    assert read_results(output) == results
    return results, heard


def answers(output: Path) -> dict[tuple[str, str, int, int], str]:
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    return {(row["model"], row["task"], row["row"], row["sample"]): row["response"] for row in rows}


def asked_anew(heard: Heard) -> int:
    last = {(event.model, event.task): event for event in heard if isinstance(event, Scored)}
    return sum(event.done - event.reused for event in last.values())


Answerer = Callable[[Request], str]


def with_stub(monkeypatch: pytest.MonkeyPatch, base: Path, answerer: Answerer) -> None:
    """Has a function write the answers in place of the model."""

    def stub(
        speaker: Any, batches: Sequence[Sequence[Request]], decoding: Decoding, *listeners: Any
    ) -> Iterator[list[Completion]]:
        for batch in batches:
            yield [Completion(one.number, answerer(one), 5, True) for one in batch]

    monkeypatch.setattr("abba_cli.evaluation.paper.answer_batches", stub)


def result_of(results: Results) -> TaskResult:
    [one] = results.results
    return one


def refused(source: Source, data: Path | None, output: Path, *tasks: str, **options: Any) -> str:
    with pytest.raises((DataError, ModelError, RunError)) as caught:
        evaluate(source, EvaluationOptions(tasks, data_dir=data, output=output, **options))
    return str(caught.value)
