"""What `abba merge`, `export`, `import` and `push` show: their steps, a bar for the long ones, and the closing lines."""

from rich.console import Console
from rich.markup import escape
from rich.progress import TimeRemainingColumn

from abba_cli.events import Event, Stage, Wrote
from abba_cli.export.lora import LoraReport
from abba_cli.exporting import Exported
from abba_cli.merging import Merged
from abba_cli.ui.progress import LiveBar
from abba_cli.ui.training import duration


class StepsDisplay:
    """Draws the steps of a command. Use as a context manager; call it with events.

    Args:
        console: Where to draw. A terminal gets a live bar, anything else plain lines, at most one in ten seconds.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = LiveBar(console, TimeRemainingColumn(compact=True))
        self._stage = ""

    def __enter__(self) -> "StepsDisplay":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

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
        if first and not self.console.is_terminal:
            self.console.print(f"{escape(text)} ...")
        self._bar.show(text, done, total, status, line="" if first or not total else f"  {status}")


def show_merged(console: Console, merged: Merged) -> None:
    """The closing lines of a merge."""
    rate = merged.size / 1e6 / max(merged.seconds, 1e-9)
    _line(
        console,
        f"[bold green]Merged[/] {merged.layers} layers; {merged.tensors} tensors ({merged.copied} of them copied as they are), "
        f"{merged.size / 1e9:.2f} GB",
    )
    _line(console, f"  {duration(merged.seconds)} ({rate:,.0f} MB/s), peak memory {merged.peak_memory_bytes / 1e9:.1f} GB")
    several = len(merged.adapters) > 1 or merged.adapters[0][1] != 1.0
    named = " + ".join(f"{weight:g} * {path}" if several else path for path, weight in merged.adapters)
    precision = "in its original precision" if merged.quantization is None else f"rounded to {merged.quantization} and back"
    _line(console, f"  {escape(named)} on {escape(merged.base)}, {precision}")
    check = merged.verification
    if check is None:
        _line(console, f"  [yellow]not verified[/]: {escape(merged.unverified)}")
    else:
        allowed = f"{_percent(check.tolerance)} allowed"
        if check.rounded_alike is None:
            found = f"logits off by {_percent(check.difference)} of their spread ({allowed})"
        else:
            found = f"logits off by {_percent(check.rounded_alike)} of their spread ({allowed})"
        _line(console, f"  verified against base + adapter, {check.positions} positions: {found}")
        if check.rounded_alike is not None:
            _line(console, f"  rounding the weights to the checkpoint's type moves logits by {_percent(check.difference)} of it")
        _line(console, f"  {check.agreement:.0%} of the next tokens agree")
    _show_template(console, merged.template)
    _line(console, f"  checkpoint in [bold]{escape(str(merged.path))}[/]")


def _show_template(console: Console, template: str | None) -> None:
    """What a server cannot know: that its chat endpoint would lay prompts out in another way than the training did."""
    if template not in (None, "chat"):
        _line(
            console,
            f"  [yellow]trained with the template {escape(str(template))}[/]: a server's chat endpoint would use the base's chat "
            "template; send it finished prompts (the completions endpoint)",
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%"


def _line(console: Console, text: str) -> None:
    """Print a line: wrapped between words on a terminal, whole elsewhere."""
    console.print(text, highlight=False, soft_wrap=not console.is_terminal)


def _command(console: Console, text: str) -> None:
    """Print a line to be copied: never broken."""
    console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)


def show_exported(console: Console, exported: Exported) -> None:
    """The closing lines of an export: what it is, what it lost, and what its servers need to be told."""
    size = sum(exported.files.values())
    kind = f"{exported.format}, {exported.dtype or 'as stored'}" + (f", rank {exported.rank}" if exported.rank else "")
    _line(console, f"[bold green]Exported[/] {kind}: {size / 1e6:,.1f} MB in [bold]{escape(str(exported.path))}[/]")
    _line(console, f"  from {escape(exported.adapter)}")
    if exported.lora is not None:
        _show_lora(console, exported.lora)
    if exported.format == "gguf-lora":
        name = next(name for name in exported.files if name.endswith(".gguf"))
        _command(console, f"llama-server -m BASE.gguf --lora {exported.path}/{name}")
    if exported.modelfile is not None:
        model = exported.modelfile
        _line(console, f"  written by {escape(str(exported.converter))}")
        _line(console, f"  Modelfile for Ollama, stops at {escape(', '.join(model.stops))}")
        if model.untemplated:
            _line(console, f"  [yellow]without a TEMPLATE[/]: {escape(model.untemplated)}")
        _show_template(console, exported.template)
        _command(console, f"ollama create {exported.path.name} -f {exported.path}/Modelfile")


def _show_lora(console: Console, lora: LoraReport) -> None:
    if lora.error:
        _line(console, f"  relative error of the updates {lora.error:.3g} over all layers; the largest:")
        for name, error in sorted(lora.errors.items(), key=lambda item: -item[1])[:3]:
            _line(console, f"    {error:.3g}  {escape(name)}")
        _line(console, "  all of them are in approximation_errors.json")
    else:
        _line(console, "  exact: the same function as the ABBA adapter")
    if lora.vllm_max_lora_rank is not None:
        _line(console, f"  vLLM needs --max-lora-rank {lora.vllm_max_lora_rank}")
    else:
        _line(
            console,
            f"  [yellow]vLLM serves ranks up to 512, this one has {lora.rank}[/]: give --rank 512 for the best approximation, "
            "or `abba merge`",
        )


def show_pushed(console: Console, url: str) -> None:
    """Where an upload went."""
    _line(console, f"[bold green]Uploaded[/] to {escape(url)}")
