"""The page of counts: a template, filled with its own styles and scripts and with what it is to show."""

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

# What every such page begins with, and no other.
BEGINNING = b'<!DOCTYPE html>\n<html lang="en" data-page-of="pdl-ext explore">\n'

_SCRIPTS = ("weights.js", "chart.js", "page.js")
_FAMILY = (PowerLaw, ClassBalanced, Adaptive, Face, Uniform)
# A schedule of training and single tokens: no choice that these numbers help with.
_NOT_SHOWN = ("blend", "fixed")
_DRAWN = 320
_LISTED = 12
# The last of TokenFrequency.buckets: types that together make 5 % of the tokens.
_RARE_BUCKET = 2


def page_of(frequency: TokenFrequency, counts: Place, literal: Callable[[int], str]) -> bytes:
    """A page of HTML that needs nothing else, of counts in which something was counted.

    counts: their file, which the page's lines of Python name.
    literal: gives an id's text as a Python literal, or an empty string.
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
    """How a content security policy names a style or script that may stand in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _inside_a_script(value: Any) -> str:
    """JSON of ASCII that neither ends the element that it stands in nor begins another one."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _shown(frequency: TokenFrequency, counts: Place, literal: Callable[[int], str]) -> dict[str, Any]:
    order = torch.argsort(frequency.counts, descending=True, stable=True)
    types_seen = int((frequency.counts > 0).sum())
    # Weights are functions of the count: types that occur equally often are one number and how many they are.
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
        # Differences have fewer digits.
        "gaps": values.diff(prepend=values.new_zeros(1)).tolist(),
        "types": types.tolist(),
        "tokens": [[rank, token, literal(token)] for rank, token in zip(told, ids, strict=True)],
        "most": most,
        "rare": rare,
    }


def _sampled_rare(frequency: TokenFrequency, order: torch.Tensor, types_seen: int) -> list[int]:
    """Ranks, evenly spaced, of the rarest types seen, which together make 5 % of the tokens."""
    first = int((frequency.buckets()[order] != _RARE_BUCKET).sum())
    # Those that are listed as the most frequent already are left out.
    first = max(first, _LISTED)
    if first >= types_seen:
        return []
    return torch.linspace(first, types_seen - 1, _LISTED, dtype=torch.float64).round().long().unique().tolist()


def _defaults(weighting: Any) -> dict[str, Any]:
    """The options of a weighting with their defaults, its own first."""
    shared = [option.name for option in fields(Weighting)]
    shown = [option for option in fields(weighting) if option.name not in _NOT_SHOWN]
    return {option.name: option.default for option in sorted(shown, key=lambda option: option.name in shared)}
