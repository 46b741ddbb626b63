"""The picture of the simulation: how well more devices are used, and what a whole run spends its time on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .runs import Run
from .steps import MACHINE

# Okabe and Ito's colours; every line is named where it ends.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#000000")
Lines = Mapping[str, Sequence[float]]


def plot(devices: Sequence[int], used: Mapping[str, Lines], runs: Mapping[str, Sequence[Run]], file: Path) -> None:
    """Draw two rows of panels.

    Args:
        devices: The numbers of devices.
        used: By fabric and setting, the share of the devices' arithmetic that is used, 0 to 1.
        runs: By setting, a whole run for each number of devices.
        file: The PNG.
    """
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.6), layout="constrained")
    for axis, (fabric, lines) in zip(axes[0], used.items(), strict=True):
        draw(axis, devices, {name: [100 * share for share in shares] for name, shares in lines.items()}, near=9)
        axis.set(title=fabric, ylim=(0, 125), ylabel="a step's arithmetic, % of its time" if axis is axes[0, 0] else "")
        axis.set_yticks(range(0, 101, 20))
        axis.axvline(MACHINE, color="#999999", linewidth=0.8, linestyle=":")
        axis.text(MACHINE * 1.05, 115, "several machines", color="#666666", fontsize=8)
    for axis, (setting, each) in zip(axes[1], runs.items(), strict=True):
        parts = {name: [asdict(one)[name] / 60 for one in each] for name in asdict(each[0])}
        axis.set_yscale("log")
        draw(axis, devices, parts, near=1.7)
        axis.set(title=f"A whole run, {setting}", xlabel="devices", ylabel="minutes" if axis is axes[1, 0] else "")
        axis.set_ylim(0.03, 20_000)
        axis.set_yticks([0.1, 1, 10, 100, 1_000, 10_000], ["0.1", "1", "10", "100", "1,000", "10,000"])
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw(axis: Axes, devices: Sequence[int], lines: Lines, near: float) -> None:
    """Draw lines and their names at their ends; names closer than `near` (a ratio on a log axis) are moved apart."""
    axis.set_xscale("log", base=2)
    logarithmic = axis.get_yscale() == "log"
    floor = float("-inf")
    colours = dict(zip(lines, COLOURS, strict=False))
    for name, values in sorted(lines.items(), key=lambda item: item[1][-1]):
        axis.plot(devices, values, color=colours[name], linewidth=2, marker="o", markersize=4)
        apart = floor * near if logarithmic else floor + near
        floor = values[-1] if floor == float("-inf") else max(values[-1], apart)
        axis.text(devices[-1] * 1.12, floor, name, color=colours[name], va="center", fontsize=9)
    axis.set_xlim(devices[0] * 0.9, devices[-1] * 8)
    axis.set_xticks(devices, [str(one) for one in devices])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#eeeeee")
