"""Tables of one evaluation: for the terminal, and as Markdown for a README or a model card."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from abba_cli.evaluation.results import Results, TaskResult
from abba_cli.evaluation.tasks import GROUPS

COMMONSENSE = GROUPS["commonsense"]  # in the order of the paper's tables
TASK_ORDER = tuple(name for group in GROUPS.values() for name in group)
_NO_SHARES = ("perplexity", "bits_per_byte", "likelihood")  # in names of the harness's metrics that are no shares of 1
_HEADINGS = ("task", "protocol", "n", "score", "+/-", "baseline", "change", "p")


@dataclass(frozen=True)
class Average:
    """The mean of the eight commonsense tasks under one protocol.

    Args:
        protocol: Whose.
        value: Mean of the eight values, each task counting alike.
        stderr: Its standard error; NaN where one of the tasks has none.
        baseline: The same mean of the baseline, where all eight have one.
    """

    protocol: str
    value: float
    stderr: float
    baseline: float | None


def results_table(results: Results) -> Table:
    """Scores in percent with one standard error, beside the baseline's where there is one. Fits 80 columns."""
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold")
    headings, rows = _grid(results)
    for heading in headings:
        if heading in ("task", "protocol"):
            table.add_column(heading, overflow="fold")  # the columns that may be folded give way to the numbers
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    models = _scored_models(results)
    if len(models) == 1:
        table.title = Text(models[0])
    for model, cells in rows:
        if cells is None:
            table.add_row(Text(model, style="bold"))
        else:
            table.add_row(_broken(cells[0]), *map(Text, cells[1:]), style="bold" if cells[0].startswith("average") else None)
    return table


def results_markdown(results: Results) -> str:
    """The same table as Markdown, under a caption that says how the numbers came about."""
    headings, rows = _grid(results)
    models = _scored_models(results)
    lines = [f"**{escape_markdown(', '.join(models))}**", "", _caption(results), ""]
    lines.append(markdown_row(headings))
    lines.append("|" + "|".join(" --- " if heading in ("task", "protocol") else " ---: " for heading in headings) + "|")
    for model, cells in rows:
        if cells is None:
            lines.append(markdown_row([f"**{escape_markdown(model)}**", *[""] * (len(headings) - 1)]))
        else:
            mark = "**" if cells[0].startswith("average") else ""
            lines.append(markdown_row([f"{mark}{escape_markdown(cells[0])}{mark}", *map(escape_markdown, cells[1:])]))
    return "\n".join(lines) + "\n"


def commonsense_average(results: Sequence[TaskResult]) -> list[Average]:
    """The paper's average, for every protocol under which one model has all eight tasks.

    Args:
        results: Of one model, one for a task and protocol.
    """
    averages = []
    for protocol in dict.fromkeys(result.protocol for result in results):
        by_task = {result.task: result for result in results if result.protocol == protocol}
        if any(task not in by_task for task in COMMONSENSE):
            continue
        eight = [by_task[task] for task in COMMONSENSE]
        errors = [math.nan if one.stderr is None else one.stderr for one in eight]
        baselines = [one.difference.baseline for one in eight if one.difference is not None]
        averages.append(
            Average(
                protocol,
                value=math.fsum(one.value for one in eight) / len(eight),
                stderr=math.sqrt(math.fsum(error**2 for error in errors)) / len(eight),
                baseline=math.fsum(baselines) / len(eight) if len(baselines) == len(eight) else None,
            )
        )
    return averages


def primary_results(results: Results, model: str) -> list[TaskResult]:
    """The numbers of a model that stand for its tasks: the paper's protocol first, tasks in the paper's order, then the rest."""
    mine = [result for result in results.results if result.model == model and result.primary]
    return sorted(mine, key=lambda result: (result.protocol != "paper", task_rank(result.task)))


def task_rank(task: str) -> int:
    """Place in the paper's order; tasks that the paper does not have come last, all alike."""
    return TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)


def is_share(metric: str, values: Sequence[float]) -> bool:
    """Whether a metric is a share of 1, to be shown in percent; `values` are all there are, as a name may tell nothing."""
    return not any(part in metric for part in _NO_SHARES) and all(0 <= value <= 1 for value in values)


def show_number(value: float | None, share: bool, sign: str = "") -> str:
    """A score with two decimals of a percent, or four digits where it is no share; `-` where there is none.

    Args:
        value: The number.
        share: Whether it is shown in percent.
        sign: `+` shows the sign of positive numbers too.
    """
    if value is None or math.isnan(value):
        return "-"
    return f"{100 * value:{sign}.2f}" if share else f"{value:{sign}.4g}"


