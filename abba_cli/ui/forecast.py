"""The plan of a run on a terminal: its layers, its memory as a bar and a table, and what fits into a budget."""

from collections.abc import Mapping
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abba_cli.forecast.fitting import Fit, Switch
from abba_cli.forecast.prediction import OPTIMIZER, RUNTIME, Forecast
from abba_cli.forecast.tracker import HEAD, TEMPORARIES
from abba_cli.plan import Plan

# Letter, name and colour of each part of the bar, and the uses in it; what is named nowhere is kept for the backward pass.
_PARTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("P", "Python and libraries", "black on white", (RUNTIME,)),
    ("W", "weights", "black on cyan", ("base weights", "share of the base", "gathered blocks")),
    ("T", "trained, with state", "black on green", ("trained weights", "gradients", OPTIMIZER, "buckets of gradients")),
    ("A", "activations", "black on yellow", ()),
    ("L", "logits", "white on magenta", (HEAD,)),
    ("t", "temporaries", "white on blue", (TEMPORARIES,)),
)


def show_plan(console: Console, plan: Plan, everything: bool) -> None:
    """Layers, parameters and the memory forecast; in full for a dry run."""
    share, memory = plan.trainable / plan.total, plan.memory
    about = "more than" if memory.gap else "about"
    shared = f" in each of {plan.processes} processes" if plan.processes > 1 else ""
    console.print(
        f"[bold]Plan[/]  {len(plan.layers)} layers adapted, {plan.trainable:,} of {plan.total:,} parameters trained "
        f"({share:.2%})\n"
        f"      {plan.steps:,} steps of at most {plan.tokens_per_step:,} tokens{shared}, "
        f"{about} {memory.total / 1e9:.1f} GB of memory on each device",
        highlight=False,
    )
    console.print(f"      Added to each weight: {plan.update}", highlight=False, markup=False)
    if plan.begins_away:
        console.print(f"      adapter.init: {plan.begins_away} begins with another model than the base", highlight=False)
    if plan.strategy:
        base = "each holds a share of the base" if plan.sharded else "each holds the whole base"
        console.print(f"      Strategy of the processes: {plan.strategy}; {base}", highlight=False)
    if plan.idle_strategy:
        console.print(f"      distributed.strategy: {plan.idle_strategy} has no effect with one process", highlight=False)
    if memory.gap:
        console.print(
            f"      The model's activations are not in it, because its step cannot be simulated: {memory.gap}", markup=False
        )
    if not everything:
        return
    _show_layers(console, plan)
    _show_memory(console, memory)
    if plan.fit is not None:
        _show_fit(console, plan.fit)


def memory_bar(memory: Forecast, width: int) -> tuple[Text, list[Text]]:
    """A bar of letters in colours, as long as `width`, and the entries of its legend."""
    named = {use for _, _, _, uses in _PARTS for use in uses}
    sizes = []
    for letter, name, style, uses in _PARTS:
        size = sum(memory.uses.get(use, 0) for use in uses)
        if not uses:
            size = sum(bytes_ for use, bytes_ in memory.uses.items() if use not in named)
        if size:
            sizes.append((letter, name, style, size))
    cells = _cells([size for *_, size in sizes], width)
    bar = Text.assemble(*((letter * count, style) for (letter, _, style, _), count in zip(sizes, cells, strict=True)))
    legend = [Text.assemble((f" {letter} ", style), f" {name} {size / memory.total:.0%}") for letter, name, style, size in sizes]
    return bar, legend


def _cells(sizes: list[int], width: int) -> list[int]:
    """Share out `width` cells in proportion, at least one each."""
    free, total = width - len(sizes), sum(sizes)
    exact = [free * size / total for size in sizes]
    cells = [int(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda index: cells[index] - exact[index])
    for index in by_rest[: free - sum(cells)]:
        cells[index] += 1
    return [count + 1 for count in cells]


def _show_layers(console: Console, plan: Plan) -> None:
    shapes: dict[tuple[str, int, int, tuple[int, ...], int], int] = {}
    for layer in plan.layers:
        key = (layer.name.rpartition(".")[2], layer.m, layer.n, layer.ranks, layer.parameters)
        shapes[key] = shapes.get(key, 0) + 1
    table = _table(
        "Adapted layers", "module", "count", "weight", "ranks" if len(plan.layers[0].ranks) > 1 else "rank", "parameters"
    )
    for (name, m, n, ranks, parameters), count in shapes.items():
        table.add_row(name, str(count), f"{m} x {n}", ", ".join(map(str, ranks)), f"{count * parameters:,}")
    console.print(table)


def _show_memory(console: Console, memory: Forecast) -> None:
    table = _table("Memory forecast", "use", "MB", "share")
    for use, size in memory.uses.items():
        table.add_row(use, _megabytes(size), f"{size / memory.total:.1%}")
    table.add_row("in all, at the peak", _megabytes(memory.total), "", style="bold")
    console.print(table)
    bar, legend = memory_bar(memory, min(console.width, 100))
    console.print(bar)
    console.print(Columns(legend, padding=(0, 2)))
    console.print(
        f"The heaviest batch has {memory.tokens:,} tokens; the largest temporary tensor takes "
        f"{_megabytes(memory.largest_temporary)} MB.",
        highlight=False,
    )


def _show_fit(console: Console, fit: Fit) -> None:
    budget, size = f"{fit.budget / 1e9:,.2f} GB", fit.recipe.rows
    verdict = "[green]fits into[/]" if fit.recipe.total <= fit.budget else "[red]does not fit into[/]"
    console.print(
        f"[bold]Fit[/]  training.batch_size {size} takes {fit.recipe.total / 1e9:,.2f} GB, which {verdict} {budget}.",
        highlight=False,
    )
    if fit.largest is None:
        console.print("     Not even one row fits.")
    elif fit.limited_by_data:
        console.print(f"     All {fit.largest.rows:,} rows of the data would fit into one batch.", highlight=False)
    else:
        console.print(
            f"     The largest batch that fits: --set training.batch_size={fit.largest.rows} "
            f"({fit.largest.total / 1e9:,.2f} GB).",
            highlight=False,
        )
    if not fit.switches:
        return
    table = _table("What helps", "setting", "saves MB", "then MB", "fits")
    for switch in fit.switches:
        fits = "yes" if switch.total <= fit.budget else "no"
        table.add_row(_settings(switch.settings), _megabytes(switch.saved), _megabytes(switch.total), fits)
    console.print(table)
    console.print(_advice(fit.together), highlight=False)


def _advice(together: tuple[Switch, ...]) -> str:
    if len(together) == 1:
        return "The first is enough."
    if together:
        return f"The first {len(together)} together are enough."
    return "All of them together are not enough."


def _settings(settings: Mapping[str, Any]) -> str:
    written = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    return "\n".join(f"--set {key}={value}" for key, value in written.items())


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 10_000_000 else f"{size / 1e6:,.1f}"
