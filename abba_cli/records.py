"""What a run records of itself in provenance.json, in so far as it is read again."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        steps: Optimizer steps made.
        planned_steps: Steps that the recipe asked for; more than `steps` after early stopping.
        used_step: The step whose adapter was kept, the best one or the last.
        seconds: Training time, over all the starts of the run.
        peak_memory_bytes: Largest peak of any start.
        train_loss: Mean training loss over the last tenth of the steps.
        eval_loss_before: Before the first step, where there is evaluation data.
        eval_loss: Of the kept adapter.
        saving_seconds: The part of `seconds` that went into checkpoints, and the last one; None in older records.
    """

    steps: int
    planned_steps: int
    used_step: int
    seconds: float
    peak_memory_bytes: int
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss: float | None
    saving_seconds: float | None = None


def is_record(tree: Any) -> bool:
    """Whether the parts of a provenance.json that are read somewhere are what they should be."""
    if not isinstance(tree, dict):
        return False
    try:
        if tree.get("outcome") is not None:
            read_outcome(tree)
    except ValidationError:
        return False
    base, data, rows = (tree.get(name, otherwise) for name, otherwise in (("base", {}), ("data", {}), ("rows_per_step", 1)))
    if not isinstance(base, dict) or not isinstance(data, dict) or not isinstance(rows, int) or rows < 1:
        return False
    return all(isinstance(text, str | None) for text in base.values()) and isinstance(data.get("fingerprint", ""), str)


def read_outcome(record: dict[str, Any]) -> Outcome:
    """The outcome in the record of a finished run; what is unknown in it is left out.

    Raises:
        ValidationError: It is not what an outcome should be.
    """
    # Through JSON, where strict means the types of the values; in Python it would mean that an Outcome is given.
    return TypeAdapter(Outcome).validate_json(json.dumps(record["outcome"]), strict=True)
