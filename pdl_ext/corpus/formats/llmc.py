"""llm.c's .bin: a header of 256 int32 (magic, version, tokens, zeros), then the tokens."""

from __future__ import annotations

import struct

from pdl_ext.corpus.reading.access import read_head
from pdl_ext.corpus.reading.flat import FlatSource
from pdl_ext.corpus.source import Format, ReadOptions, Source
from pdl_ext.storage.place import Place

__all__ = ["FORMAT"]

_HEADER_BYTES = 256 * 4
# For each magic: the supported version, and the dtype of the tokens.
_KNOWN = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
_EVALUATION = 20240522
_MAGICS = (*_KNOWN, _EVALUATION)
# All are dates. Another date is reported, since the header would be read as raw ids.
_LIKE_MAGICS = range(20230101, 20400101)


def _recognises(path: Place, head: bytes) -> bool:
    # Tokens could equal a magic by chance, but hardly with zeros after the header's fields, four at most.
    return len(head) >= 64 and _magic(head)[0] in _LIKE_MAGICS and not any(head[16:64])


def _magic(head: bytes) -> tuple[int, bool]:
    """The magic, and whether its bytes are in order."""
    little, big = struct.unpack_from("<i", head)[0], struct.unpack_from(">i", head)[0]
    return (big, False) if big in _MAGICS else (little, True)


def _open(path: Place, options: ReadOptions) -> list[Source]:
    head = read_head(path, _HEADER_BYTES)
    if len(head) < _HEADER_BYTES:
        raise ValueError(f"{path}: got {len(head)} bytes, expected a header of {_HEADER_BYTES} bytes of llm.c")
    magic, little_endian = _magic(head)
    if magic == _EVALUATION:
        raise ValueError(f"{path}: got an evaluation file of llm.c (magic {magic}), expected one of training tokens")
    if magic not in _KNOWN:
        raise ValueError(
            f"{path}: got magic {magic}, expected {' or '.join(map(str, _KNOWN))} of llm.c, or --format raw"
        )
    if not little_endian:
        raise ValueError(f"{path}: got a big-endian file of llm.c, expected a little-endian one")
    version, tokens = struct.unpack_from("<ii", head, 4)
    expected, dtype = _KNOWN[magic]
    if version != expected:
        raise ValueError(f"{path}: got version {version} of llm.c's magic {magic}, expected {expected}")
    if tokens < 0:
        raise ValueError(f"{path}: states {tokens} tokens, expected 0 or more")
    return [FlatSource("llmc", path, dtype, options, first_byte=_HEADER_BYTES, tokens=tokens)]


FORMAT = Format("llmc", _open, _recognises, has_header=True)
