"""Error against rank as a picture: a panel for each matrix or type of layer, a line for each method."""

import io
import textwrap
from pathlib import Path

from abba_cli.disk import disk_errors, write_atomically
from abba_cli.reconstruction.reporting import LABELS, Summary

# Told apart by most eyes, and without colour by marker and stroke.
_STYLES = {"lora": ("#0072b2", "s", "--"), "abba": ("#d55e00", "o", "-"), "loha": ("#009e73", "^", ":")}
_COLUMNS = 3


def draw(summary: Summary, path: Path) -> None:
    """Draw the mean errors, and shade from the lowest to the highest of all restarts and layers.

    Raises:
        RunError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(summary.groups))
    rows = -(-len(summary.groups) // columns)
    figure = Figure(figsize=(max(4.2, 3.1 * columns), 2.6 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, group in zip(panels, summary.groups, strict=False):
        for method in summary.methods:
            colour, marker, stroke = _STYLES[method]
            errors = [summary.errors[group, method, rank] for rank in summary.ranks]
            low, high = zip(*(summary.spread[group, method, rank] for rank in summary.ranks), strict=True)
            panel.fill_between(summary.ranks, low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(summary.ranks, errors, color=colour, marker=marker, linestyle=stroke, markersize=5, label=LABELS[method])
        size = summary.sizes[group]
        name = f"{group} ({size} layers)" if size > 1 else group
        panel.set_title("\n".join(textwrap.wrap(name, 38)).replace("$", r"\$"), fontsize=10)
        panel.set_ylim(bottom=0)
        panel.set_xticks(summary.ranks, [str(rank) for rank in summary.ranks])
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(summary.groups) :]:
        panel.set_visible(False)
    figure.supxlabel("rank of the LoRA with as many parameters", fontsize=10)
    figure.supylabel("squared relative error", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": "abba reconstruct"})
    with disk_errors(path):
        write_atomically(path, picture.getvalue())
