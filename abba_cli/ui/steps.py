"""What `abba merge`, `export`, `import` and `push` show: their steps, a bar for the long ones, and the closing lines."""

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from abba_cli.events import Event, Stage, Wrote
from abba_cli.export.lora import LoraReport
from abba_cli.exporting import Exported
from abba_cli.merging import Merged
from abba_cli.ui.training import duration

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
                self.console.print(f"  {status}", highlight=False, soft_wrap=True)
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
        soft_wrap=True,
    )
    check = merged.verification
    if check is not None:
        alike = "" if check.rounded_alike is None else f", {_percent(check.rounded_alike)} with the same rounding"
        console.print(
            f"  verified against base + adapter on {check.positions} positions: {check.agreement:.0%} of the next tokens agree; "
            f"logits differ by at most {_percent(check.difference)} of their spread{alike} ({_percent(check.tolerance)} allowed)",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"  [yellow]not verified[/]: {escape(merged.unverified)}", highlight=False, soft_wrap=True)
    console.print(f"  checkpoint in [bold]{escape(str(merged.path))}[/]", highlight=False, soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def show_exported(console: Console, exported: Exported) -> None:
    """The closing lines of an export: what it is, what it lost, and what its servers need to be told."""
    path = escape(str(exported.path))
    size = sum(exported.files.values())
    kind = f"{exported.format}, {exported.dtype or 'as stored'}" + (f", rank {exported.rank}" if exported.rank else "")
    console.print(f"[bold green]Exported[/] {kind}: {size / 1e6:,.1f} MB in [bold]{path}[/]", highlight=False, soft_wrap=True)
    if exported.lora is not None:
        _show_lora(console, exported.lora)
    if exported.format == "gguf-lora":
        name = next(name for name in exported.files if name.endswith(".gguf"))
        console.print(f"  llama-server -m BASE.gguf --lora {path}/{escape(name)}", highlight=False, soft_wrap=True)
    if exported.modelfile is not None:
        model = exported.modelfile
        console.print(f"  written by {escape(str(exported.converter))}", highlight=False, soft_wrap=True)
        stops = ", ".join(model.stops)
        console.print(f"  Modelfile for Ollama, stops at {escape(stops)}", highlight=False, soft_wrap=True)
        if model.untemplated:
            console.print(f"  [yellow]without a TEMPLATE[/]: {escape(model.untemplated)}", highlight=False, soft_wrap=True)
        console.print(f"  ollama create {escape(exported.path.name)} -f {path}/Modelfile", highlight=False, soft_wrap=True)


def _show_lora(console: Console, lora: LoraReport) -> None:
    if lora.error:
        worst = sorted(lora.errors.items(), key=lambda item: -item[1])[:3]
        console.print(
            f"  relative error of the updates {lora.error:.3g} over all layers; largest: "
            + ", ".join(f"{escape(name)} {error:.3g}" for name, error in worst)
            + " (all of them in approximation_errors.json)",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print("  exact: the same function as the ABBA adapter")
    if lora.vllm_max_lora_rank is not None:
        console.print(f"  vLLM needs --max-lora-rank {lora.vllm_max_lora_rank}", highlight=False, soft_wrap=True)
    else:
        console.print(
            f"  [yellow]vLLM serves ranks up to 512, this one has {lora.rank}[/]: give --rank 512 for the best approximation, "
            "or `abba merge`",
            highlight=False,
            soft_wrap=True,
        )


def show_pushed(console: Console, url: str) -> None:
    """Where an upload went."""
    console.print(f"[bold green]Uploaded[/] to {escape(url)}", highlight=False, soft_wrap=True)
