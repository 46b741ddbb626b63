"""From records to the lines of a report: means over seeds, and paired tests against the reference."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abba_cli.evaluation.reporting.statistics import paired_test
from abba_cli.sweeping.planning import Point, Sweep
from abba_cli.sweeping.records import Record

LEVEL = 0.05
"""Below this p-value a difference counts as one."""


@dataclass(frozen=True)
class Number:
    """A mean over seeds with its standard deviation; the latter is None for one seed."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Number":
        """Over the seeds."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Beside:
    """A line beside the reference.

    Args:
        loss: Difference of the evaluation losses, paired by seed; negative is better.
        loss_p: Two-sided paired t test over seeds; None for less than two.
        score: Difference of the mean scores.
        score_p: Two-sided sign-flip test over the rows of all tasks, each row's score meaned over the seeds; None without rows.
    """

    loss: float | None
    loss_p: float | None
    score: float | None
    score_p: float | None


@dataclass(frozen=True)
class Line:
    """A point with what its runs gave; times are those of a step."""

    point: Point
    records: Sequence[Record]
    tuned: str
    parameters: int
    loss: Number | None
    score: Number | None
    tasks: dict[str, Number]
    seconds: float | None
    processor_seconds: float | None
    memory: int | None
    gradient_norm: float | None
    beside: Beside | None

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.point.label


def summarise(sweep: Sweep, records: Sequence[Record]) -> list[Line]:
    """A line for each point that has at least one finished run, in the sweep's order."""
    done = [record for record in records if record.kind == "run" and record.status == "done"]
    by_label = {point.label: [one for one in done if one.label == point.label] for point in sweep.points}
    lines = []
    for point in sweep.points:
        own = by_label[point.label]
        if not own:
            continue
        reference = _reference(sweep, point)
        others = by_label[reference.label] if reference.label != point.label else []
        lines.append(_line(point, own, beside(own, others) if others else None))
    return lines


@dataclass(frozen=True)
class StepTime:
    """The time of a step by which lines are compared.

    Args:
        quiet: It is the processor's, which other work on the machine hardly changes.
        of: What a line took, in seconds.
    """

    quiet: bool
    of: Callable[[Line], float | None]


def step_time(lines: Sequence[Line]) -> StepTime:
    """The processor's time where all lines have one, which are those of runs on a CPU; or else the time that passed."""
    if all(line.processor_seconds for line in lines):
        return StepTime(True, lambda line: line.processor_seconds)
    return StepTime(False, lambda line: line.seconds)


def _reference(sweep: Sweep, point: Point) -> Point:
    """What a point is compared with: the reference at the same place of the grid or, without variants, the grid's first point."""
    if not sweep.file.variants:
        return sweep.points[0]
    return next(one for one in sweep.points if one.variant == sweep.reference and one.values == point.values)


def _line(point: Point, own: Sequence[Record], compared: Beside | None) -> Line:
    losses = [one.eval_loss for one in own if one.eval_loss is not None]
    tasks = list(dict.fromkeys(task for one in own for task in one.scores))
    norms = [step.gradient_norm for one in own for step in one.curve if step.gradient_norm is not None]
    rates = [one.seconds / one.steps for one in own if one.seconds and one.steps]
    processor_rates = [one.processor_seconds / one.steps for one in own if one.processor_seconds and one.steps]
    return Line(
        point=point,
        records=own,
        tuned=", ".join(dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value)
                                      for one in own for value in one.tuned.values())),
        parameters=own[0].parameters or 0,
        loss=Number.of(losses) if losses else None,
        score=Number.of([mean_score(one) for one in own]) if tasks else None,
        tasks={task: Number.of([one.scores[task] for one in own if task in one.scores]) for task in tasks},
        seconds=statistics.median(rates) if rates else None,
        processor_seconds=statistics.median(processor_rates) if processor_rates else None,
        memory=max((one.peak_memory_bytes or 0 for one in own), default=None),
        gradient_norm=statistics.median(norms) if norms else None,
        beside=compared,
    )  # fmt: skip


def mean_score(record: Record) -> float:
    """Mean over the tasks, each counting alike."""
    return statistics.fmean(record.scores.values()) if record.scores else math.nan


def beside(own: Sequence[Record], others: Sequence[Record]) -> Beside:
    """Compare runs with those of the reference that have the same seeds."""
    seeds = [one.seed for one in own if any(other.seed == one.seed for other in others)]
    mine, theirs = ({one.seed: one for one in some} for some in (own, others))
    losses = [
        first - second
        for first, second in ((mine[seed].eval_loss, theirs[seed].eval_loss) for seed in seeds)
        if first is not None and second is not None
    ]
    rows, other_rows = (_rows([some[seed] for seed in seeds]) for some in (mine, theirs))
    shared = sorted(rows.keys() & other_rows.keys())
    scored = [seed for seed in seeds if mine[seed].scores and theirs[seed].scores]
    return Beside(
        loss=statistics.fmean(losses) if losses else None,
        loss_p=paired_t(losses),
        score=statistics.fmean(mean_score(mine[s]) - mean_score(theirs[s]) for s in scored) if scored else None,
        score_p=paired_test([rows[key] for key in shared], [other_rows[key] for key in shared])[0] if shared else None,
    )


def _rows(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Score of each row of each task, meaned over the runs that answered it."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
        for task, scores in record.rows.items():
            for row, score in scores.items():
                found.setdefault((task, row), []).append(score)
    return {key: statistics.fmean(scores) for key, scores in found.items()}


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p-value of Student's paired t test; None for less than two differences.

    The integral of Student's density for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    n = len(differences)
    if n < 2:
        return None
    deviation = statistics.stdev(differences)
    if deviation == 0:
        return 1.0 if differences[0] == 0 else 0.0
    t = abs(statistics.fmean(differences)) / (deviation / math.sqrt(n))
    freedom = n - 1
    angle = math.atan(t / math.sqrt(freedom))
    term, inside = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(1 if freedom % 2 else 0, freedom - 1, 2):
        inside += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    central = math.sin(angle) * inside
    if freedom % 2:
        central = 2 / math.pi * (angle + central)
    return max(0.0, 1.0 - central)


def near_best(lines: Sequence[Line], better: Callable[[Beside], tuple[float | None, float | None]], best: Line) -> list[str]:
    """Labels of the lines that cannot be told from the best one at `LEVEL`; `better` gives a difference and its p-value."""
    near = []
    for line in lines:
        if line is best:
            continue
        p_value = better(beside(line.records, best.records))[1]
        if p_value is None or p_value >= LEVEL:
            near.append(line.label)
    return near
