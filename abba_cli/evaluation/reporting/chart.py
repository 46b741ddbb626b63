"""A comparison as a picture: a dot for each score, with its 95% interval."""

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.errors import DataError
from abba_cli.evaluation.reporting.comparing import AVERAGE, Comparison
from abba_cli.evaluation.reporting.side_by_side import MADE_BY

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#4d4d4d", "#8c6bb1")  # told apart by most eyes
_MARKERS = "osD^vPXh"


def comparison_png(comparison: Comparison, path: Path) -> None:
    """Draw a band for each task; the models are dots in it, in the order of the rows from above.

    Args:
        comparison: What to draw; columns that are no shares of 1 are named below the picture only.
        path: The file; an old one is replaced.

    Raises:
        DataError: No score is a share of 1, so there is no common axis.
        RunError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [place for place, column in enumerate(comparison.columns) if column.share]
    if not drawn:
        raise DataError("no score is a share of 1 that could be drawn in percent; --markdown takes any")
    labels = [_plain("\n".join(textwrap.wrap(row.label, 95))) for row in comparison.rows]
    footnotes = [_plain(line) for line in _footnotes(comparison)]
    band = 0.26 + 0.11 * len(labels)  # inches
    legend_columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 45 else 1
    legend = 0.19 * -(-sum(1 + label.count("\n") for label in labels) // legend_columns)
    figure = Figure(figsize=(9, 1.1 + band * len(drawn) + legend + 0.13 * len(footnotes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dots = _draw(axes, comparison, drawn)
    figure.legend(
        dots,
        labels,
        title="Scores with 95% intervals; the best in bold",
        title_fontproperties={"weight": "bold", "size": 12},
        alignment="left",
        loc="outside upper left",
        ncols=legend_columns,
        frameon=False,
        fontsize=9,
    )
    if footnotes:
        figure.supxlabel("\n".join(footnotes), x=0.01, ha="left", fontsize=7.5, color="#444444")
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a label in a script that the font lacks
        figure.savefig(picture, format="png", dpi=150, metadata={"Software": MADE_BY})
    with disk_errors(path):
        write_atomically(path, picture.getvalue())


def _draw(axes: Any, comparison: Comparison, drawn: Sequence[int]) -> list[Any]:
    """Fill the axes.

    Returns:
        One dot a model, for the legend.
    """
    models = len(comparison.rows)
    spread = min(0.8, 0.2 * models)  # of a band's height
    legend = []
    for model, row in enumerate(comparison.rows):
        colour, marker = _COLOURS[model % len(_COLOURS)], _MARKERS[(model + model // len(_COLOURS)) % len(_MARKERS)]
        offset = spread * ((model + 0.5) / models - 0.5)
        for band, place in enumerate(drawn):
            cell = row.cells[place]
            if cell is None:
                continue
            low, high = cell.interval or (cell.value, cell.value)
            axes.plot([100 * low, 100 * high], [band + offset] * 2, color=colour, linewidth=1.4, alpha=0.6)
            axes.plot(100 * cell.value, band + offset, marker, color=colour, markersize=5, markeredgecolor="white", zorder=3)
            axes.annotate(
                f"{100 * cell.value:.1f}",
                (100 * high, band + offset),
                xytext=(3, 0),
                textcoords="offset points",
                va="center_baseline",
                fontsize=6.5,
                color="black" if model in comparison.best[place] else "#666666",
                fontweight="bold" if model in comparison.best[place] else "normal",
            )
        legend += axes.plot([], [], marker, color=colour, markersize=6)
    for band, place in enumerate(drawn):
        if comparison.columns[place].task == AVERAGE:
            axes.axhspan(band - 0.5, band + 0.5, color="#e8e8e8", linewidth=0, zorder=0)
        elif band:
            axes.axhline(band - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(drawn)), [_tick(comparison, place) for place in drawn])
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    axes.margins(x=0.06)  # room for the last number
    axes.set_xlabel("score, %", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return legend


def _tick(comparison: Comparison, place: int) -> str:
    column = comparison.columns[place]
    counts = [cell.n for row in comparison.rows if (cell := row.cells[place]) is not None and cell.n is not None]
    n = "" if not counts else f"\nn = {min(counts):,}" + (f" to {max(counts):,}" if max(counts) > min(counts) else "")
    return _plain(f"{column.marked}{n}")


def _footnotes(comparison: Comparison) -> list[str]:
    left_out = [column.heading for column in comparison.columns if not column.share]
    notes = [*comparison.notes, *([f"not drawn, as not in percent: {', '.join(left_out)}"] if left_out else [])]
    return [line for note in notes for line in textwrap.wrap(note, 150, subsequent_indent="    ")]


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
