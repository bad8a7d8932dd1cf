"""Token ids and nothing else, as nanoGPT's .bin and Dolma's .npy: the dtype has to be given."""

from __future__ import annotations

from pathlib import Path

from pdl_ext.corpus.flat import FlatSource
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source

__all__ = ["FORMAT"]


def _open(path: Path, options: ReadOptions) -> list[Source]:
    if options.dtype is None:
        raise ValueError(
            f"{path}: has no header, so its dtype cannot be told: give dtype, one of {', '.join(TOKEN_DTYPES)} "
            "(nanoGPT's are uint16, or uint32 above 65,536 entries)"
        )
    return [FlatSource("raw", path, options.dtype, options)]


# Any bytes would do.
FORMAT = Format("raw", _open, recognises=lambda path, head: False)