def escape_markdown(text: str) -> str:
    """Text as itself in a Markdown table: nothing in it ends a cell, starts a style or is HTML."""
    flat = " ".join(text.split())
    flat = re.sub(r"&(?=#?\w+;)", "&amp;", re.sub(r"([\\`*\[\]|~])", r"\\\1", flat))
    flat = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", flat)  # one inside a word is harmless
    return re.sub(r"<(?=[A-Za-z/!?])", r"\<", flat)


def markdown_row(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _broken(name: str, width: int = 18) -> Text:
    """A long name on several lines that end at underscores, for it has no spaces to be wrapped at."""
    lines = [""]
    for part in re.findall(r"[^_]*_|[^_]+$", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return Text("\n".join(lines))


def _scored_models(results: Results) -> list[str]:
    """Labels of what was asked for; the baselines where only they were scored."""
    return [model.label for model in results.models if model.role == "model"] or [model.label for model in results.models]


def _grid(results: Results) -> tuple[list[str], list[tuple[str, list[str] | None]]]:
    """Headings and rows of text, without the columns that would be empty; a row of None is the heading of another model."""
    models = _scored_models(results)
    rows: list[tuple[str, list[str] | None]] = []
    for model in models:
        if len(models) > 1:
            rows.append((model, None))
        rows += [(model, row) for row in _rows(results, model)]
    kept = [
        index
        for index, heading in enumerate(_HEADINGS)
        if heading not in ("baseline", "change", "p") or any(cells and cells[index] != "-" for _, cells in rows)
    ]
    return [_HEADINGS[index] for index in kept], [(model, cells and [cells[index] for index in kept]) for model, cells in rows]


def _rows(results: Results, model: str) -> list[list[str]]:
    mine = primary_results(results, model)
    averages = {average.protocol: average for average in commonsense_average(mine)}
    rows = []
    for protocol in dict.fromkeys(result.protocol for result in mine):
        here = [result for result in mine if result.protocol == protocol]
        average = averages.get(protocol)
        for result in here:
            rows.append(_row(results, result))
            if average is not None and result.task == COMMONSENSE[-1]:
                change = None if average.baseline is None else average.value - average.baseline
                numbers = [show_number(number, True) for number in (average.value, average.stderr, average.baseline)]
                rows.append([f"average of {len(COMMONSENSE)}", protocol, "", *numbers, show_number(change, True, "+"), "-"])
    return rows


def _row(results: Results, result: TaskResult) -> list[str]:
    other = result.difference
    baseline = other.baseline if other is not None else _value_of_baseline(results, result)
    share = is_share(result.metric, [result.value, *([] if baseline is None else [baseline])])
    return [
        result.task,
        result.protocol if result.metric == "accuracy" else f"{result.protocol} {result.metric}",
        f"{result.n:,}",
        show_number(result.value, share),
        show_number(result.stderr, share),
        show_number(baseline, share),
        show_number(None if other is None else other.difference, share, "+"),
        "-" if other is None else "<0.001" if other.p_value < 0.001 else f"{other.p_value:.3f}",
    ]


def _value_of_baseline(results: Results, result: TaskResult) -> float | None:
    """A baseline's number where no rows could be paired."""
    roles = {model.label: model.role for model in results.models}
    if roles.get(result.model) == "baseline":
        return None
    key = (result.task, result.protocol, result.metric)
    found = [one for one in results.results if roles.get(one.model) == "baseline" and (one.task, one.protocol, one.metric) == key]
    return found[0].value if found else None


def _caption(results: Results) -> str:
    models = _scored_models(results)
    scored = [result for model in models for result in primary_results(results, model)]

    def each(*values: object) -> str:
        return escape_markdown(" or ".join(map(str, dict.fromkeys(values))))

    parts = [
        f"Scored by abba {escape_markdown(results.abba)} on {escape_markdown(results.created[:10])}",
        f"protocol: {each(*(one.protocol for one in scored))}",
        f"answers: {each(*(one.sampling for one in scored))}",
        f"prompt template: {each(*(model.template for model in results.models if model.label in models))}",
        f"worked examples: {each(*(one.shots for one in scored))}",
        f"graded by the rules of: {each(*(one.grader for one in scored))}",
    ]
    text = "; ".join(parts) + ". Scores in percent where they are shares, +/- one standard error, over n rows."
    tests = dict.fromkeys(one.difference.test for one in scored if one.difference is not None)
    if tests:
        text += f" p: two-sided paired test of no change ({each(*tests)})."
    unreadable = sum(one.unreadable_rows for one in scored)
    if unreadable:
        text += f" {unreadable:,} rows of the data could not be read and are not in n."
    return text
