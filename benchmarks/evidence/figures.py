"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into a file, also where there is no display

from matplotlib import pyplot

BLUE, ORANGE, GREY = "#2b6cb0", "#d9730d", "#718096"


@dataclass(frozen=True)
class Frontier:
    """The data of one task's picture: (chrF++, rare-word F1) of each arm, and of each curve's points in their order."""

    title: str
    arms: Mapping[str, tuple[float, float]]
    curves: Mapping[str, Sequence[tuple[float, float]]]


def draw_frontiers(path: Path, tasks: Sequence[Frontier]) -> None:
    """Write a PNG: one picture a task, arms as points, curves as lines."""
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6.5 * len(tasks), 5.5), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for (name, points), colour in zip(task.curves.items(), (BLUE, BLUE, ORANGE, ORANGE), strict=False):
            style = "--" if "temperature" in name else "-"
            axis.plot(*zip(*points, strict=True), style, marker=".", color=colour, linewidth=1.5, label=name)
        for name, (x, y) in task.arms.items():
            axis.plot(x, y, "o", color=GREY, markersize=7)
            axis.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set_title(task.title)
        axis.set_xlabel("chrF++ (higher is better)")
        axis.set_ylabel("rare-word F1, % (higher is better)")
        axis.grid(True, alpha=0.25)
        if task.curves:
            axis.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
