"""The only room that prints: a run's events on a terminal, or as plain lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from abba_cli.events import Audited, Evaluated, Event, Finished, Planned, Sampled, Saved, Stage, Started, Stepped, Stopping
from abba_cli.prepared import PreparedData, Span
from abba_cli.ui.forecast import show_plan

_LINE_EVERY_SECONDS = 10.0
_TELLING_SECONDS = 60.0  # of a run; the share that saving takes of a shorter one says nothing about a longer one


class RunDisplay:
    """Draws the events of a run. Use as a context manager; call it with events.

    Args:
        console: Where to draw. A terminal gets a live bar, anything else plain lines, at most one in ten seconds.
        plan_only: A dry run: show the data's first example and the plan in full.
    """

    def __init__(self, console: Console, plan_only: bool = False) -> None:
        self.console = console
        self.plan_only = plan_only
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left {task.fields[status]}"),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._started = (time.monotonic(), 0)
        self._last_line = 0.0

    def __enter__(self) -> "RunDisplay":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        match event:
            case Stage():
                self._on_stage(event)
            case Audited(data):
                self._clear_bar()
                show_audit(self.console, data, example=True)
            case Planned(plan):
                self._clear_bar()
                show_plan(self.console, plan, self.plan_only)
            case Started():
                self._on_start(event)
            case Stepped():
                self._on_step(event)
            case Evaluated(step, loss, best):
                mark = " [green](best so far)[/]" if best else ""
                when = f"step {step}" if step else "before training"
                self.console.print(f"  evaluation loss {loss:.4f}, {when}{mark}")
            case Sampled(step, prompt, answer, reference):
                self.console.print(Text.assemble(("  prompt    ", "dim"), _one_line(prompt, from_end=True)))
                self.console.print(Text.assemble(("  answer    ", "dim"), _one_line(answer) or "(empty)"))
                self.console.print(Text.assemble(("  reference ", "dim"), _one_line(reference)))
            case Saved(step):
                self.console.print(f"  [dim]checkpoint after step {step}[/]", highlight=False)
            case Stopping():
                self.console.print("Stopping after this step, with a checkpoint. Ctrl-C again ends at once.")
            case Finished():
                self._clear_bar()
                show_summary(self.console, event)

    def _clear_bar(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None

    def _on_stage(self, stage: Stage) -> None:
        first = stage.text != self._stage
        self._stage = stage.text
        if not self.console.is_terminal:
            if first:
                self.console.print(f"{stage.text} ...")
            return
        if first:
            self._clear_bar()
            self._task = self._bar.add_task(escape(stage.text), total=None, status="")
        if stage.total and self._task is not None:
            self._bar.update(self._task, total=stage.total, completed=stage.done)

    def _on_start(self, event: Started) -> None:
        self._clear_bar()
        if event.resumed_from is not None:
            self.console.print(
                f"Going on from [bold]{escape(str(event.resumed_from))}[/], after step {event.step} of {event.total_steps}"
            )
        self._started = (time.monotonic(), event.step)
        self._stage = ""
        self._task = self._bar.add_task("Step", total=event.total_steps, completed=event.step, status="")

    def _on_step(self, event: Stepped) -> None:
        status = (
            f"loss {event.loss:.4f} lr {event.learning_rate:.1e} {event.memory_bytes / 1e9:.1f} GB "
            f"{event.tokens_per_second:,.0f} tok/s"
        )
        if self._task is not None:
            self._bar.update(self._task, completed=event.step, status=status)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line >= _LINE_EVERY_SECONDS or event.step == event.total_steps):
            self._last_line = now
            seconds = (now - self._started[0]) / max(1, event.step - self._started[1]) * (event.total_steps - event.step)
            self.console.print(f"  step {event.step}/{event.total_steps}  {status}  {duration(seconds)} left", highlight=False)


def show_audit(console: Console, data: PreparedData, example: bool) -> None:
    """The data audit: a row for each source, and the first example with the supervised part in colour."""
    table = Table(title="Data", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("split", no_wrap=True)
    table.add_column("source", overflow="fold")  # the columns that may be folded give way to the numbers
    table.add_column("read as", overflow="fold")
    for heading in ("rows", "tokens", "learned", "longest", "cut", "dropped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for split, audit in data.audit.items():
        for source in audit.sources:
            table.add_row(
                split,
                escape(_short(source.path)),
                source.shape,
                f"{source.rows:,}",
                f"{source.tokens:,}",
                f"{source.supervised_tokens / max(1, source.tokens):.0%}",
                f"{source.longest_row_tokens:,}",
                _warned(source.truncated_rows, source.rows),
                _warned(source.unsupervised_rows, source.rows),
            )
    console.print(table)
    for split, audit in data.audit.items():
        if audit.packed_sequences is not None:
            console.print(f"  {split}: {audit.rows:,} rows packed into {audit.packed_sequences:,} sequences")
    if example:
        plain = console.no_color or not console.is_terminal
        legend = ">>> learned <<<, the rest given" if plain else "[green]green: learned[/], [dim]grey: given[/]"
        console.print(f"[bold]First example, as the model sees it[/] ({legend})")
        console.print(marked(data.first_spans, plain))


def marked(spans: Sequence[Span], plain: bool) -> Text:
    """A rendered row with the supervised part in green, or between >>> and <<< where there is no colour."""
    text = Text()
    for span in spans:
        text.append(f">>>{span.text}<<<" if plain and span.supervised else span.text, style="green" if span.supervised else "dim")
    return text


def show_summary(console: Console, event: Finished) -> None:
    """The closing lines of a run."""
    outcome = event.outcome
    path = escape(str(event.path))
    if event.already:
        console.print(
            f"[bold]{path}[/] has finished already, after {outcome.steps} steps: nothing to do. Raise training.max_steps or "
            "training.epochs to go on, or give --restart to start over."
        )
        return
    memory = f"{outcome.peak_memory_bytes / 1e9:.1f} GB"
    console.print(f"[bold green]Finished[/] after {outcome.steps} steps in {duration(outcome.seconds)}; peak memory {memory}")
    if outcome.saving_seconds is not None:
        known = outcome.seconds >= _TELLING_SECONDS
        share = f", {min(1.0, outcome.saving_seconds / outcome.seconds):.1%} of the time" if known else ""
        console.print(f"  saving took {outcome.saving_seconds:.1f} s{share}", highlight=False)
    if outcome.steps < outcome.planned_steps:
        console.print(f"  stopped early: {outcome.planned_steps} steps were planned")
    if outcome.train_loss is not None:
        console.print(f"  training loss {outcome.train_loss:.4f} (mean of the last tenth)")
    if outcome.eval_loss is not None:
        before = f"{outcome.eval_loss_before:.4f} -> " if outcome.eval_loss_before is not None else ""
        kept = f", the best, after step {outcome.used_step}" if outcome.used_step != outcome.steps else ""
        console.print(f"  evaluation loss {before}{outcome.eval_loss:.4f}{kept}")
    console.print(f"  adapter, metrics, loss.png and model card in [bold]{path}[/]")
    console.print(f"  next: abba chat --adapter {path}, abba merge --adapter {path}", highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _warned(count: int, total: int) -> str:
    share = count / max(1, total)
    return f"[yellow]{count:,}[/]" if count and share < 0.2 else f"[red]{count:,}[/]" if count else "0"


def _short(path: str) -> str:
    return path if len(path) <= 40 else f"...{path[-37:]}"


def _one_line(text: str, limit: int = 300, from_end: bool = False) -> str:
    flat = " ".join(text.split())
    if len(flat) <= limit:
        return flat
    return f"... {flat[-limit:]}" if from_end else f"{flat[:limit]} ..."
