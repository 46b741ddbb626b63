"""What long work tells whoever watches it; the `ui` rooms draw these, the Python API may listen to them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from abba_cli.plan import Plan
    from abba_cli.prepared import PreparedData
    from abba_cli.records import Outcome


@dataclass(frozen=True)
class Stage:
    """A step of the preparation begins; `total` > 0 when it can be counted, and `done` then moves."""

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Audited:
    """The data is read, tokenised and masked."""

    data: "PreparedData"


@dataclass(frozen=True)
class Planned:
    """Layers, parameters and memory are known."""

    plan: "Plan"


@dataclass(frozen=True)
class Started:
    """Training begins after `step` of `total_steps` optimizer steps; `resumed_from` is None for a fresh start."""

    step: int
    total_steps: int
    resumed_from: Path | None


@dataclass(frozen=True)
class Stepped:
    """An optimizer step was logged. Memory is the peak so far, in bytes, of the GPU or else of the process."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    gradient_norm: float | None
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """The evaluation loss (mean over supervised tokens); `best` when it is the lowest so far."""

    step: int
    loss: float
    best: bool


@dataclass(frozen=True)
class Sampled:
    """A held-out prompt, what the model answers and what the data says."""

    step: int
    prompt: str
    answer: str
    reference: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    path: Path


@dataclass(frozen=True)
class Stopping:
    """A signal came: training ends after this step, with a checkpoint."""


@dataclass(frozen=True)
class Finished:
    """The run directory is complete; `already` when there was nothing left to do."""

    path: Path
    already: bool
    outcome: "Outcome"


@dataclass(frozen=True)
class Wrote:
    """A tensor of a merged checkpoint is written: tensors and bytes so far and in all."""

    tensors: int
    total_tensors: int
    size: int
    total_size: int


@dataclass(frozen=True)
class Scored:
    """Rows of a task so far: `done` of `total` (`reused` of them from an earlier evaluation), `correct` is the sum of scores.

    Between two batches `tokens` of at most `most_tokens` are written for the next rows.
    """

    model: str
    task: str
    done: int
    total: int
    correct: float
    reused: int
    tokens: int = 0
    most_tokens: int = 0


@dataclass(frozen=True)
class Note:
    """A remark that should stay on the screen."""

    text: str


Event = Stage | Audited | Planned | Started | Stepped | Evaluated | Sampled | Saved | Stopping | Finished | Wrote | Scored | Note
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """A listener that does nothing."""
