"""`pdl-ext show`: the content of a counts file, and the statistics of weightings over it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pdl_ext.cli.streams import write
from pdl_ext.cli.token_text import literals_of_tokens

if TYPE_CHECKING:
    from pdl_ext import TokenFrequency
    from pdl_ext.provenance import Provenance
    from pdl_ext.weighting import Weighting

__all__ = ["add_parser"]

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
_WEIGHTINGS = ("adaptive", "class-balanced", "face", "power-law", "uniform")
_BETAS = (0.9, 0.99, 0.999, 0.9999)
_SHARDS_SHOWN = 3


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `show`."""
    parser = subparsers.add_parser(
        "show", help="print counts, and the statistics to choose alpha by", description="Prints a counts file."
    )
    parser.add_argument("counts", metavar="COUNTS", help="a file that `pdl-ext count` wrote")
    parser.add_argument("--tokenizer", metavar="PATH", help="the counts' tokenizer, to print tokens as text")
    parser.add_argument("--alpha", type=float, nargs="+", metavar="A", help="exponents of the power law to compare")
    parser.add_argument(
        "--weighting", choices=_WEIGHTINGS, default="power-law", help="the weighting of tokens (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="tokens printed of each end (default: 10)")
    parser.set_defaults(run=_run, shows_time=True)


def _run(arguments: argparse.Namespace) -> int:
    from pdl_ext._checks import check_integer
    from pdl_ext.cli.counts_file import load_counts
    from pdl_ext.storage.place import place

    check_integer("top", arguments.top, 1, 2**31 - 1, "an int >= 1")
    if arguments.alpha is not None and arguments.weighting != "power-law":
        raise ValueError(f"alpha: got one with --weighting {arguments.weighting}, expected none: only power-law has it")
    frequency = load_counts(place("counts", arguments.counts))
    text = literals_of_tokens(arguments.tokenizer, frequency.provenance)
    # Everything is computed before the first line is printed.
    lines = [
        *_totals(frequency),
        *_provenance(frequency.provenance),
        "",
        *_tokens(frequency, arguments.top, text),
        "",
        *_weightings(frequency, arguments.weighting, arguments.alpha or _ALPHAS),
    ]
    write(*lines)
    return 0


def _totals(frequency: TokenFrequency) -> list[str]:
    from pdl_ext.statistics import zipf_slope

    counts = frequency.counts
    slope = zipf_slope(counts)
    return [
        f"tokens      {frequency.tokens_seen:,}: {frequency.total:,} counted, {int(frequency.ignored):,} ignored, "
        f"{int(frequency.out_of_range):,} out of range",
        f"vocabulary  {frequency.vocab_size:,}: {int((counts == 0).sum()):,} never seen, "
        f"{int((counts == 1).sum()):,} seen once",
        f"Zipf slope  {'none' if slope is None else f'{slope:.2f}'} (log count over log rank; -1 is Zipf's law)",
    ]


def _provenance(provenance: Provenance | None) -> list[str]:
    if provenance is None:
        return ["files       none: counted from memory"]
    shards = provenance.shards
    kinds = sorted({f"{shard.format} ({shard.dtype})" for shard in shards})
    lines = [
        f"files       {len(shards):,} with {sum(shard.size for shard in shards):,} bytes and {provenance.tokens:,} "
        f"tokens: {', '.join(kinds) or 'not told'}"
    ]
    lines += [f"            {shard.name}" for shard in shards[:_SHARDS_SHOWN]]
    if len(shards) > _SHARDS_SHOWN:
        lines.append(f"            and {len(shards) - _SHARDS_SHOWN:,} more")
    policy = provenance.policy
    told = [f"targets {policy.targets}", f"ignore index {policy.ignore_index}"]
    told += [
        f"{name.replace('_', ' ')} {getattr(policy, name)}"
        for name in ("column", "mask", "skip_prompt", "learn", "max_length", "packing")
        if getattr(policy, name) is not None
    ]
    if provenance.tokenizer is not None:
        told += [
            f"tokenizer {provenance.tokenizer}",
            "special tokens" if policy.special_tokens else "no special tokens",
        ]
    if provenance.chat_template is not None:
        told.append(f"chat template {provenance.chat_template}")
    return [*lines, f"policy      {', '.join(told)}", f"counted by  pdl_ext {provenance.version}"]


def _tokens(frequency: TokenFrequency, top: int, text: Callable[[int], str]) -> list[str]:
    import torch

    order = torch.argsort(frequency.counts, descending=True, stable=True)
    seen = order[: int((frequency.counts > 0).sum())].tolist()
    total = max(frequency.total, 1)

    def line(token: int) -> str:
        count = int(frequency.counts[token])
        return f"  {token:>8}  {count:>16,}  {100 * count / total:9.4f} %  {text(token)}".rstrip()

    most = seen[:top]
    rarest = seen[max(len(most), len(seen) - top) :]
    lines = ["most frequent:", *map(line, most)] if most else ["nothing was counted"]
    return [*lines, "rarest seen:", *map(line, rarest)] if rarest else lines


def _weightings(frequency: TokenFrequency, name: str, alphas: Sequence[float]) -> list[str]:
    from pdl_ext.statistics import MOST_FREQUENT, weight_statistics

    option, shown = _shown(name, alphas)
    columns = f"effective sample   mass of top {MOST_FREQUENT}   weights: most frequent   rarest seen     largest"
    lines = [f"{option:5}   {columns}"]
    for value, weighting in shown:
        found = weight_statistics(frequency, weighting)
        lines.append(
            f"{value:>5}   {100 * found.effective_fraction:14.1f} %   "
            f"{100 * found.mass_of_most_frequent:13.1f} %   {found.weight_of_most_frequent:22.3g}   "
            f"{found.weight_of_rarest_seen:11.3g}   {found.largest:9.3g}"
        )
    lines.append("Effective sample: how many labels of 100 still count.")
    if name == "power-law":
        lines[-1] += " Begin with an alpha of 0.25; take less where it"
        lines.append(
            "is below a quarter, or where single tokens weigh more than some hundreds (max_weight limits them)."
        )
    return lines


def _shown(name: str, alphas: Sequence[float]) -> tuple[str, list[tuple[str, Weighting]]]:
    """The option by which weightings differ, and the weightings by their value of it."""
    from pdl_ext.weighting import Adaptive, ClassBalanced, Face, PowerLaw, Uniform

    if name == "adaptive":
        return "form", [("exp", Adaptive()), ("chi2", Adaptive(form="chi2"))]
    if name == "class-balanced":
        return "beta", [(f"{beta:g}", ClassBalanced(beta)) for beta in _BETAS]
    if name == "face":
        return "", [("-", Face())]
    if name == "uniform":
        return "", [("-", Uniform())]
    return "alpha", [(f"{alpha:.3g}", PowerLaw(alpha)) for alpha in alphas]
