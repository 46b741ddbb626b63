"""A bar on a terminal, or lines at most one in ten seconds elsewhere: what every display of long work is made of."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


def timed_bar(console: Console) -> "LiveBar":
    """A bar that shows the time left."""
    return LiveBar(console, TimeRemainingColumn(compact=True))


class LiveBar:
    """One bar at a time. A context manager.

    Args:
        console: Where to draw.
        columns: Stand behind the status, such as rich's own time left.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[status]}"),
            *columns,
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._text = ""
        self._last_line = time.monotonic()

    def __enter__(self) -> "LiveBar":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def show(self, text: str, done: float, total: float, status: str, line: str = "") -> None:
        """Move the bar; another text begins another one.

        Args:
            text: What is being done.
            done: How much of it.
            total: How much there is; 0 where that is unknown.
            status: Stands behind the bar.
            line: Printed where there is no terminal, but not within ten seconds after the last line.
        """
        first = text != self._text or self._task is None
        if not self.console.is_terminal:
            now = time.monotonic()
            if line and now - self._last_line >= _LINE_EVERY_SECONDS:
                self._last_line = now
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        if first:
            self.clear()
            self._text = text
            self._task = self._bar.add_task(escape(text), total=None, status="")
        assert self._task is not None
        self._bar.update(self._task, total=total or None, completed=done, status=escape(status))

    def clear(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._text = None, ""
