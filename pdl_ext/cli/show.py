"""`pdl-ext show`: what a counts file holds, and what each alpha would make of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdl_ext.cli.streams import tell, write

if TYPE_CHECKING:
    from pdl_ext import TokenFrequency
    from pdl_ext.provenance import Provenance

__all__ = ["add_parser"]

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
_SHARDS_SHOWN = 3


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `show`."""
    parser = subparsers.add_parser(
        "show", help="print what counts hold, and what one needs to choose alpha", description="Prints a counts file."
    )
    parser.add_argument("counts", type=Path, metavar="COUNTS", help="a file that `pdl-ext count` wrote")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json, to print tokens as text")
    parser.add_argument("--alpha", type=float, nargs="+", default=_ALPHAS, metavar="A", help="exponents to compare")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="tokens printed of each end (default: 10)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from pdl_ext._checks import check_integer
    from pdl_ext.cli.counts_file import load_counts

    check_integer("top", arguments.top, 1, 2**31 - 1, "an int >= 1")
    frequency = load_counts(arguments.counts)
    text = _text_of(arguments.tokenizer, frequency.provenance)
    # All of it is computed before the first line is printed.
    lines = [
        *_totals(frequency),
        *_provenance(frequency.provenance),
        "",
        *_tokens(frequency, arguments.top, text),
        "",
        *_alphas(frequency, arguments.alpha),
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
    kinds = sorted({_printable(f"{shard.format} ({shard.dtype})") for shard in shards})
    lines = [
        f"files       {len(shards):,} with {sum(shard.size for shard in shards):,} bytes and {provenance.tokens:,} "
        f"tokens: {', '.join(kinds) or 'not told'}"
    ]
    lines += [f"            {_printable(shard.name)}" for shard in shards[:_SHARDS_SHOWN]]
    if len(shards) > _SHARDS_SHOWN:
        lines.append(f"            and {len(shards) - _SHARDS_SHOWN:,} more")
    policy = provenance.policy
    told = [f"targets {policy.targets}", f"ignore index {policy.ignore_index}"]
    told += [
        f"{name.replace('_', ' ')} {_printable(getattr(policy, name))}"
        for name in ("column", "mask", "skip_prompt")
        if getattr(policy, name) is not None
    ]
    if provenance.tokenizer is not None:
        told += [
            f"tokenizer {_printable(provenance.tokenizer)}",
            "special tokens" if policy.special_tokens else "no special tokens",
        ]
    return [*lines, f"policy      {', '.join(told)}", f"counted by  pdl_ext {_printable(provenance.version)}"]


def _printable(name: str) -> str:
    # The name of a file or a column may hold a line feed, a terminal's command, or bytes that are no text.
    return name if name.isprintable() else repr(name)


def _text_of(path: Path | None, provenance: Provenance | None) -> Callable[[int], str]:
    if path is None:
        return lambda token: ""
    from pdl_ext.corpus.reading.tokenizer import text_of_token
    from pdl_ext.provenance import file_digest

    text = text_of_token(path)
    if provenance is not None and provenance.tokenizer not in (None, file_digest(path)):
        tell(f"pdl-ext show: warning: {path} is not the tokenizer of the counts")
    # As a literal: a token may be a line feed, or half of a character.
    return lambda token: repr(text(token))


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


def _alphas(frequency: TokenFrequency, alphas: list[float]) -> list[str]:
    from pdl_ext.statistics import MOST_FREQUENT, alpha_statistics

    lines = [
        f"alpha   effective sample   mass of top {MOST_FREQUENT}   weights: most frequent   rarest seen     largest",
    ]
    for alpha in alphas:
        of_alpha = alpha_statistics(frequency, alpha)
        lines.append(
            f"{of_alpha.alpha:5.3g}   {100 * of_alpha.effective_fraction:14.1f} %   "
            f"{100 * of_alpha.mass_of_most_frequent:13.1f} %   {of_alpha.weight_of_most_frequent:22.3g}   "
            f"{of_alpha.largest_seen:11.3g}   {of_alpha.largest:9.3g}"
        )
    return [
        *lines,
        "Effective sample: how many labels of 100 still count. Begin with an alpha of 0.25 to 0.5; take less where it",
        "is below a quarter, or where single tokens weigh more than some hundreds (max_weight limits them).",
    ]
