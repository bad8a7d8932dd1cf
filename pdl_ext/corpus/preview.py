"""The preview of a count: each file with its format and dtype, and its approximate number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pdl_ext.corpus.source import Source

__all__ = ["FilePreview", "previewed"]

# The number of files of one format and dtype that are sampled, evenly spaced.
_SAMPLED_FILES = 8


class FilePreview(NamedTuple):
    """A file that would be counted. tokens: the number of its tokens; is_exact: whether it is exact or an estimate."""

    name: str
    size: int
    format: str
    dtype: str
    tokens: int
    is_exact: bool


def previewed(sources: Sequence[Source]) -> Iterator[FilePreview]:
    """The previews of sources, in order. Raises ValueError as reading them does."""
    rates = _tokens_per_byte(sources)
    for source in sources:
        exact = source.stated_tokens()
        tokens = exact if exact is not None else round(source.size * rates[source.format, source.dtype])
        yield FilePreview(str(source.path), source.size, source.format, source.dtype, tokens, exact is not None)


def _tokens_per_byte(sources: Sequence[Source]) -> dict[tuple[str, str], float]:
    unknown: dict[tuple[str, str], list[Source]] = {}
    for source in sources:
        if source.stated_tokens() is None:
            unknown.setdefault((source.format, source.dtype), []).append(source)
    rates = {}
    for kind, alike in unknown.items():
        step = -(-len(alike) // _SAMPLED_FILES)
        samples = [source.sample() for source in alike[::step]]
        rates[kind] = sum(sample.tokens for sample in samples) / max(1, sum(sample.size for sample in samples))
    return rates
