"""results.csv and report.md of a sweep: first the answer, on one screen; then the table, the tuning, and what is missing."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from abba_cli.evaluation.reporting.tables import escape_markdown, markdown_row
from abba_cli.sweeping.planning import Sweep, short, show
from abba_cli.sweeping.records import Record
from abba_cli.sweeping.summary import LEVEL, Line, Number, mean_score, near_best, step_time

_COLUMNS = (
    *("name", "kind", "label", "seed", "status", "parameters", "steps", "eval_loss", "train_loss", "mean_score"),
    *("seconds", "seconds_per_step", "processor_seconds", "tokens", "peak_memory_bytes", "error"),
)


@dataclass(frozen=True)
class Grid:
    """A table: its headings and rows; the first column is text, all others are numbers."""

    headings: list[str]
    rows: list[list[str]]


def answer(sweep: Sweep, lines: Sequence[Line]) -> list[str]:
    """What a person who has to choose should know, a sentence each."""
    if not lines:
        return ["No run has ended yet."]
    said = []
    with_loss = [line for line in lines if line.loss is not None]
    best_loss = min(with_loss, key=lambda line: line.loss.mean if line.loss else 0.0) if with_loss else None
    scored = [line for line in lines if line.score is not None]
    best_score = max(scored, key=lambda line: line.score.mean if line.score else 0.0) if scored else None
    seeds = max(len(line.records) for line in lines)
    if best_loss is not None and best_loss.loss is not None:
        near = near_best(with_loss, lambda one: (one.loss, one.loss_p), best_loss)
        said.append(
            f"Lowest evaluation loss: {best_loss.label}, {number(best_loss.loss, 4)}{_against(best_loss, 'loss')}."
            f"{_near(near, tested=seeds > 1)}"
        )
    if best_score is not None and best_score.score is not None:
        near = near_best(scored, lambda one: (one.score, one.score_p), best_score)
        said.append(
            f"Best mean score: {best_score.label}, {number(best_score.score, 1, 100)}{_against(best_score, 'score')}."
            f"{_near(near, tested=True)}"
        )
    winner = best_score if best_score is not None and best_loss is None else best_loss
    if winner is not None:
        said.append(_cost(winner, lines, sweep))
        said.append(f"To train it alone: abba train {sweep.output / winner.records[0].name}.yaml --set output=out/mine")
    return [one for one in said if one]


def _against(line: Line, what: str) -> str:
    beside = line.beside
    difference, p = (None, None) if beside is None else (getattr(beside, what), getattr(beside, f"{what}_p"))
    if difference is None:
        return ""
    shown = f"{difference:+.4f}" if what == "loss" else f"{100 * difference:+.1f}"
    return f" ({shown} beside the reference{'' if p is None else f', p = {p:.2g}'})"


def _near(near: Sequence[str], tested: bool) -> str:
    if not near:
        return " All others are worse beyond chance."
    why = f"at p < {LEVEL:g}" if tested else "for want of a second seed"
    return f" Not told apart from it {why}: {', '.join(near)}."


def _cost(winner: Line, lines: Sequence[Line], sweep: Sweep) -> str:
    other = next((line for line in lines if line.point.variant == sweep.reference), None)
    if other is None or other is winner:
        return ""
    time = step_time([winner, other])
    own, others = time.of(winner), time.of(other)
    if not (own and others and winner.memory and other.memory):
        return ""
    return (
        f"{winner.label} takes {own / others:.2f} times the {'processor ' if time.quiet else ''}time of {other.label} and "
        f"{winner.memory / other.memory:.2f} times its memory, with {winner.parameters / other.parameters:.2f} times its trained "
        "parameters."
    )


def number(value: Number | None, digits: int, times: float = 1.0) -> str:
    """A mean, with its deviation where there are several seeds."""
    if value is None:
        return "-"
    deviation = "" if value.deviation is None else f" ± {times * value.deviation:.{digits}f}"
    return f"{times * value.mean:.{digits}f}{deviation}"


def table(lines: Sequence[Line], every_task: bool = True) -> Grid:
    """A row for each line; columns that nobody has are left out, and each task's own unless `every_task`."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.tasks))
    time = step_time(lines)
    shown = tasks if every_task or len(tasks) == 1 else []
    columns: list[tuple[str, list[str]]] = [
        ("run", [line.label for line in lines]),
        ("seeds", [str(len(line.records)) for line in lines]),
        ("parameters", [f"{line.parameters / 1e6:.3g} M" for line in lines]),
        ("tuned", [line.tuned for line in lines]),
        ("loss", [number(line.loss, 4) for line in lines]),
        ("beside reference", [_beside(line, "loss") for line in lines]),
        *((task, [number(line.tasks.get(task), 1, 100) for line in lines]) for task in shown),
        *([("mean score", [number(line.score, 1, 100) for line in lines])] if len(tasks) > 1 else []),
        *([("beside reference", [_beside(line, "score") for line in lines])] if tasks else []),
        ("CPU s/step" if time.quiet else "s/step", [f"{taken:.2f}" if (taken := time.of(line)) else "" for line in lines]),
        ("GB", [f"{line.memory / 1e9:.2f}" if line.memory else "" for line in lines]),
        ("gradient norm", [f"{line.gradient_norm:.2g}" if line.gradient_norm is not None else "" for line in lines]),
    ]
    kept = [(heading, cells) for heading, cells in columns if heading == "run" or any(cell not in ("", "-") for cell in cells)]
    return Grid([heading for heading, _ in kept], [list(row) for row in zip(*(cells for _, cells in kept), strict=True)])


