"""`pdl-ext plot`: the counts over their ranks, with the weights of some alphas, as a picture."""

from __future__ import annotations

import argparse
import io
from typing import Any

from pdl_ext.cli.streams import report

__all__ = ["add_parser"]

_ALPHAS = (0.25, 0.5, 1.0)
_SUFFIXES = (".png", ".svg")
_POINTS = 1000


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `plot`."""
    parser = subparsers.add_parser(
        "plot",
        help="draw counts and weights over ranks",
        description="Draws how often types occur, over their ranks, with the weights of some alphas.",
    )
    parser.add_argument("counts", metavar="COUNTS", help="a file that `pdl-ext count` wrote")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="a .png or .svg file, or its URL")
    parser.add_argument("--alpha", type=float, nargs="+", default=_ALPHAS, metavar="A", help="exponents of the weights")
    parser.set_defaults(run=_run, shows_time=True)


def _run(arguments: argparse.Namespace) -> int:
    from pdl_ext.storage.place import place

    output = place("output", arguments.output)
    if output.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"output: got {output}, expected a name that ends in {' or '.join(_SUFFIXES)}")
    from pdl_ext._optional import require
    from pdl_ext.cli.counts_file import check_output_folder, load_counts
    from pdl_ext.storage.whole_file import write_whole

    check_output_folder(output)
    counts = place("counts", arguments.counts)
    frequency = load_counts(counts)
    if frequency.total == 0:
        raise ValueError(f"counts: got {counts}, in which nothing was counted, expected some tokens")
    figure = _figure(frequency, arguments.alpha)
    file_format = output.suffix[1:].lower()
    # Without a date and random names, so that the same counts give the same file.
    picture = io.BytesIO()
    with require("matplotlib", "plot").rc_context({"svg.hashsalt": "pdl_ext"}):
        figure.savefig(picture, format=file_format, metadata={"Date": None} if file_format == "svg" else None)
    write_whole(output, picture.getvalue())
    report(str(output))
    return 0


def _figure(frequency: Any, alphas: list[float]) -> Any:
    import torch

    from pdl_ext import PowerLaw
    from pdl_ext._optional import require
    from pdl_ext.statistics import log_spaced_ranks

    # Not pyplot, which has global state and may need a display.
    figure = require("matplotlib.figure", "plot").Figure(figsize=(8, 5), dpi=150, layout="constrained")
    order = torch.argsort(frequency.counts, descending=True, stable=True)
    order = order[: int((frequency.counts > 0).sum())]
    ranks = log_spaced_ranks(order.numel(), _POINTS)
    shown = order[ranks]
    x = (ranks + 1).tolist()
    # A line shows nothing for a single type.
    marker = "o" if len(x) == 1 else None

    axes = figure.add_subplot()
    axes.loglog(x, frequency.counts[shown].tolist(), color="black", linewidth=2, marker=marker, label="count")
    axes.set_xlabel(f"rank of the type, of {order.numel():,} seen in a vocabulary of {frequency.vocab_size:,}")
    axes.set_ylabel(f"count, of {frequency.total:,} tokens")
    axes.grid(True, which="major", alpha=0.3)
    weights_axes = axes.twinx()
    weights_axes.set_yscale("log")
    weights_axes.set_ylabel("weight (dotted: 1, as in cross-entropy)")
    weights_axes.axhline(1.0, color="grey", linewidth=1, linestyle=":")
    handles = [*axes.get_lines()]
    for number, alpha in enumerate(alphas):
        weights = PowerLaw(alpha=alpha).weights(frequency)[shown]
        label = f"weight, alpha {alpha:g}"
        style = {"color": f"C{number}", "linestyle": "--", "marker": marker}
        handles += weights_axes.plot(x, weights.tolist(), label=label, **style)
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), frameon=False)
    return figure
