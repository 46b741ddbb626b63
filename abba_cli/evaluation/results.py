"""results.json: what an evaluation found, in a form that other programs can rely on."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import DataError

RESULTS_FILE = "results.json"

Protocol = Literal["paper", "harness"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Record):
    """A model that was scored."""

    label: str = Field(description="Its name in tables.")
    role: Literal["model", "baseline"] = Field(description="What was asked for, or the untouched base beside it.")
    base: str | None = Field(description="Hub id or path of the base, if an adapter was scored.")
    adapter: str | None = Field(description="Path or hub id of the adapter.")
    fingerprint: str = Field(description="Digest of the weights in memory: another adapter, base or dtype has another one.")
    template: str = Field(description="Prompt template: none, alpaca, chat, paper, or a Jinja file.")
    dtype: str = Field(description="Of the weights.")
    quantization: str = Field(description="Of the weights: none, nf4 or int8.")


class Difference(_Record):
    """A score beside the baseline's, over the rows that both answered."""

    baseline: float = Field(description="The baseline's value.")
    difference: float = Field(description="Value minus baseline.")
    p_value: float = Field(description="Two-sided paired test of no difference: exact McNemar for 0/1 scores, else sign flips.")
    test: str = Field(description="Which test.")
    n: int = Field(description="Rows that both answered.")


class Example(_Record):
    """One answer, to look at."""

    prompt: str = Field(description="The prompt as the model got it; its end, where it is long.")
    response: str = Field(description="What the model wrote.")
    prediction: str | None = Field(description="What was extracted; null where nothing was.")
    gold: str = Field(description="The right answer.")
    score: float = Field(description="0 to 1.")


class TaskResult(_Record):
    """One number: a task, scored with a metric, under a protocol, for a model."""

    task: str = Field(description="Name of the task.")
    model: str = Field(description="Label of the model.")
    protocol: Protocol = Field(description="The paper's, or lm-evaluation-harness's.")
    metric: str = Field(description="accuracy, pass@1, pass@10, acc, acc_norm, exact_match, ...")
    primary: bool = Field(description="Whether this is the task's number for tables; others are beside it.")
    value: float = Field(description="Mean score, as the harness gives it; 0 to 1 for all of abba's own.")
    n: int = Field(description="Rows scored.")
    stderr: float | None = Field(description="Standard error of the value.")
    interval: tuple[float, float] | None = Field(description="95% interval: Wilson's for 0/1 scores, else value +/- 1.96 stderr.")
    prompt_hash: str = Field(description="Digest of every prompt in order: equal hashes mean that the same was asked.")
    shots: int = Field(description="Worked examples before the question.")
    sampling: str = Field(description="greedy, or the settings of the draws.")
    grader: Literal["abba", "released", "harness"] = Field(description="Whose rules judged the answers.")
    extraction_failures: int | None = Field(description="Answers in which nothing was found, scored 0; null where none is read.")
    unmarked: int | None = Field(description="Answers taken as the last number, without a mark such as `The answer is:`.")
    disagreements: int | None = Field(description="Answers that the other grader judges differently.")
    unreadable_rows: int = Field(description="Rows of the data that could not be read, and are not in n.")
    data: str = Field(description="Where the rows came from.")
    difference: Difference | None = Field(description="Beside the baseline; null without one.")
    examples: tuple[Example, ...] = Field(description="The first few answers.")


class Results(_Record):
    """All of results.json."""

    schema_version: Literal[1] = Field(1, description="Of this form; another number means that keys have changed their meaning.")
    abba: str = Field(description="Version that wrote it.")
    created: str = Field(description="ISO 8601, UTC.")
    seconds: float = Field(description="Of the last evaluation.")
    settings: dict[str, Any] = Field(description="The options it ran with.")
    models: tuple[ModelRecord, ...] = Field(description="The baseline first, if there is one.")
    results: tuple[TaskResult, ...] = Field(description="One for each model, task and metric.")


def added_to(before: Results, new: Results) -> Results:
    """New results together with those that the folder has of the same model: other tasks, the other protocol, its baseline.

    Args:
        before: What results.json holds.
        new: Of the evaluation that has just ended; they take the place of older ones of the same task and protocol.

    Returns:
        Both; only the new ones where the older are another model's, or the same model's under another template.
    """

    def identity(results: Results) -> list[tuple[str, str, str]]:
        return [(one.label, one.fingerprint, one.template) for one in results.models if one.role == "model"]

    if identity(before) != identity(new):
        return new
    again = {(one.model, one.task, one.protocol) for one in new.results}
    kept = [one for one in before.results if (one.model, one.task, one.protocol) not in again]
    labels = {one.label for one in new.models}
    models = [one for one in before.models if one.label not in labels and any(one.label == result.model for result in kept)]
    in_order = sorted([*models, *new.models], key=lambda one: one.role != "baseline")
    places = {one.label: place for place, one in enumerate(in_order)}
    results = sorted([*kept, *new.results], key=lambda one: places.get(one.model, 0))
    return new.model_copy(update={"models": tuple(in_order), "results": tuple(results)})


def write_results(folder: Path, results: Results) -> None:
    """Write results.json, whole or not at all."""
    with disk_errors(folder):
        write_atomically(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")


def read_results(source: Path) -> Results:
    """Read the results of an evaluation.

    Args:
        source: results.json, the folder that holds it, or a run that was evaluated (its eval/ is taken).

    Raises:
        DataError: There are none, or the file is not ours.
    """
    candidates = [source] if source.is_file() else [source / RESULTS_FILE, source / "eval" / RESULTS_FILE]
    file = next((one for one in candidates if one.is_file()), None)
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a run, or a folder that `abba eval` wrote")
    if file is None:
        raise DataError(f"{source} holds no {RESULTS_FILE}; `abba eval` writes one into its --output")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(tree, dict) or "schema_version" not in tree:
            raise ValueError("no schema_version in it")
        if tree["schema_version"] != 1:
            raise ValueError(f"schema_version is {tree['schema_version']!r}, this version of abba reads 1")
        return Results.model_validate(tree)
    except (OSError, ValueError, RecursionError) as error:  # pydantic's ValidationError is a ValueError
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise DataError(f"{file} is not a results file of `abba eval`: {reason}") from None
