"""The plots of a run: step time against tokens, memory against the rank, and each whole model at a glance."""

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .grids import OURS, REFERENCE
from .report import ratio, title

Record = dict[str, Any]
# Okabe and Ito's colours; the marker and the line tell the methods apart without them, and in grey print.
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#D55E00", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 3},
    "LoRA": {"color": "#0072B2", "marker": "s", "linestyle": "--"},
    "LoRA, base dtype": {"color": "#56B4E9", "marker": "D", "linestyle": "--"},
    "DoRA": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "HiRA": {"color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "LoHa": {"color": "#000000", "marker": "x", "linestyle": ":"},
    "full": {"color": "#999999", "marker": "P", "linestyle": ":"},
    REFERENCE: {"color": "#E69F00", "marker": "*", "linestyle": "--"},
    "floor": {"color": "#555555", "marker": "|", "linestyle": "-"},
}
Value = Callable[[Record, str], float | None]


def plot(records: list[Record], folder: Path) -> list[Path]:
    """Draws what the records allow, as PNG files.

    Args:
        records: What `measure` returned, row by row.
        folder: Where the files are written.

    Returns:
        The files.
    """
    files = []
    whole = [record for record in records if record["row"]["whole"] and len(record["row"]["methods"]) > 1]
    if whole:
        files.append(_glance(whole, folder / "whole-models.png"))
    for shape, group in _groups(records, "tokens", lambda record: record["row"]["batch"] * record["row"]["length"]):
        panels: list[tuple[str, Value]] = [
            ("step time / LoRA's", lambda record, name: ratio(record, "seconds", name, "LoRA")),
            ("kept for backward / LoRA's", lambda record, name: ratio(record, "kept_bytes", name, "LoRA")),
        ]
        files.append(_lines(group, panels, "tokens in a step", f"{shape}, r1 = r2 = 16", folder / f"tokens-{shape}.png"))
    for shape, group in _groups(records, "R", lambda record: record["row"]["rank"] ** 2):
        panels = [
            ("peak above parameters and gradients (MB)", lambda record, name: _megabytes(record, name, "peak_bytes")),
            ("kept for backward (MB)", lambda record, name: _megabytes(record, name, "kept_bytes")),
        ]
        tokens = group[0][1]["row"]["batch"] * group[0][1]["row"]["length"]
        label = "R = r1 r2 of ABBA; the others at as many parameters"
        files.append(_lines(group, panels, label, f"{shape}, {tokens} tokens", folder / f"ranks-{shape}.png"))
    return files


def _groups(
    records: list[Record], over: str, position: Callable[[Record], int]
) -> Iterable[tuple[str, list[tuple[int, Record]]]]:
    """(shape, [(x, record)]) for each shape whose layers were measured in bfloat16 at two places of the axis or more."""
    plain = [r for r in records if not r["row"]["whole"] and r["row"]["precision"] == "bf16" and not r["row"]["checkpointing"]]
    for shape in dict.fromkeys(record["row"]["shape"] for record in plain):
        same = [record for record in plain if record["row"]["shape"] == shape]
        if over == "tokens":
            points = {position(record): record for record in same if record["row"]["rank"] == 16}
        else:
            # The size at which most ranks were measured.
            sizes = [(record["row"]["batch"], record["row"]["length"]) for record in same]
            size = max(sizes, key=sizes.count)
            points = {position(record): record for record in same if (record["row"]["batch"], record["row"]["length"]) == size}
        if len(points) > 1:
            yield shape, sorted(points.items())


def _lines(points: list[tuple[int, Record]], panels: list[tuple[str, Value]], xlabel: str, head: str, file: Path) -> Path:
    figure, axes = plt.subplots(1, len(panels), figsize=(11, 4.6), layout="constrained")
    for axis, (label, value) in zip(axes, panels, strict=True):
        for name, style in STYLES.items():
            found = [(x, y) for x, record in points if (y := value(record, name)) is not None]
            if found:
                axis.plot(*zip(*found, strict=True), label=name, markersize=7, **style)
        _finish(axis, [x for x, _ in points], xlabel, label)
    figure.suptitle(f"{head}. {_machine(points[0][1])}", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return _save(figure, file)


def _finish(axis: Axes, places: list[int], xlabel: str, ylabel: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.minorticks_off()
    if "LoRA" in ylabel:
        axis.axhline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(axis="y", color="#eeeeee")


def _glance(records: list[Record], file: Path) -> Path:
    """One panel a row: the step of each method as a ratio to LoRA's, the range of the rounds as a thin line."""
    columns = min(3, len(records))
    down = -(-len(records) // columns)
    figure, axes = plt.subplots(down, columns, figsize=(4.6 * columns, 3.8 * down), layout="constrained", squeeze=False)
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    for axis, record in zip(axes.flat, records, strict=False):
        names = [name for name in reversed(STYLES) if ratio(record, "seconds", name, "LoRA") is not None]
        lora = record["methods"].get("LoRA", {"seconds": []})["seconds"]
        for place, name in enumerate(names):
            ratios = [one / two for one, two in zip(record["methods"][name]["seconds"], lora, strict=True)]
            ours = name == OURS
            axis.barh(
                place,
                median(ratios),
                color="#D55E00" if ours else "#9ecae1",
                edgecolor="black",
                linewidth=0.6,
                hatch="//" if ours else None,
            )
            axis.hlines(place, min(ratios), max(ratios), color="black", linewidth=1.2)
            axis.annotate(f"{median(ratios):.2f}", (max(ratios), place), xytext=(4, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(names)), names)
        axis.axvline(1.0, color="#555555", linewidth=0.8, linestyle="--")
        axis.margins(x=0.18)
        axis.set_xlim(left=0)
        axis.set_xlabel("step time / LoRA's")
        axis.set_title(title(record).replace(", r1", "\nr1"), fontsize=10)
    figure.suptitle(_machine(records[0]), fontsize=11)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def _megabytes(record: Record, name: str, what: str) -> float | None:
    found = record["methods"].get(name, {}).get(what)
    return found / 1e6 if found else None


def _machine(record: Record) -> str:
    environment = record["environment"]
    threads = f", {environment['threads']} threads" if record["settings"]["device"] == "cpu" else ""
    return f"{environment['device']}{threads}, torch {environment['versions']['torch']}"
