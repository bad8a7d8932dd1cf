"""Kinds of files that are not supported: their names, how they are recognised, and what to do with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pdl_ext.storage.place import Place

__all__ = ["HEAD_BYTES", "KINDS", "Kind", "kind_of", "kind_of_content", "kind_of_lines"]

# Up to tar's magic.
HEAD_BYTES = 512


class Kind(NamedTuple):
    """A kind of file.

    name: with its article. remedy: what to do. suffixes: of names, in lower case. is_text: whether it also counts as
    plain text.

    recognises: whether a file's first bytes are those of this kind, which tokens hardly ever are by chance.
    """

    name: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    recognises: Callable[[bytes], bool] = lambda head: False
    is_text: bool = False


def _starts(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_gzip(head: bytes) -> bool:
    # Deflate, no reserved flag, a known level and system: the magic alone is two bytes, as one token is.
    return (
        head[:3] == b"\x1f\x8b\x08"
        and len(head) > 9
        and head[3] < 32
        and head[8] in (0, 2, 4)
        and (head[9] < 14 or head[9] == 255)
    )


def _is_pickle(head: bytes) -> bool:
    # Protocol 4 or 5, and a frame with its length in 8 bytes. Earlier protocols begin with two bytes only.
    return head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and head[7:11] == bytes(4)


def _is_safetensors(head: bytes) -> bool:
    # The length of the JSON that follows, and printable JSON: 8 bytes of ids alone could be a length.
    return (
        head[4:8] == bytes(4)
        and head[8:10] == b'{"'
        and len(head) > 40
        and head[8:40].isascii()
        and 0 not in head[8:40]
    )


def _is_utf_16(head: bytes) -> bool:
    # With a byte order mark, or ASCII letters each beside a null, which other text does not have.
    pairs = head[: len(head) // 2 * 2]
    return head.startswith((b"\xff\xfe", b"\xfe\xff")) or any(
        len(pairs) >= 4 and not any(pairs[null::2]) and all(pairs[1 - null :: 2]) for null in (0, 1)
    )


_DECOMPRESS = "decompress it first"
# In Python, with `path` and `vocab_size`.
_IN_PYTHON = "count it in Python: "
_TORCH = _IN_PYTHON + "count_corpus([torch.load(path, weights_only=True)], vocab_size)"
_TAR = _IN_PYTHON + (
    'count_corpus((json.load(tar.extractfile(m))["input_ids"] for m in tar if m.name.endswith(".json")), vocab_size) '
    "with tar = tarfile.open(path)"
)
_TFRECORD = _IN_PYTHON + (
    'count_corpus((e["input_ids"] for e in tfrecord.tfrecord_loader(path, None)), vocab_size) with the package tfrecord'
)
_HDF5 = _IN_PYTHON + 'count_corpus([h5py.File(path)["input_ids"][:]], vocab_size)'
_PICKLE = "loading it can run any code: load it only if you trust it, and pass its arrays of ids to count_corpus"
_CONVERT = "convert it to JSON lines or Parquet"

KINDS = (
    Kind(
        "a chunk of lit-gpt's PackedDataset",
        _IN_PYTHON + "count_corpus([numpy.fromfile(path, dtype, offset=24)], vocab_size)",
        recognises=lambda head: head.startswith(b"LITPKDS") and head[8:15] == bytes(7),
    ),
    Kind(
        "a pointer of Git LFS", "fetch the file itself (git lfs pull)", recognises=_starts(b"version https://git-lfs.")
    ),
    Kind(
        "a page of HTML",
        "download the file itself, or extract its text",
        (".html", ".htm"),
        _starts(b"<!DOCTYPE html", b"<!doctype html", b"<html"),
        is_text=True,
    ),
    Kind("gzip data", _DECOMPRESS, (".gz",), _is_gzip),
    Kind("zstd data", _DECOMPRESS, (".zst", ".zstd"), _starts(b"\x28\xb5\x2f\xfd")),
    Kind("bzip2 data", _DECOMPRESS, (".bz2",), _starts(*(b"BZh%d1AY&SY" % level for level in range(1, 10)))),
    Kind("xz data", _DECOMPRESS, (".xz", ".lzma"), _starts(b"\xfd7zXZ\0")),
    Kind("LZ4 data", _DECOMPRESS, (".lz4",), _starts(b"\x04\x22\x4d\x18")),
    Kind("snappy data", _DECOMPRESS, (".snappy", ".sz"), _starts(b"\xff\x06\0\0sNaPpY")),
    # Since version 1.6 PyTorch writes zip archives, which are supported.
    Kind("a file of PyTorch before 1.6", _TORCH, (), _starts(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19")),
    Kind("a zip archive", "unpack it first", (".zip",), _starts(b"PK\3\4", b"PK\5\6")),
    Kind("a 7z archive", _DECOMPRESS, (".7z",), _starts(b"7z\xbc\xaf\x27\x1c")),
    Kind(
        "a tar archive, as WebDataset's are",
        _TAR,
        (".tar", ".tgz"),
        lambda head: head[257:262] == b"ustar" and b"\0" in head[:257],
    ),
    Kind("a pickle", _PICKLE, (".pkl", ".pickle"), _is_pickle),
    Kind("a file of safetensors", "give format safetensors, or that suffix", recognises=_is_safetensors),
    Kind(
        "a model in GGUF",
        "name the corpus instead",
        (".gguf",),
        _starts(*(b"GGUF%c\0\0\0" % version for version in range(1, 10))),
    ),
    Kind("TFRecords", _TFRECORD, (".tfrecord", ".tfrecords")),
    Kind("an SQLite database", _CONVERT, (".sqlite", ".sqlite3", ".db"), _starts(b"SQLite format 3\0")),
    Kind("an LMDB database", _CONVERT, (".mdb", ".lmdb")),
    Kind("a file of HDF5", _HDF5, (".h5", ".hdf5"), _starts(b"\x89HDF\r\n\x1a\n")),
    Kind("a file of Avro", _CONVERT, (".avro",), _starts(b"Obj\x01")),
    Kind("a file of ORC", _CONVERT, (".orc",)),
    Kind("comma-separated values", _CONVERT, (".csv",)),
    Kind("tab-separated values", _CONVERT, (".tsv",)),
    Kind("a spreadsheet", _CONVERT, (".xls", ".xlsx")),
    Kind("XML", _CONVERT, (".xml",), _starts(b"<?xml "), is_text=True),
    # A file that begins with an object is read as lines.
    Kind("JSON that is not one object per line", "convert it to JSON lines, one object per line", (".json",)),
)
# Encodings of text other than UTF-8. Ids may begin so, too.
_TEXT_KINDS = (
    Kind("text in UTF-32", "convert it to UTF-8", recognises=_starts(b"\xff\xfe\0\0", b"\0\0\xfe\xff")),
    Kind("text in UTF-16", "convert it to UTF-8", recognises=_is_utf_16),
)


def kind_of_content(head: bytes) -> Kind | None:
    """The kind by a file's first HEAD_BYTES bytes, whatever its name."""
    return next((kind for kind in KINDS if kind.recognises(head)), None)


def kind_of_lines(head: bytes) -> Kind | None:
    """The kind by the first HEAD_BYTES bytes of a file of lines, unless it is text in UTF-8."""
    return next((kind for kind in (*KINDS, *_TEXT_KINDS) if kind.recognises(head) and not kind.is_text), None)


def kind_of(path: Place, head: bytes) -> Kind | None:
    """The kind by a file's name or, if that is of no kind, by its first HEAD_BYTES bytes."""
    named = next((kind for kind in KINDS if kind.suffixes and path.name.lower().endswith(kind.suffixes)), None)
    return named or kind_of_content(head)
