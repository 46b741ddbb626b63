"""Several evaluations side by side: which model is best at each task, and where the numbers cannot be compared."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abba_cli.errors import DataError
from abba_cli.evaluation.reporting.tables import (
    COMMONSENSE,
    commonsense_average,
    is_share,
    primary_results,
    show_number,
    task_rank,
)
from abba_cli.evaluation.results import ModelRecord, TaskResult, read_results

AVERAGE = "average"  # the heading of the commonsense tasks' mean
WARNING = "(!)"  # marks columns whose numbers cannot be compared, and the notes that say why
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "brier_score")

_Key = tuple[str, str]  # task and protocol: numbers of two protocols never share a column


@dataclass(frozen=True)
class Cell:
    """A model's score in a column; `n` is None for an average."""

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    n: int | None


@dataclass(frozen=True)
class Column:
    """A task under one protocol, or the average of the commonsense tasks.

    Args:
        heading: The task's name, with the protocol where the comparison has several.
        task: Its name, `average` for the mean.
        protocol: Whose numbers these are.
        share: Whether the scores are shares of 1, shown in percent.
        lower_is_better: As for a perplexity.
        reasons: Why the models' numbers cannot be compared; empty where they can.
    """

    heading: str
    task: str
    protocol: str
    share: bool
    lower_is_better: bool
    reasons: tuple[str, ...]

    @property
    def marked(self) -> str:
        """The heading, with a mark where the numbers cannot be compared."""
        return f"{self.heading} {WARNING}" if self.reasons else self.heading


