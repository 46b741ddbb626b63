"""What `abba merge`, `export`, `import` and `push` show: their steps, a bar for the long ones, and the closing lines."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from abba_cli.events import Event, Stage, Wrote
from abba_cli.merging import Merged
from abba_cli.ui import duration

_LINE_EVERY_SECONDS = 10.0


class StepsDisplay:
    """Draws the steps of a command. Use as a context manager; call it with events.

    Args:
        console: Where to draw. A terminal gets a live bar, anything else plain lines, at most one in ten seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> "StepsDisplay":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, Stage):
            self._show(event.text, event.done, event.total, f"{event.done}/{event.total}" if event.total else "")
        elif isinstance(event, Wrote):
            status = (
                f"{event.tensors:,} of {event.total_tensors:,} tensors, {event.size / 1e9:.2f} of {event.total_size / 1e9:.2f} GB"
            )
            self._show("Merging", event.size, event.total_size, status)

    def _show(self, text: str, done: int, total: int, status: str) -> None:
        first = text != self._stage
        self._stage = text
        if not self.console.is_terminal:
            now = time.monotonic()
            if first:
                self.console.print(f"{escape(text)} ...")
            elif total and now - self._last_line >= _LINE_EVERY_SECONDS:
                self._last_line = now
                self.console.print(f"  {status}", highlight=False)
            return
        if first:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(escape(text), total=None, status="")
        if total and self._task is not None:
            self._bar.update(self._task, total=total, completed=done, status=status)


def show_merged(console: Console, merged: Merged) -> None:
    """The closing lines of a merge."""
    rate = merged.size / 1e9 / max(merged.seconds, 1e-9)
    console.print(
        f"[bold green]Merged[/] {merged.layers} layers; {merged.tensors} tensors ({merged.copied} of them copied as they are), "
        f"{merged.size / 1e9:.2f} GB in {duration(merged.seconds)} ({rate:.1f} GB/s), "
        f"peak memory {merged.peak_memory_bytes / 1e9:.1f} GB",
        highlight=False,
    )
    check = merged.verification
    if check is not None:
        console.print(
            f"  verified on {check.positions} positions: logits differ from base + adapter by at most "
            f"{check.largest_difference:.2g} ({check.relative_difference:.2%} of their spread; {check.tolerance:.1%} allowed), "
            f"{check.agreement:.0%} of the next tokens agree",
            highlight=False,
        )
    else:
        console.print(f"  [yellow]not verified[/]: {escape(merged.unverified)}", highlight=False)
    console.print(f"  checkpoint in [bold]{escape(str(merged.path))}[/]", highlight=False)
