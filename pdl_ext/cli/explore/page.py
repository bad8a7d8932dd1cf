"""The page of counts: a template, filled with its styles, scripts and data."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import string
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from pdl_ext import TokenFrequency
from pdl_ext.statistics import MOST_FREQUENT, log_spaced_ranks, zipf_slope
from pdl_ext.storage.place import Place
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, PowerLaw, Uniform, Weighting

__all__ = ["BEGINNING", "page_of"]

# The beginning of every such page, and of no other.
BEGINNING = b'<!DOCTYPE html>\n<html lang="en" data-page-of="pdl-ext explore">\n'

_SCRIPTS = ("weights.js", "chart.js", "page.js")
_FAMILY = (PowerLaw, ClassBalanced, Adaptive, Face, Uniform)
# A schedule of training, and single tokens: these numbers do not help to choose either.
_NOT_SHOWN = ("blend", "fixed")
_DRAWN = 320
_LISTED = 12
# The last of TokenFrequency.buckets: types that together are 5 % of the tokens.
_RARE_BUCKET = 2


def page_of(frequency: TokenFrequency, counts: Place, literal: Callable[[int], str]) -> bytes:
    """A self-contained HTML page for counts that are not empty.

    counts: their file, for the page's lines of Python.
    literal: returns an id's text as a Python literal, or an empty string.
    """
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    page = string.Template(_asset("page.html")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=_inside_a_script(_shown(frequency, counts, literal)),
    )
    return BEGINNING + page.encode()


def _asset(name: str) -> str:
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The name by which a content security policy permits a style or script in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _inside_a_script(value: Any) -> str:
    """JSON in ASCII that neither ends the element around it nor begins another one."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _shown(frequency: TokenFrequency, counts: Place, literal: Callable[[int], str]) -> dict[str, Any]:
    order = torch.argsort(frequency.counts, descending=True, stable=True)
    types_seen = int((frequency.counts > 0).sum())
    # Weights are functions of the count: types with equal counts are stored as one count and their number.
    values, types = torch.unique(frequency.counts, return_counts=True)
    most, rare = list(range(min(_LISTED, types_seen))), _sampled_rare(frequency, order, types_seen)
    drawn = log_spaced_ranks(types_seen, _DRAWN).tolist()
    told = sorted({*most, *rare, *drawn})
    ids = order[told].tolist()
    return {
        "file": str(counts),
        "literal": repr(str(counts)),
        "total": frequency.total,
        "vocabulary": frequency.vocab_size,
        "slope": zipf_slope(frequency.counts),
        "mostFrequent": MOST_FREQUENT,
        "family": {weighting.__name__: _defaults(weighting) for weighting in _FAMILY},
        # Differences have fewer digits than counts.
        "gaps": values.diff(prepend=values.new_zeros(1)).tolist(),
        "types": types.tolist(),
        "tokens": [[rank, token, literal(token)] for rank, token in zip(told, ids, strict=True)],
        "most": most,
        "rare": rare,
    }


def _sampled_rare(frequency: TokenFrequency, order: torch.Tensor, types_seen: int) -> list[int]:
    """Evenly spaced ranks of the rarest types seen, which together are 5 % of the tokens."""
    first = int((frequency.buckets()[order] != _RARE_BUCKET).sum())
    # Types that are already listed as the most frequent are left out.
    first = max(first, _LISTED)
    if first >= types_seen:
        return []
    return torch.linspace(first, types_seen - 1, _LISTED, dtype=torch.float64).round().long().unique().tolist()


def _defaults(weighting: Any) -> dict[str, Any]:
    """The options of a weighting with their defaults, its own first."""
    shared = [option.name for option in fields(Weighting)]
    shown = [option for option in fields(weighting) if option.name not in _NOT_SHOWN]
    return {option.name: option.default for option in sorted(shown, key=lambda option: option.name in shared)}
