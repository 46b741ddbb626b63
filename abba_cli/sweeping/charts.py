"""The figures of a sweep. Lines differ in colour, stroke and marker, so that they can be told apart in print and by all eyes."""

import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.sweeping.planning import short
from abba_cli.sweeping.summary import Line, step_time

# Okabe and Ito's colours, without the yellow, which is too light on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
_STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))


def draw_all(lines: Sequence[Line], output: Path) -> list[str]:
    """Draw what the lines have, and return the names of the files.

    Raises:
        RunError: A file cannot be written.
    """
    figures: list[tuple[str, Callable[[Sequence[Line]], Any]]] = []
    if any(line.score or line.loss for line in lines):
        figures.append(("score.png", _score))
    if any(len(one.curve) > 1 for line in lines for one in line.records):
        figures += [("loss.png", _losses), ("gradient-norm.png", _norms)]
    if any(line.seconds for line in lines):
        figures.append(("cost.png", _cost))
    for name, make in figures:
        picture = io.BytesIO()
        make(lines).savefig(picture, format="png", dpi=150, metadata={"Software": "abba sweep"})
        with disk_errors(output / name):
            write_atomically(output / name, picture.getvalue())
    return [name for name, _ in figures]


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _style(place: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[place % len(_COLOURS)],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _STROKES[(place + place // len(_COLOURS)) % len(_STROKES)],
    }


def _variants(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.point.variant, []).append(line)
    return found


def _legend(figure: Any, panel: Any) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(labels)), frameon=False, fontsize=9)


def _score(lines: Sequence[Line]) -> Any:
    """Score and evaluation loss against trained parameters, with the deviation over the seeds."""
    measures = [
        (name, times, [(line, getattr(line, key)) for line in lines if getattr(line, key) is not None])
        for name, key, times in (("evaluation loss", "loss", 1.0), ("mean score, %", "score", 100.0))
    ]
    measures = [one for one in measures if one[2]]
    figure, panels = _figure(4.6 * len(measures), 3.9, len(measures))
    variants = list(_variants(lines))
    for panel, (name, times, found) in zip(panels, measures, strict=True):
        across = _side_by_side([line for line, _ in found])
        for place, variant in enumerate(variants):
            own = [(line, value) for line, value in found if line.point.variant == variant]
            own.sort(key=lambda pair: pair[0].parameters)
            style = _style(place)
            if len({line.parameters for line, _ in own}) < len(own):
                style["linestyle"] = "none"  # of one size several times: nothing that goes on from one to the next
            panel.errorbar(
                [across[line.label] for line, _ in own],
                [times * value.mean for _, value in own],
                yerr=[times * (value.deviation or 0.0) for _, value in own],
                capsize=3,
                markersize=6,
                label=variant or "runs",
                **style,
            )
        crowded = any(across[line.label] != line.parameters / 1e6 for line, _ in found)
        panel.set_xlabel(f"trained parameters, millions{' (of one size: side by side)' if crowded else ''}", fontsize=9)
        panel.set_ylabel(name, fontsize=9)
        sizes = [line.parameters for line, _ in found]
        if max(sizes) > 4 * min(sizes):
            panel.set_xscale("log")
            _plain_ticks(panel.xaxis)
    _legend(figure, panels[0])
    return figure


def _plain_ticks(axis: Any) -> None:
    """0.2 and 5 on a logarithmic axis, not 2 x 10^-1 and nothing."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _side_by_side(lines: Sequence[Line]) -> dict[str, float]:
    """Where to draw lines by their labels, in millions of parameters: those of about one size next to each other, not on top."""
    places: dict[str, float] = {}
    for line in lines:
        alike = [one for one in lines if abs(one.parameters - line.parameters) < 0.05 * line.parameters]
        shift = 0.06 * (alike.index(line) - (len(alike) - 1) / 2)
        places[line.label] = line.parameters / 1e6 * (1 + shift)
    return places


def _curves(lines: Sequence[Line], key: str, name: str) -> Any:
    figure, (panel,) = _figure(6.4, 4.4, 1)
    for place, line in enumerate(lines):
        steps = [step.step for step in line.records[0].curve]
        values = [[getattr(step, key) for step in one.curve] for one in line.records]
        together = [[one for one in some if one is not None] for some in zip(*values, strict=False)]
        means = [statistics.fmean(some) if some else float("nan") for some in together]
        width = max(1, len(means) // 15)
        smooth = [statistics.fmean(means[max(0, i - width + 1) : i + 1]) for i in range(len(means))]
        every = max(1, len(smooth) // 8)
        panel.plot(steps[: len(smooth)], smooth, label=line.label, markersize=4, markevery=every, **_style(place))
    lowest, highest = panel.dataLim.intervaly
    if lowest > 0 and highest > 5 * lowest:
        panel.set_yscale("log")
        _plain_ticks(panel.yaxis)
    panel.set_xlabel("step", fontsize=9)
    panel.set_ylabel(name, fontsize=9)
    _legend(figure, panel)
    return figure


def _losses(lines: Sequence[Line]) -> Any:
    return _curves(lines, "loss", "training loss, running mean over steps and seeds")


def _norms(lines: Sequence[Line]) -> Any:
    return _curves(lines, "gradient_norm", "gradient norm, running mean over steps and seeds")


def _cost(lines: Sequence[Line]) -> Any:
    """Time and memory against the grid's first number, such as the rank; bars where there is none."""
    figure, panels = _figure(8.4, 3.9, 2)
    keys = [key for key in lines[0].point.values if all(isinstance(line.point.values[key], int | float) for line in lines)]
    time = step_time(lines)
    measures: tuple[tuple[str, Callable[[Line], float | None]], ...] = (
        ("seconds of the processor a step" if time.quiet else "seconds a step", time.of),
        ("peak memory, GB", lambda line: (line.memory or 0) / 1e9),
    )
    for panel, (name, measure) in zip(panels, measures, strict=True):
        if keys:
            for place, (variant, own) in enumerate(_variants(lines).items()):
                own = sorted(own, key=lambda line: line.point.values[keys[0]])
                xs, ys = [line.point.values[keys[0]] for line in own], [measure(line) or 0.0 for line in own]
                panel.plot(xs, ys, label=variant or short(keys[0]), markersize=5, **_style(place))
            xs = [line.point.values[keys[0]] for line in lines]
            if min(xs) > 0 and max(xs) > 8 * min(xs):
                panel.set_xscale("log", base=2)
                panel.set_xticks(sorted(set(xs)), [f"{x:g}" for x in sorted(set(xs))])
            panel.set_xlabel(short(keys[0]), fontsize=9)
            panel.set_ylabel(name, fontsize=9)
            panel.set_ylim(bottom=0)
        else:
            values = [measure(line) or 0.0 for line in lines]
            bars = panel.barh(range(len(lines)), values, color=_COLOURS[0])
            panel.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
            panel.set_yticks(range(len(lines)), [line.label for line in lines])
            panel.invert_yaxis()
            panel.margins(x=0.15)
            panel.set_xlabel(name, fontsize=9)
    _legend(figure, panels[0])
    return figure
