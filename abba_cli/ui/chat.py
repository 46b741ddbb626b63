"""Drawing for `abba generate` and `abba chat`: answers as they come, two of them side by side, and the line that is typed."""

import contextlib
import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from abba_cli.generating import Answer

NARROWEST_SIDE_BY_SIDE = 80  # columns; below, two answers are shown one after another
# What a model writes is data: on a terminal its control characters (escape sequences) would be commands.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Streamed:
    """Writes one answer as it comes: as it is into a pipe or file, wrapped between words on a terminal.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._column = 0
        self._pending = ""

    def __call__(self, text: str) -> None:
        """Write the next stretch."""
        if not self.console.is_terminal:
            self._write(text)
            return
        *whole, self._pending = re.split(r"(?<=\s)", self._pending + text.translate(_CONTROLS))
        for word in whole:
            self._wrap(word)

    def close(self) -> None:
        """Write what was held back, and end the line."""
        self._wrap(self._pending)
        self._pending = ""
        self._write("\n")

    def _wrap(self, word: str) -> None:
        width = cell_len(word.rstrip())
        if self.console.is_terminal and self._column > 0 and self._column + width > self.console.width:
            self._write("\n")
            self._column = 0
        self._write(word)
        self._column = 0 if word.endswith("\n") else self._column + cell_len(word)

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


class SideBySide:
    """Two or more answers in columns, growing in place; the whole of them is printed at the end. A context manager.

    Args:
        console: A terminal.
        labels: The columns' headings.
    """

    def __init__(self, console: Console, labels: Sequence[str]) -> None:
        self.console, self.labels = console, labels
        self.texts = ["" for _ in labels]
        self._live = Live(console=console, get_renderable=self._window, transient=True, refresh_per_second=8)

    def __enter__(self) -> "SideBySide":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self.console.print(self._table([Text(text) for text in self.texts]))

    def add(self, column: int, text: str) -> None:
        """Take the next stretch of an answer."""
        self.texts[column] += text.translate(_CONTROLS)

    def _window(self) -> Table:
        """The last lines of each answer, as many as the terminal has room for: a live display cannot scroll."""
        width = self.console.width // len(self.labels) - 3
        height = max(1, self.console.height - 4 - max(-(-len(label) // width) for label in self.labels))
        return self._table([Text("\n").join(Text(text).wrap(self.console, width)[-height:]) for text in self.texts])

    def _table(self, cells: Sequence[Text]) -> Table:
        table = Table(expand=True, box=None, padding=(0, 3, 0, 0), pad_edge=False, show_header=False)
        for _ in self.labels:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(label, style="bold cyan") for label in self.labels))  # no header: that would stand on its foot
        table.add_row(*cells)
        return table


def fits_side_by_side(console: Console) -> bool:
    """Whether two answers get columns: on a terminal that is wide enough."""
    return console.is_terminal and console.width >= NARROWEST_SIDE_BY_SIDE


def show_label(console: Console, label: str, first: bool) -> None:
    """The heading of one of several answers that are shown one after another."""
    if console.is_terminal and not first:
        console.print()
    console.print(f"[bold cyan]{escape(label)}[/]" if console.is_terminal else f"== {label} ==", markup=console.is_terminal)


def show_speed(console: Console, answers: Sequence[tuple[str, Answer]]) -> None:
    """Tokens and speed of each answer, on a terminal only."""
    if not console.is_terminal:
        return
    for label, answer in (one for one in answers if one[1].complete):
        speed = answer.tokens / max(answer.seconds, 1e-9)
        named = f"{label}: " if len(answers) > 1 else ""
        console.print(Text(f"{named}{answer.tokens} tokens in {answer.seconds:.1f} s, {speed:.1f} tokens/s", style="dim"))


def show_note(console: Console, text: str) -> None:
    """A remark beside the answers."""
    console.print(Text(text, style="dim"))


def read_line(console: Console, prompt: str = "> ") -> str | None:
    """Read what the user types next, with the arrow keys at work where Python has readline.

    Returns:
        The line, or None at the end of the input (Ctrl-D).

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (`input` takes it up)
    if not console.is_terminal:
        shown = ""
    elif console.color_system is None:
        shown = prompt
    else:
        shown = f"\x01\x1b[1;36m\x02{prompt}\x01\x1b[0m\x02"  # between \x01 and \x02: takes no room, for readline
    try:
        return input(shown)
    except EOFError:
        return None
