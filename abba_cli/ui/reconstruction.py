"""What `abba reconstruct` shows: a bar over the fits, then the table of errors and the answer."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abba_cli.events import Event, Stage
from abba_cli.reconstruction.reporting import Summary, answer, grid
from abba_cli.ui.progress import LiveBar


def draw_progress(bar: LiveBar, event: Event) -> None:
    """Draw one event of a reconstruction."""
    if isinstance(event, Stage):
        counted = f"{event.done:,}/{event.total:,}"
        bar.show("Fitting", event.done, event.total, f"{counted}  {event.text}", line=f"  fit {counted}: {event.text}")


def show_reconstruction(console: Console, summary: Summary, notes: Sequence[str], folder: Path, files: Sequence[str]) -> None:
    """The closing table, its notes, the answer, and where the files are."""
    headings, lines = grid(summary)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("matrix", "method") else "right", no_wrap=heading != "matrix")
    for cells, marks in lines:
        # A star as well, for logs and for those who do not see bold.
        table.add_row(
            *(Text(f"{cell}*" if mark else cell, "bold" if mark else "") for cell, mark in zip(cells, marks, strict=True))
        )
    console.print(table)
    for text in (*notes, Text(answer(summary), style="bold"), Text.assemble(f"{', '.join(files)} in ", (str(folder), "bold"))):
        console.print(text, highlight=False, soft_wrap=not console.is_terminal)
