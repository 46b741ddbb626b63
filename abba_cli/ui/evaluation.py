"""What `abba eval` shows: a bar with the score so far, then the table, what went wrong, and a few answers."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from abba_cli.evaluation.reporting.tables import primary_results, results_table
from abba_cli.evaluation.results import Example, Results, TaskResult
from abba_cli.events import Event, Note, Scored, Stage
from abba_cli.ui.progress import LiveBar
from abba_cli.ui.training import duration

_LONGEST_NAME = 24
_FEW_TASKS = 4  # up to so many, two answers of each are shown


class EvaluationDisplay:
    """Draws an evaluation. Use as a context manager; call it with events.

    Args:
        console: Where to draw. A terminal gets a live bar, anything else plain lines: at most one in ten seconds, and one at
            each task's end.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = LiveBar(console)
        self._stage = ""
        self._model = ""
        self._task: tuple[str, str] | None = None  # the one that is being scored: model and task
        self._started = (0.0, 0)  # when it began, and the fresh rows that it had then

    def __enter__(self) -> "EvaluationDisplay":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case Stage():
                self._on_stage(event)
            case Scored():
                self._on_scored(event)
            case Note(text):
                self._print(Text(_clean(text), style="yellow"))

    def _on_stage(self, stage: Stage) -> None:
        counted = f"{stage.done:,}/{stage.total:,}" if stage.total else ""
        if not self.console.is_terminal and stage.text != self._stage:
            self._print(Text(f"{stage.text} ..."))
        self._stage = stage.text
        self._bar.show(stage.text, stage.done, stage.total, counted, line=f"  {counted}" if counted else "")

    def _on_scored(self, event: Scored) -> None:
        now = time.monotonic()
        fresh = event.done - event.reused
        if event.model != self._model:
            self._model = event.model
            self._print(Text(event.model, style="bold"))
        if self._task != (event.model, event.task):
            self._task = (event.model, event.task)
            self._stage = ""
            self._started = (now, fresh)
        name = _cut(event.task, _LONGEST_NAME)
        score = f"{100 * event.correct / event.done:.1f}%" if event.done else "-"
        since, before = self._started
        if event.done >= event.total:
            self._bar.clear()
            reused = f", {event.reused:,} of them from before" if event.reused else ""
            self._print(Text(f"  {name}  {score} of {event.total:,} rows{reused}, {duration(now - since)}"))
            self._task = None
            return
        # Reused rows take no time: only the others tell how fast it goes.
        left = duration((now - since) / (fresh - before) * (event.total - event.done)) if fresh > before else "-:--"
        batch = f", {event.tokens}/{event.most_tokens} tokens of the next" if event.tokens else ""
        status = f"{event.done:,}/{event.total:,}  {score} so far{batch}, {left} left"
        self._bar.show(name, event.done, event.total, status, line=f"  {name}  {status}")

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=not self.console.is_terminal)


def show_results(console: Console, results: Results, folder: Path) -> None:
    """The closing table, what went wrong if anything did, a few answers, and where the files are."""
    console.print(results_table(results))
    labels = {model.label: model.role for model in results.models}
    scored = [one for label in labels for one in primary_results(results, label)]
    for one in scored:
        if troubles := _troubles(one):
            name = one.task if labels[one.model] == "model" else f"{one.task} (baseline)"
            console.print(Text(f"{name}: {'; '.join(troubles)}", style="yellow"), soft_wrap=not console.is_terminal)
    asked = [one for one in scored if labels[one.model] == "model"] or scored
    if any(one.examples for one in asked):
        console.print(Text("Answers", style="bold"))
    for one in asked:
        for example in _chosen(one.examples, 2 if len(asked) <= _FEW_TASKS else 1):
            _show_example(console, one.task, example)
    files = ", ".join(name for name in ("results.json", "results.md", "samples.jsonl") if (folder / name).is_file())
    console.print(Text.assemble(f"{files} in ", (str(folder), "bold")), soft_wrap=not console.is_terminal)


def _troubles(result: TaskResult) -> list[str]:
    other = "abba's" if result.grader == "released" else "the released"
    counts = (
        (result.extraction_failures, "without an answer, scored 0"),
        (result.unmarked, "read as the last number"),
        (result.disagreements, f"judged otherwise by {other} rules"),
        (result.unreadable_rows, "not readable and not in n"),
    )
    return [f"{count:,} {what}" for count, what in counts if count]


def _chosen(examples: Sequence[Example], count: int) -> list[Example]:
    """The first answers, a right and a wrong one where there are both."""
    right = [example for example in examples if example.score >= 0.5]
    wrong = [example for example in examples if example.score < 0.5]
    mixed = [*right[:1], *wrong[:1]] if right and wrong else list(examples)
    return mixed[:count]


def _show_example(console: Console, task: str, example: Example) -> None:
    """Two lines, each no wider than the console."""
    right = example.score >= 0.5
    verdict = "nothing found" if example.prediction is None else f"read as {_cut(_clean(example.prediction), 24)}"
    if not right or example.prediction is None:
        verdict += f", right is {_cut(_clean(example.gold), 24)}"
    head = Text.assemble(
        f"  {_cut(task, _LONGEST_NAME)}  ", ("right" if right else "wrong", "green" if right else "red"), f"  {verdict}"
    )
    head.truncate(console.width)
    console.print(head, no_wrap=True)
    console.print(Text(f"    {_cut(_clean(example.response) or '(empty)', console.width - 4)}", style="dim"), no_wrap=True)


def _clean(text: str) -> str:
    """Text on one line; what a model writes is data, but on a terminal its control characters would be commands."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))


def _cut(text: str, width: int) -> str:
    """Text that takes no more columns of a terminal than `width`."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 4)).rstrip()} ..."