def _beside(line: Line, what: str) -> str:
    text = _against(line, what)
    return text.removeprefix(" (").removesuffix(")").replace(" beside the reference", "") if text else ""


def markdown(sweep: Sweep, lines: Sequence[Line], records: Sequence[Record], left: Sequence[str], figures: Sequence[str]) -> str:
    """The whole report."""
    grid = table(lines)
    text = [f"# {sweep.path.stem}", "", *(f"- {escape_markdown(one)}" for one in answer(sweep, lines)), ""]
    text += missing(records, left)
    if lines:
        text += ["## Runs", "", *_markdown_table(grid), "", *(f"- {note}" for note in notes(sweep, lines)), ""]
    for figure in figures:
        text += [f"![{figure.removesuffix('.png')}]({figure})", ""]
    if tuning := [record for record in records if record.kind == "tuning"]:
        text += ["## Tuning", "", *_markdown_table(_tuning(tuning)), ""]
    return "\n".join(text)


def missing(records: Sequence[Record], left: Sequence[str]) -> list[str]:
    """What failed and what was not run, as a section; nothing where all is there."""
    failed = [record for record in records if record.status == "failed"]
    if not failed and not left:
        return []
    text = ["## Missing", ""]
    text += [f"- {record.name} failed: {escape_markdown(record.error or '')}" for record in failed]
    text += [f"- not run, for want of time or of a tuning run that ended well: {', '.join(left)}"] if left else []
    return [*text, ""]


def notes(sweep: Sweep, lines: Sequence[Line]) -> list[str]:
    """What a reader of the table has to know."""
    told = []
    if any(len(line.records) > 1 for line in lines):
        told.append("mean ± sample standard deviation over the seeds")
    if any(line.beside for line in lines):
        told.append(
            f"beside reference: difference from {_reference_label(sweep)}, with p of a paired t test over seeds (loss) or of "
            "sign flips over the rows of all tasks (score); two-sided, and not corrected for the number of lines"
        )
    if any(line.tasks for line in lines):
        told.append("scores in percent")
    if edges := _at_an_edge(lines):
        told.append(f"chosen at an edge of the values tried, so that a wider range may change the order: {'; '.join(edges)}")
    told.append("loss: on the evaluation rows, per supervised token")
    if step_time(lines).quiet:
        told.append(
            "CPU s/step: the processor's time for a step, over all threads, median of the runs; GB: the largest peak of the "
            "process, which may differ from run to run by a quarter"
        )
    else:
        told.append("s/step and GB: median of the runs, with whatever else the machine did meanwhile, and the largest peak")
    return told


def _at_an_edge(lines: Sequence[Line]) -> list[str]:
    """Tuned keys with the lines whose choice is the smallest or the largest number tried."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for key, tried in line.point.tune.items():
            numbers = [value for value in tried if isinstance(value, int | float)]
            if len(numbers) > 1 and line.records[0].tuned.get(key) in (min(numbers), max(numbers)):
                found.setdefault(short(key), []).append(line.label)
    return [f"{key} of {', '.join(labels)}" for key, labels in found.items()]


def _reference_label(sweep: Sweep) -> str:
    return sweep.reference or sweep.points[0].label


def _tuning(records: Sequence[Record]) -> Grid:
    rows = []
    best: dict[str, float] = {}
    for record in records:
        if record.eval_loss is not None:
            best[record.label] = min(best.get(record.label, record.eval_loss), record.eval_loss)
    for record in records:
        tried = ", ".join(f"{short(key)} {show(value)}" for key, value in record.tuned.items())
        loss = "failed" if record.eval_loss is None else f"{record.eval_loss:.4f}"
        rows.append([record.label, tried, f"{loss} *" if record.eval_loss == best.get(record.label, -1.0) else loss])
    return Grid(["run", "tried", "evaluation loss (* chosen)"], rows)


def _markdown_table(grid: Grid) -> list[str]:
    rule = "| --- |" + " ---: |" * (len(grid.headings) - 1)
    return [markdown_row(grid.headings), rule, *(markdown_row([escape_markdown(cell) for cell in row]) for row in grid.rows)]


def results_csv(records: Sequence[Record]) -> str:
    """One row for each run; the grid's and the tuned values, and each task's score, have columns of their own."""
    keys = list(dict.fromkeys(key for record in records for key in (*record.values, *record.tuned)))
    tasks = list(dict.fromkeys(task for record in records for task in record.scores))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_COLUMNS, *keys, *(f"score:{task}" for task in tasks)], lineterminator="\n")
    writer.writeheader()
    for record in records:
        row = {key: getattr(record, key) for key in _COLUMNS if key in Record.model_fields}
        row["mean_score"] = mean_score(record) if record.scores else None
        row["seconds_per_step"] = round(record.seconds / record.steps, 4) if record.seconds and record.steps else None
        values = {**record.values, **record.tuned, **{f"score:{task}": value for task, value in record.scores.items()}}
        writer.writerow(row | values)
    return text.getvalue()
