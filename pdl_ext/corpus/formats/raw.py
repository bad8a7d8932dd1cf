"""Files of token ids only, such as nanoGPT's .bin and Dolma's .npy: the dtype has to be given."""

from __future__ import annotations

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.flat import FlatSource
from pdl_ext.corpus.reading.foreign import HEAD_BYTES, kind_of_content
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]


class _RawSource(FlatSource):
    """Ids of the given dtype, from a file's first byte to its last."""

    def doubt(self) -> str | None:
        kind = kind_of_content(read_head(self.path, HEAD_BYTES))
        if kind is None:
            return super().doubt()
        return f"{self.path}: begins like {kind.name}, and all of it is counted as ids of {self.dtype}"


def _open(path: Place, options: ReadOptions) -> list[Source]:
    if options.dtype is None:
        raise ValueError(
            f"{path}: has no header, so its dtype is unknown: give dtype, one of {', '.join(TOKEN_DTYPES)} "
            "(nanoGPT's are uint16, or uint32 above 65,536 entries)"
        )
    return [_RawSource("raw", path, options.dtype, options, is_given=True)]


# Any bytes could be ids. The other file is Dolma's, which describes its documents.
FORMAT = Format("raw", _open, recognises=lambda path, head: False, companions={".csv.gz": ".npy"})
