"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file, also where there is no display

from matplotlib import pyplot

BLUE, ORANGE, GREY = "#2b6cb0", "#d9730d", "#718096"
MARKERS = "osD^v<>PX*"


@dataclass(frozen=True)
class Frontier:
    """The data of one task's picture: (chrF++, rare-word F1) of each arm, and of each curve's points in their order."""

    title: str
    arms: Mapping[str, tuple[float, float]]
    curves: Mapping[str, Sequence[tuple[float, float]]]


def draw_frontiers(path: Path, tasks: Sequence[Frontier]) -> None:
    """Write a PNG: one picture a task, arms as points, curves as lines, and one legend below them."""
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6.5 * len(tasks), 6.5), layout="constrained", squeeze=False)
    marker = dict(zip(dict.fromkeys(name for task in tasks for name in task.arms), MARKERS, strict=False))
    shown = {}
    for axis, task in zip(axes[0], tasks, strict=True):
        for (name, points), colour in zip(task.curves.items(), (BLUE, BLUE, ORANGE, ORANGE), strict=False):
            style = "--" if "temperature" in name else "-"
            (shown[name],) = axis.plot(*zip(*points, strict=True), style, marker=".", color=colour, linewidth=1.5)
        for name, (x, y) in task.arms.items():
            colour = ORANGE if name.startswith("PDL, ") else BLUE if name == "cross-entropy" else GREY
            (shown[name],) = axis.plot(x, y, marker[name], color=colour, markersize=9, markeredgecolor="white")
        axis.set_title(task.title)
        axis.set_xlabel("chrF++ (higher is better)")
        axis.set_ylabel("rare-word F1, % (higher is better)")
        axis.grid(True, alpha=0.25)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2 * len(tasks), fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
