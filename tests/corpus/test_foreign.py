"""Unsupported kinds of files: the error names the kind, whatever the file's name, and says what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import re
import sqlite3
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from flat_files import write_datatrove, write_litdata, write_llmc, write_megatron, write_npy
from safetensors.torch import save
from test_arrow import write as write_arrow
from test_mds import write_tokens as write_mds
from test_parquet import write as write_parquet
from text_tokenizer import save_tokenizer

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.reading import foreign

V = 65536
IDS = np.arange(400, dtype=np.uint16)


def _sqlite(folder):
    with sqlite3.connect(folder / "made") as connection:
        connection.execute("create table tokens (id integer)")
    connection.close()
    return (folder / "made").read_bytes()


def _zip(folder):
    with zipfile.ZipFile(folder / "made", "w") as file:
        file.writestr("tokens", bytes(20))
    return (folder / "made").read_bytes()


def _tar(folder):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("tokens"))
    return buffer.getvalue()


def _torch(folder, **options):
    torch.save(torch.arange(9), folder / "made", **options)
    return (folder / "made").read_bytes()


def _zstd(folder):
    pa = pytest.importorskip("pyarrow")
    return pa.compress(IDS.tobytes(), "zstd", asbytes=True)


def _lz4(folder):
    pa = pytest.importorskip("pyarrow")
    return pa.compress(IDS.tobytes(), "lz4", asbytes=True)


# By what the error calls them; as their own programs write them, or of no more than what they begin with.
CONTENTS = {
    "a chunk of lit-gpt's PackedDataset": lambda _: b"LITPKDS" + struct.pack("<QBQ", 1, 8, 400) + IDS.tobytes(),
    "a pointer of Git LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "a page of HTML": lambda _: b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "gzip data": lambda _: gzip.compress(IDS.tobytes()),
    "zstd data": _zstd,
    "bzip2 data": lambda _: bz2.compress(IDS.tobytes()),
    "xz data": lambda _: lzma.compress(IDS.tobytes()),
    "LZ4 data": _lz4,
    "snappy data": lambda _: b"\xff\x06\0\0sNaPpY" + bytes(8),
    "a file of PyTorch before 1.6": lambda folder: _torch(folder, _use_new_zipfile_serialization=False),
    "a zip archive": _zip,
    "a 7z archive": lambda _: b"7z\xbc\xaf\x27\x1c" + bytes(26),
    "a tar archive, as WebDataset's are": _tar,
    "a pickle": lambda _: pickle.dumps({"tokens": IDS}, 5),
    "a file of safetensors": lambda _: save({"tokens": torch.arange(9)}),
    "a model in GGUF": lambda _: b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    "an SQLite database": _sqlite,
    "a file of HDF5": lambda _: b"\x89HDF\r\n\x1a\n" + bytes(40),
    "a file of Avro": lambda _: b"Obj\x01" + bytes(40),
    "XML": lambda _: b'<?xml version="1.0"?><tokens/>',
}


def test_every_kind_is_tried():
    told = {kind.name for kind in foreign.KINDS if kind.recognises is not foreign.Kind._field_defaults["recognises"]}
    assert told == set(CONTENTS)


@pytest.mark.parametrize("suffix", [".bin", ".npy", ".dat", ""])
@pytest.mark.parametrize("name", CONTENTS)
def test_contents_are_called_by_their_names(name, suffix, tmp_path):
    content = CONTENTS[name](tmp_path)
    data = tmp_path / "data" / f"a{suffix}"
    data.parent.mkdir()
    data.write_bytes(content + bytes(len(content) % 2))
    does = "begins like {}, expected ids: " if suffix in (".bin", ".npy") else "is {}, which is not read: "
    for path in (data, data.parent):
        with pytest.raises(ValueError, match=rf"a{suffix}: {re.escape(does.format(name))}\w+"):
            count_corpus([path], V, dtype="uint16")


@pytest.mark.parametrize("name", CONTENTS)
def test_as_raw_ids_they_are_warned_of(name, tmp_path):
    content = CONTENTS[name](tmp_path)
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.warns(UserWarning, match=rf"a\.bin: begins like {re.escape(name)}, and all of it is counted as ids"):
        assert count_corpus([tmp_path / "a.bin"], 256, format="raw", dtype="uint8").total == len(content)
    with pytest.raises(ValueError, match=rf"a\.bin: begins like {re.escape(name)}"):
        count_corpus([tmp_path / "a.bin"], 256, format="raw", dtype="uint8", strict=True)


@pytest.mark.parametrize(
    ("name", "suffix"), [(kind.name, suffix) for kind in foreign.KINDS for suffix in kind.suffixes]
)
def test_names_are_called_by_their_kinds(name, suffix, tmp_path):
    for path in (tmp_path / f"a{suffix}", tmp_path / f"A{suffix.upper()}"):
        path.write_bytes(b"[[1, 2], [3]]")
        with pytest.raises(ValueError, match=rf"(?i)a{suffix}: is {re.escape(name)}, which is not read: \w+"):
            count_corpus([path], V, dtype="uint16")


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".ndjson", ".anything"])
@pytest.mark.parametrize(
    ("called", "content"),
    [
        *((name, content) for name, content in CONTENTS.items() if name not in ("a page of HTML", "XML")),
        *(
            (f"text in {encoding[:3].upper()}-{encoding[4:6]}", lambda _, encoding=encoding: "ab\ncü".encode(encoding))
            for encoding in ("utf-16", "utf-32")
        ),
        ("text in UTF-16", lambda _: "a line\nand ü".encode("utf-16-le")),
        ("text in UTF-16", lambda _: "a line\nand ü".encode("utf-16-be")),
    ],
)
def test_lines_are_called_by_what_they_are(called, content, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content(tmp_path))
    format = {".anything": "jsonl"}.get(suffix)
    with pytest.raises(ValueError, match=rf"a{suffix}: is {re.escape(called)}, expected text in UTF-8: \w+"):
        count_corpus([path], 320, format=format, tokenizer=save_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_compressed_lines_are_called_by_what_they_are(encoding, tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("a line\nand".encode(encoding)))
    with pytest.raises(ValueError, match=rf"a\.txt\.gz: is text in {encoding[:6].upper()}, expected text in UTF-8"):
        count_corpus([tmp_path], 320, tokenizer=save_tokenizer(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    "text", ["<!DOCTYPE html>\n<p>", "<?xml ?>\n", "GGUF is a format", "LITPKDS begins", "BZh9 compresses", "version h"]
)
def test_texts_may_begin_with_names_of_formats(text, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    assert count_corpus([tmp_path / "a.txt"], 320, tokenizer=tokenizer).tokens_seen


@pytest.mark.parametrize("name", ["a.jsonl.zstd", "A.JSONL.ZSTD", "a.ndjson.zst", "a.json.zstd"])
def test_zstd_by_its_other_suffix(name, tmp_path):
    pa = pytest.importorskip("pyarrow")
    lines = json.dumps({"input_ids": [1, 2, 3]}).encode()
    (tmp_path / name).write_bytes(pa.compress(lines, "zstd", asbytes=True))
    assert count_corpus([tmp_path], V).total == 3


@pytest.mark.parametrize("named", ["file", "folder"])
def test_chunks_of_litdata_without_their_index(named, tmp_path):
    folder = write_litdata(tmp_path, [np.arange(n, dtype=np.int32) for n in (100, 0, 60)], chunks=1)
    (folder / "index.json").unlink()
    chunk = folder / "chunk-0-0.bin"
    with pytest.raises(ValueError, match=r"index\.json: is missing, expected it beside litdata's chunk chunk-0-0\.bin"):
        count_corpus([chunk if named == "file" else folder], V, dtype="int32")
    with pytest.warns(
        UserWarning, match=r"chunk-0-0\.bin: is of format litdata, and all of it is counted as ids of int32"
    ):
        assert count_corpus([chunk], V, dtype="int32", format="raw").tokens_seen == 160 + 5
    (folder / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: is damaged or not an index of litdata"):
        count_corpus([chunk], V, dtype="int32")
    # Of one byte more or less it has not the header.
    chunk.write_bytes(chunk.read_bytes() + bytes(4))
    assert count_corpus([chunk], V, dtype="int32").tokens_seen == 160 + 5 + 1


@pytest.mark.parametrize("name", ["npy", "llmc", "mds", "parquet", "arrow"])
def test_headers_of_the_formats_are_warned_of_as_raw_ids(name, tmp_path):
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    write = {
        "npy": write_npy,
        "llmc": write_llmc,
        "mds": lambda folder, rows: write_mds(folder / "a", rows) / "shard.00000.mds",
        "parquet": lambda folder, rows: write_parquet(folder / "a.parquet", rows),
        "arrow": lambda folder, rows: write_arrow(folder / "a.arrow", rows, "stream", 10),
    }[name]
    path = write(tmp_path, [IDS, IDS[:7]])
    options = {"format": "raw", "dtype": "uint8"}
    with pytest.warns(
        UserWarning, match=rf"{path.name}: is of format {name}, and all of it is counted as ids of uint8"
    ):
        count_corpus([path], 256, **options)
    with pytest.raises(ValueError, match=rf"{path.name}: is of format {name}"):
        count_corpus([path], 256, strict=True, **options)


@pytest.mark.parametrize("write", [write_megatron, write_datatrove])
def test_tokens_without_a_header_are_raw_ids_as_good(write, tmp_path):
    path = write(tmp_path, [IDS, IDS[:7]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_corpus([path], V, format="raw", dtype="uint16").total == 407


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("seed", range(20))
def test_ids_are_not_taken_for_another_kind(dtype, seed, tmp_path):
    generator = np.random.default_rng(seed)
    high = int(generator.choice([3, 300, 50257, 65536]))
    generator.integers(0, high, int(generator.integers(1, 3000))).astype(dtype).tofile(tmp_path / "a.bin")
    head = (tmp_path / "a.bin").read_bytes()[: foreign.HEAD_BYTES]
    assert foreign.kind_of_content(head) is None
    assert count_corpus([tmp_path / "a.bin"], V, dtype=dtype).tokens_seen


def test_an_object_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"input_ids": [1, 2]}, indent=1))
    with pytest.raises(
        ValueError, match=r"a\.json: line 1 \(byte 0\): is not a line of JSON .*, expected one object per line"
    ):
        count_corpus([tmp_path / "a.json"], V)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint32"])
@pytest.mark.parametrize("second", [b'{"', b"{}"])
def test_ids_may_have_the_bytes_that_safetensors_begin_with(dtype, second, tmp_path):
    """Of int64 one in V files has such a second id, since the upper halves are 0."""
    ids = np.random.default_rng(0).integers(0, 50257, 5000).astype(dtype)
    place = 8 // ids.itemsize
    ids[place] = int.from_bytes(second, "little")
    ids[1:place] = 0
    ids.tofile(tmp_path / "a.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frequency = count_corpus([tmp_path / "a.bin"], 50257, dtype=dtype, strict=True)
        count_corpus([tmp_path / "a.bin"], 50257, dtype=dtype, format="raw", strict=True)
    assert frequency.total == 5000


def _of_tar(path):
    with tarfile.open(path, "w") as tar:
        for number, (name, content) in enumerate(
            [("json", json.dumps({"input_ids": [1, 2, 2]})), ("txt", "a"), ("json", '{"input_ids": [5]}')]
        ):
            member = tarfile.TarInfo(f"{number:06}.{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))


# What each is made by, and how the line finds it.
IN_PYTHON = {
    "a.tar": (_of_tar, lambda path: {"json": json, "tar": tarfile.TarFile(path)}),
    "a.bin": (
        lambda path: path.write_bytes(
            b"LITPKDS" + struct.pack("<QBQ", 1, 8, 400) + np.array([1, 2, 2, 5], "<u2").tobytes()
        ),
        lambda path: {"numpy": np, "dtype": "uint16"},
    ),
    "a.pt": (
        lambda path: torch.save(torch.tensor([1, 2, 2, 5]), path, _use_new_zipfile_serialization=False),
        lambda path: {"torch": torch},
    ),
    "a.tfrecord": (
        lambda path: path.write_bytes(bytes(16)),
        lambda path: {"tfrecord": TfRecord},
    ),
    "a.h5": (lambda path: path.write_bytes(b"x"), lambda path: {"h5py": H5py}),
}


class TfRecord:
    """The package's own function, as its documentation has it."""

    @staticmethod
    def tfrecord_loader(data_path, index_path):
        yield from ({"input_ids": np.array(ids)} for ids in ([1, 2, 2], [5]))


class H5py:
    @staticmethod
    def File(path):
        return {"input_ids": np.array([1, 2, 2, 5])}


@pytest.mark.parametrize("name", IN_PYTHON)
def test_the_line_of_python_that_counts_it(name, tmp_path):
    path = tmp_path / name
    make, names = IN_PYTHON[name]
    make(path)
    with pytest.raises(ValueError, match="count it in Python: ") as caught:
        count_corpus([path], V, dtype="uint16")
    line = str(caught.value).partition("count it in Python: ")[2]
    (expression,) = re.findall(r"count_corpus\(.*, vocab_size\)", line)
    frequency = eval(expression, {"count_corpus": count_corpus, "path": path, "vocab_size": V, **names(path)})
    assert frequency.counts[:6].tolist() == [0, 1, 2, 0, 0, 1]
