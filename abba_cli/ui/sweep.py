"""What `abba sweep` shows: its runs beforehand, a bar while they are made, and the answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.events import Event, Note, Stage
from abba_cli.methods import in_words
from abba_cli.sweeping.charts import draw_all
from abba_cli.sweeping.planning import Sweep
from abba_cli.sweeping.records import Record, read_record
from abba_cli.sweeping.reporting import answer, markdown, missing, notes, results_csv, table
from abba_cli.sweeping.running import read_all
from abba_cli.sweeping.summary import Line, summarise
from abba_cli.ui.progress import LiveBar


def draw_progress(bar: LiveBar, event: Event) -> None:
    """Draw one event of a sweep."""
    if isinstance(event, Stage):
        bar.show("Sweep", event.done, event.total, event.text, line=f"  {event.text}")
    elif isinstance(event, Note):
        bar.console.print(f"  {event.text}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Written:
    """The report as it was written, and what it was made of."""

    lines: Sequence[Line]
    records: Sequence[Record]
    left: Sequence[str]
    files: Sequence[str]


def write_report(sweep: Sweep, records: Sequence[Record], left: Sequence[str]) -> Written:
    """Write results.csv, the figures and report.md into the sweep's folder."""
    lines = summarise(sweep, records)
    with disk_errors(sweep.output):
        sweep.output.mkdir(parents=True, exist_ok=True)
    figures = draw_all(lines, sweep.output) if lines else []
    with disk_errors(sweep.output):
        write_atomically(sweep.output / "results.csv", results_csv(records))
        write_atomically(sweep.output / "report.md", markdown(sweep, lines, records, left, figures))
    return Written(lines, records, left, ["report.md", "results.csv", *figures])


def show_plan(console: Console, sweep: Sweep) -> None:
    """The variants, what is trained in each, and how many of the runs are done."""
    records, _ = read_all(sweep)
    tuning = sweep.tuning_runs()
    first = {run.point.label: run for run in [*tuning, *sweep.runs({point.label: {} for point in sweep.points})]}
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("run", "added to each weight", "tuning", "runs"):
        shown.add_column(heading, justify="left" if heading in ("run", "added to each weight") else "right")
    for point in sweep.points:
        tries = [run for run in tuning if run.point.label == point.label]
        tried = sum(read_record(run, sweep.output) is not None for run in tries)
        done = sum(one.label == point.label and one.kind == "run" and one.status == "done" for one in records)
        shown.add_row(
            Text(point.label),
            Text(in_words(first[point.label].recipe.adapter)),
            f"{tried} of {len(tries)}" if tries else "",
            f"{done} of {len(sweep.file.seeds)}",
        )
    console.print(shown)


def show_report(console: Console, sweep: Sweep, written: Written) -> None:
    """The closing table, what is missing, the answer, and where the files are."""
    if written.lines:
        grid = table(written.lines, every_task=False)
        shown = Table(box=None, pad_edge=False, header_style="bold")
        for place, heading in enumerate(grid.headings):
            shown.add_column(heading, justify="right" if place else "left")
        for row in grid.rows:
            shown.add_row(*(Text(cell) for cell in row))
        console.print(shown)
        for note in notes(sweep, written.lines):
            console.print(note, highlight=False, markup=False, soft_wrap=not console.is_terminal, style="dim")
    for text in missing(written.records, written.left)[2:]:
        if text:
            console.print(text.removeprefix("- "), highlight=False, markup=False, soft_wrap=not console.is_terminal)
    for text in answer(sweep, written.lines):
        console.print(Text(text, style="bold"), soft_wrap=not console.is_terminal)
    console.print(Text.assemble(f"{', '.join(written.files)} in ", (str(sweep.output), "bold")), highlight=False)
