"""Draws how many times faster the loss with its gradient is than PyTorch's, by vocabulary and dtype.

    python benchmarks/plot.py RESULTS.json docs/speed.png

RESULTS.json is the benchmark.json of cpu.py for one regime of memory, which the picture names.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEERS = {
    "F.cross_entropy": "F.cross_entropy(weight=)",
    "F.cross_entropy, compiled": "torch.compile of F.cross_entropy(weight=)",
}
# The colours of a dtype: with a new gradient the pale one, in place the full one.
COLOURS = {"float32": ("#90b4d8", "#2b6cb0"), "bfloat16": ("#f0b98a", "#d9730d")}
OURS = ("pdl_ext", "pdl_ext, in place")

# (dtype, vocabulary's size): seconds by provider
Medians = dict[tuple[str, int], dict[str, float]]


def medians(results: dict[str, Any]) -> Medians:
    """The measured times of the loss workloads. Raises ValueError if there are none of pdl_ext."""
    found: Medians = {}
    for row in results["rows"]:
        shape = re.fullmatch(r"loss (\w+) \[\d+, (\d+)\]", row["workload"])
        if shape and shape[1] in COLOURS and row["wall"]:
            found.setdefault((shape[1], int(shape[2])), {})[row["provider"]] = row["wall"]["median"]
    if not any(provider in OURS for times in found.values() for provider in times):
        raise ValueError("the results hold no times of pdl_ext's loss: run benchmarks/cpu.py with its loss workloads")
    return found


def speed_ups(times: Medians, peer: str) -> Iterator[tuple[str, str, dict[int, float]]]:
    """(dtype, provider of ours, speed-up by vocabulary's size), for vocabularies with both times."""
    for dtype in COLOURS:
        for ours in OURS:
            measured = {size: of for (its_dtype, size), of in times.items() if its_dtype == dtype}
            yield dtype, ours, {size: of[peer] / of[ours] for size, of in measured.items() if {peer, ours} <= of.keys()}


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes a PNG with a panel for each peer."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, also where there is no display
    from matplotlib import pyplot

    times = medians(results)
    sizes = sorted({size for _, size in times})
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for panel, (peer, title) in zip(panels, PEERS.items(), strict=True):
        width = 0.2
        for index, (dtype, ours, by_size) in enumerate(speed_ups(times, peer)):
            places = [sizes.index(size) + (index - 1.5) * width for size in by_size]
            in_place = ours == OURS[1]
            label = f"{dtype}, {'in place' if in_place else 'new gradient'}"
            bars = panel.bar(places, by_size.values(), width, label=label, color=COLOURS[dtype][in_place])
            panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        panel.axhline(1.0, color="black", linewidth=1, linestyle="--")
        panel.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        panel.set_xlabel("vocabulary")
        panel.set_title(f"over {title}")
        panel.grid(True, axis="y", alpha=0.25)
        panel.set_axisbelow(True)
        panel.margins(y=0.12)
    panels[0].set_ylabel("speed-up (dashed: as fast)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    about = results["about"]
    where = f"{about['device']}, {about['threads']} threads, PyTorch {about['torch']}, {about['date'][:10]}"
    # Results from before regimes existed do not state one.
    where += f", {about['memory']}" if "memory" in about else ""
    figure.suptitle(f"pdl_ext: loss and gradient, {where}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    options = parser.parse_args()
    try:
        draw(json.loads(options.results.read_text(encoding="utf-8")), options.picture)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print(f'plot.py: error: {error}; run: pip install "pdl_ext[demo]" or pip install matplotlib', file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"plot.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