@dataclass(frozen=True)
class Row:
    """A model, and its score in each column; None where it has none."""

    label: str
    role: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Models by tasks.

    Args:
        columns: In the order of the paper's tables, other tasks after them.
        rows: One a model, in the order of the sources, a run's baseline after it.
        best: For each column the rows that share its best score; none where the numbers cannot be compared or are alone.
        notes: What a reader must know, a sentence each.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    best: tuple[frozenset[int], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A model in a file of results."""

    folder: Path
    model: ModelRecord
    results: dict[_Key, TaskResult]


def compare(sources: Sequence[Path]) -> Comparison:
    """Put evaluations side by side.

    Args:
        sources: Evaluated runs, folders of `abba eval --output`, or results.json files; one given twice counts once.

    Raises:
        DataError: A source holds no results, or its file cannot be read.
    """
    notes: list[str] = []
    entries = _join_baselines([entry for source in sources for entry in _read(source)], notes)
    labels = _distinct_labels(entries)
    found = dict.fromkeys(key for entry in entries for key in entry.results)
    keys = sorted(found, key=lambda key: (key[1] != "paper", task_rank(key[0])))
    if not keys:
        raise DataError(f"{', '.join(map(str, sources))}: no task has a score; run `abba eval` to the end first")
    several = len({protocol for _, protocol in keys}) > 1
    if several:
        notes.append("the protocols paper and harness ask and judge differently: their numbers stand in columns of their own")
    columns: list[Column] = []
    cells: list[list[Cell | None]] = []
    for key in keys:
        column, scores = _column(key, entries, labels, several)
        columns.append(column)
        cells.append(scores)
        if key[0] == COMMONSENSE[-1]:
            _add_average(key[1], entries, columns, cells, several)
    best = tuple(_best(column, one) for column, one in zip(columns, cells, strict=True))
    rows = tuple(Row(labels[i], entry.model.role, tuple(column[i] for column in cells)) for i, entry in enumerate(entries))
    return Comparison(tuple(columns), rows, best, (*notes, *_reasons(columns), *_meaning_of_average(columns)))


def _read(source: Path) -> list[_Entry]:
    source = source.expanduser()
    results = read_results(source)
    folder = source.resolve().parent if source.is_file() else source.resolve()
    folder = folder.parent if folder.name == "eval" else folder
    models = sorted(results.models, key=lambda model: model.role == "baseline")
    return [
        _Entry(folder, model, {(one.task, one.protocol): one for one in primary_results(results, model.label)})
        for model in models
    ]


def _join_baselines(entries: Sequence[_Entry], notes: list[str]) -> list[_Entry]:
    """Show a model once if it is the baseline of several runs, or scored as itself and as a baseline.

    Only where it was asked the same: results that differ in more than the value stay in rows of their own.
    """
    kept: list[_Entry] = []
    for entry in entries:
        for place, other in enumerate(kept):
            if entry == other or (_same_model(entry, other) and _asked_alike(entry, other)):
                notes += _changed(entry, other)
                kept[place] = _Entry(other.folder, other.model, {**entry.results, **other.results})
                break
        else:
            kept.append(entry)
    return kept


def _same_model(entry: _Entry, other: _Entry) -> bool:
    first, second = entry.model, other.model
    same = (first.fingerprint, first.template) == (second.fingerprint, second.template)
    return same and "baseline" in (first.role, second.role)


def _asked_alike(entry: _Entry, other: _Entry) -> bool:
    shared = entry.results.keys() & other.results.keys()
    return all(_conditions(entry.results[key]) == _conditions(other.results[key]) for key in shared)


def _conditions(result: TaskResult) -> tuple[object, ...]:
    return result.metric, result.n, result.prompt_hash, result.shots, result.sampling, result.grader


def _changed(entry: _Entry, other: _Entry) -> list[str]:
    """Scores of one model that came out otherwise although nothing that was asked differs."""
    notes = []
    for key in (key for key in other.results if key in entry.results):
        new, shown = entry.results[key], other.results[key]
        share = is_share(shown.metric, [new.value, shown.value])
        if new.value != shown.value:
            notes.append(
                f"{other.model.label}, {key[0]}: {show_number(shown.value, share)} in {other.folder.name} is shown; the same "
                f"prompts gave {show_number(new.value, share)} in {entry.folder.name}"
            )
    return notes


def _distinct_labels(entries: Sequence[_Entry]) -> list[str]:
    """Labels; equal ones with as much of the end of their folders' paths as tells them apart."""
    labels = [entry.model.label for entry in entries]

    def with_folders(depth: int) -> list[str]:
        ends = ["/".join(entry.folder.parts[-depth:]) for entry in entries]
        return [f"{one} ({end})" if labels.count(one) > 1 else one for one, end in zip(labels, ends, strict=True)]

    for depth in range(1, 1 + max((len(entry.folder.parts) for entry in entries), default=0)):
        named = with_folders(depth)
        if len(set(named)) == len(named):
            return named
    named = with_folders(1)  # several in one folder: nothing but a number tells them apart
    return [f"{one} #{1 + named[:place].count(one)}" if named.count(one) > 1 else one for place, one in enumerate(named)]


def _column(key: _Key, entries: Sequence[_Entry], labels: Sequence[str], several: bool) -> tuple[Column, list[Cell | None]]:
    task, protocol = key
    found = [entry.results.get(key) for entry in entries]
    scored = [(i, one) for i, one in enumerate(found) if one is not None]
    share = all(is_share(one.metric, [other.value for _, other in scored]) for _, one in scored)
    cells = [None if one is None else Cell(one.value, one.stderr, one.interval, one.n) for one in found]

    def differing(name: str, of: Callable[[int, TaskResult], object]) -> list[str]:
        values: dict[object, list[str]] = {}
        for i, one in scored:
            values.setdefault(of(i, one), []).append(labels[i])
        listed = "; ".join(f"{value}: {_names(who)}" for value, who in values.items())
        return [f"different {name} ({listed})"] if len(values) > 1 else []

    templates = {entries[i].model.template for i, _ in scored}
    reasons = [
        *differing("metric", lambda _, one: one.metric),
        *differing("n", lambda _, one: f"{one.n:,}"),
        *differing("shots", lambda _, one: one.shots),
        *differing("sampling", lambda _, one: one.sampling),
        *differing("grader", lambda _, one: one.grader),
    ]
    if len({one.prompt_hash for _, one in scored}) > 1:
        if len(templates) > 1:
            reasons += differing("prompt template", lambda i, _: entries[i].model.template)
        elif len({(one.n, one.shots) for _, one in scored}) == 1:  # else the prompts had to differ
            reasons += differing("prompts, by their hash", lambda _, one: one.prompt_hash[:8])
    heading = f"{task} ({protocol})" if several else task
    lower = any(part in one.metric for _, one in scored for part in _LOWER_IS_BETTER)
    return Column(heading, task, protocol, share, lower, tuple(reasons)), cells


def _names(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 3 else f"{', '.join(labels[:2])} and {len(labels) - 2} more"


def _add_average(
    protocol: str, entries: Sequence[_Entry], columns: list[Column], cells: list[list[Cell | None]], several: bool
) -> None:
    """Add the mean of the commonsense tasks, if any model has all eight."""
    averages: list[Cell | None] = []
    for entry in entries:
        average = next((one for one in commonsense_average(list(entry.results.values())) if one.protocol == protocol), None)
        if average is None:
            averages.append(None)
            continue
        half = 1.959964 * average.stderr
        interval = None if math.isnan(half) else (max(0.0, average.value - half), min(1.0, average.value + half))
        averages.append(Cell(average.value, average.stderr, interval, None))
    if all(average is None for average in averages):
        return
    # Models without an average do no harm to it.
    having = [entry for entry, average in zip(entries, averages, strict=True) if average is not None]
    labels = [entry.model.label for entry in having]
    spoilt = [task for task in COMMONSENSE if _column((task, protocol), having, labels, several)[0].reasons]
    reasons = (f"its tasks are not ({', '.join(spoilt)})",) if spoilt else ()
    columns.append(Column(f"{AVERAGE} ({protocol})" if several else AVERAGE, AVERAGE, protocol, True, False, reasons))
    cells.append(averages)


def _best(column: Column, cells: Sequence[Cell | None]) -> frozenset[int]:
    values = {i: cell.value for i, cell in enumerate(cells) if cell is not None and not math.isnan(cell.value)}
    if column.reasons or len(values) < 2:
        return frozenset()
    best = min(values.values()) if column.lower_is_better else max(values.values())
    return frozenset(i for i, value in values.items() if value == best)


def _reasons(columns: Sequence[Column]) -> list[str]:
    """What makes columns incomparable; columns with the same reasons share a sentence."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for column in columns:
        if column.reasons:
            grouped.setdefault(column.reasons, []).append(column.heading)
    return [
        f"{WARNING} {', '.join(headings)}: not comparable, so no best is marked; {'; '.join(reasons)}"
        for reasons, headings in grouped.items()
    ]


def _meaning_of_average(columns: Sequence[Column]) -> list[str]:
    if all(column.task != AVERAGE for column in columns):
        return []
    return [f"{AVERAGE}: mean of the {len(COMMONSENSE)} commonsense tasks, each counting alike, as in the paper"]
