"""What is kept of each run: a small JSON file under records/, by which a sweep goes on and from which its report is made."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from abba_cli import __version__
from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import RunError
from abba_cli.evaluation.journal import Journal
from abba_cli.evaluation.reporting.tables import primary_results
from abba_cli.evaluation.results import read_results
from abba_cli.records import read_outcome
from abba_cli.rundir import RunDir
from abba_cli.sweeping.planning import Kind, Run

FOLDER = "records"


class Step(BaseModel):
    """One logged step."""

    model_config = ConfigDict(frozen=True)

    step: int
    loss: float
    gradient_norm: float | None


class Record(BaseModel):
    """A run that has ended."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="Of the run, and its folder below the sweep's.")
    kind: Kind
    label: str = Field(description="The variant and the grid's values.")
    variant: str
    values: dict[str, Any] = Field(description="The grid's values, by dotted key.")
    tuned: dict[str, Any] = Field(description="What was tried, or chosen by tuning.")
    seed: int
    digest: str = Field(description="Of all that the result depends on.")
    status: Literal["done", "failed"]
    error: str | None = Field(None, description="Of a failed one, its last words.")
    abba: str = Field(__version__, description="Version that ran it.")
    parameters: int | None = Field(None, description="That were trained.")
    steps: int | None = None
    seconds: float | None = Field(None, description="Of training, without checkpoints and evaluations.")
    processor_seconds: float | None = Field(
        None, description="Of the first process's threads, where training was on a CPU; other work there hardly changes it."
    )
    tokens: int | None = Field(None, description="That were trained on.")
    peak_memory_bytes: int | None = Field(None, description="Of the device, or else of the process.")
    train_loss: float | None = Field(None, description="Mean of the last tenth of the steps.")
    eval_loss: float | None = Field(None, description="Of the kept adapter, per supervised token.")
    scores: dict[str, float] = Field({}, description="Task to mean score.")
    rows: dict[str, dict[str, float]] = Field({}, description="Task to row to score, for paired tests.")
    curve: list[Step] = Field([], description="The logged steps.")


def record_of(run: Run, folder: Path) -> Record:
    """Read what a finished run left.

    Args:
        run: The run.
        folder: Its run directory.
    """
    directory = RunDir(folder)
    provenance = directory.provenance()
    outcome = read_outcome(provenance)
    steps = [row for row in directory.metrics() if "loss" in row]
    on_cpu = not provenance["hardware"]["gpus"] and all("processor_seconds" in row for row in steps)
    scores: dict[str, float] = {}
    rows: dict[str, dict[str, float]] = {}
    if (folder / "eval" / "results.json").is_file():
        results = read_results(folder / "eval")
        label = next(one.label for one in results.models if one.role == "model")
        scores = {one.task: one.value for one in primary_results(results, label)}
        for answer in Journal(folder / "eval").read().values():
            rows.setdefault(answer["task"], {})[str(answer["row"])] = answer["score"]
    return Record(
        **_identity(run),
        status="done",
        parameters=provenance["parameters"]["trainable"],
        steps=outcome.steps,
        seconds=round(outcome.seconds - (outcome.saving_seconds or 0.0), 1),
        processor_seconds=steps[-1]["processor_seconds"] if steps and on_cpu else None,
        tokens=steps[-1]["tokens"] if steps else None,
        peak_memory_bytes=outcome.peak_memory_bytes,
        train_loss=outcome.train_loss,
        eval_loss=outcome.eval_loss,
        scores=scores,
        rows=rows,
        curve=[Step.model_validate(row) for row in steps],
    )


def failure(run: Run, error: str) -> Record:
    """Say that a run failed."""
    return Record(**_identity(run), status="failed", error=error)


def _identity(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "kind": run.kind,
        "label": run.point.label,
        "variant": run.point.variant,
        "values": dict(run.point.values),
        "tuned": dict(run.tuned),
        "seed": run.seed,
        "digest": run.digest,
    }


def read_record(run: Run, output: Path) -> Record | None:
    """The record of a run, if there is one of the same digest.

    Raises:
        RunError: The file is there, but no record.
    """
    file = _file(run.name, output)
    if not file.is_file():
        return None
    try:
        record = Record.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise RunError(f"cannot read {file}: {str(error).splitlines()[0]}; remove it to run {run.name} again") from None
    return record if record.digest == run.digest else None


def write_record(record: Record, output: Path) -> None:
    """Write a record, whole or not at all."""
    file = _file(record.name, output)
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, record.model_dump_json(exclude_defaults=True) + "\n")


def _file(name: str, output: Path) -> Path:
    return output / FOLDER / f"{name.replace('/', '--')}.json"
