"""The picture of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into a file, also where there is no display

from matplotlib import pyplot
from matplotlib.ticker import LogLocator, NullFormatter

BLUE, ORANGE, GREY = "#2b6cb0", "#d9730d", "#a0aec0"


def draw(
    path: Path,
    *,
    counts: np.ndarray,
    weights: np.ndarray,
    alpha: float,
    groups: Sequence[str],
    nll: dict[str, list[float | None]],
) -> None:
    """Write a PNG: the rank-frequency line with the token weights over it, and bars of the NLL by bucket.

    ``counts`` and ``weights`` are [V]; ``nll`` holds, for each run, one value for each of ``groups``.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")

    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    rank = np.arange(1, len(order) + 1)
    (frequency_line,) = left.loglog(rank, counts[order], color=BLUE, linewidth=2, label="occurrences")
    left.set_xlabel("rank of the token")
    left.set_ylabel("occurrences among training targets", color=BLUE)
    left.tick_params(axis="y", labelcolor=BLUE)
    left.grid(True, which="major", alpha=0.25)
    left.set_title("Token frequency and PDL weight")
    over = left.twinx()
    over.set_yscale("log")
    (weight_line,) = over.plot(rank, weights[order], color=ORANGE, linewidth=2, label=f"weight, alpha {alpha:g}")
    over.axhline(1.0, color=ORANGE, linewidth=1, linestyle=":")
    over.set_ylabel("token weight (dotted: 1, as in cross-entropy)", color=ORANGE)
    over.tick_params(axis="y", labelcolor=ORANGE)
    # The weights of a small alpha lie within two decades, which have few powers of ten.
    over.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    over.yaxis.set_major_formatter("{x:g}")
    over.yaxis.set_minor_formatter(NullFormatter())
    left.legend(handles=[frequency_line, weight_line], loc="lower center")

    position = np.arange(len(groups))
    width = 0.8 / len(nll)
    for index, ((name, values), colour) in enumerate(zip(nll.items(), (GREY, BLUE, ORANGE), strict=True)):
        heights = [np.nan if value is None else value for value in values]
        bars = right.bar(position + (index - (len(nll) - 1) / 2) * width, heights, width, label=name, color=colour)
        right.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    right.set_xticks(position, [group.replace(": ", ":\n") for group in groups])
    right.set_ylabel("unweighted NLL of held-out targets, nats a token")
    right.set_title("Held-out NLL by token frequency (lower is better)")
    right.grid(True, axis="y", alpha=0.25)
    right.set_axisbelow(True)
    right.margins(y=0.12)
    right.legend(loc="upper left")

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
