"""datatrove's .ds: token ids only, with the ends of documents and the loss mask in files beside it.

- .ds.index: the end of each document in tokens (u64).
- .ds.loss: one byte per token, 0 where it is not a target.
- .ds.metadata: the tokenizer, then the number of tokens. Newer versions put the tokens' size after the tokenizer,
  behind a bar.
"""

from __future__ import annotations

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.flat import AscendingNumbers, FlatSource
from pdl_ext.corpus.source import TOKEN_DTYPES, Format, ReadOptions, Source, Stamp
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_SUFFIX = ".ds"
_COMPANIONS = (".index", ".loss", ".metadata")
_DTYPES = {2: "uint16", 4: "uint32"}


def _recognises(path: Place, head: bytes) -> bool:
    return _tokens_file(path).suffix == _SUFFIX


def _tokens_file(path: Place) -> Place:
    return path.with_suffix("") if path.suffix in _COMPANIONS else path


def _open(path: Place, options: ReadOptions) -> list[Source]:
    tokens_file = _tokens_file(path)
    if not tokens_file.is_file():
        if path.suffix == ".metadata":
            # Merging writes one for all its output files together, which has no tokens file beside it.
            return []
        raise ValueError(f"{tokens_file}: is missing, expected it beside {path.name}")
    index_file, loss_file, metadata_file = (tokens_file.with_name(tokens_file.name + s) for s in _COMPANIONS)
    index = _index(index_file) if index_file.is_file() else None
    size = Stamp.of(tokens_file).size
    dtype = _dtype_in(metadata_file) if metadata_file.is_file() else None
    is_given = dtype is None and options.dtype is not None
    if is_given:
        dtype = options.dtype
    if dtype is None and index is not None and index.last > 0:
        dtype = _DTYPES.get(size // index.last) if size % index.last == 0 else None
        if dtype is None:
            raise ValueError(
                f"{tokens_file}: got {size} bytes, expected 2 or 4 for each of the {index.last} tokens in the "
                f"documents of {index_file.name}"
            )
    if dtype is None and size == 0:
        # The file of a worker without documents.
        dtype = _DTYPES[2 if options.vocab_size <= 2**16 else 4]
    if dtype is None:
        raise ValueError(
            f"{tokens_file}: has no header, and no file beside it states its dtype: give dtype, one of "
            f"{', '.join(TOKEN_DTYPES)} (datatrove writes uint16, or uint32 above 65,536 entries)"
        )
    has_mask = loss_file.is_file()
    source = FlatSource(
        # The policy does not record which files have one.
        "datatrove with its loss mask" if has_mask else "datatrove",
        tokens_file,
        dtype,
        options,
        starts_between=None if index is None else index.distinct_between,
        mask=loss_file if has_mask else None,
        companions=() if index is None else (index_file,),
        is_given=is_given,
    )
    if index is not None and index.last != source.tokens:
        raise ValueError(
            f"{index_file}: its last document ends at token {index.last}, expected {source.tokens}, the end of "
            f"{tokens_file.name} ({dtype})"
        )
    return [source]


def _index(path: Place) -> AscendingNumbers:
    documents, rest = divmod(Stamp.of(path).size, 8)
    if rest:
        raise ValueError(
            f"{path}: got {8 * documents + rest} bytes, expected a multiple of 8: a document's end is uint64"
        )
    return AscendingNumbers(path, "<u8", 0, documents)


def _dtype_in(metadata: Place) -> str | None:
    first_line = read_head(metadata, 4096).split(b"\n")[0]
    size = first_line.rpartition(b"|")[2].strip()
    return {b"2": "uint16", b"4": "uint32"}.get(size) if b"|" in first_line else None


FORMAT = Format("datatrove", _open, _recognises, companions={_SUFFIX + companion: _SUFFIX for companion in _COMPANIONS})
