"""Compressed files: every compression, with bounded memory, and all damage detected."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import re
import struct
import zlib

import numpy as np
import pytest
from column_files import check_damaged
from text_tokenizer import counts_of, save_tokenizer

from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.reading import compression

pa = pytest.importorskip("pyarrow")

CONTENT = "\n".join(str(number * number) for number in range(30_000)).encode()
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".zstd": lambda content: pa.compress(content, "zstd", asbytes=True),
    ".lz4": lambda content: pa.compress(content, "lz4", asbytes=True),
}


def test_every_compression_is_tried():
    assert set(COMPRESS) == set(compression.SUFFIXES)


def read(path) -> bytes:
    return b"".join(compression.decompressed(path, compression.compression_of(path)))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_blocks_are_bounded_and_together_all(suffix, tmp_path):
    path = tmp_path / f"a{suffix.upper()}"
    halves = CONTENT[:100_000], CONTENT[100_000:]
    for content in (COMPRESS[suffix](CONTENT), b"".join(map(COMPRESS[suffix], halves))):
        path.write_bytes(content)
        blocks = list(compression.decompressed(path, compression.compression_of(path)))
        assert b"".join(blocks) == CONTENT
        assert max(map(len, blocks)) <= 2**18
    path.write_bytes(COMPRESS[suffix](b""))
    assert read(path) == b""


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "cut at once", "changed", "followed", "none", "empty"])
def test_damage_is_an_error_that_names_the_file(suffix, damage, tmp_path):
    whole = COMPRESS[suffix](CONTENT)
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:-5],
        "cut at once": whole[:7],
        "changed": whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 8]) + whole[middle + 8 :],
        "followed": whole + b"the quick brown fox",
        "none": CONTENT,
        "empty": b"",
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damaged[damage])
    if damage == "empty" and suffix in (".gz", ".zst", ".zstd", ".lz4"):
        # For whom no member or frame is nothing; lines.py asks for the size.
        assert read(path) == b""
        return
    name = compression.SUFFIXES[suffix]
    if damage == "changed" and suffix in (".zst", ".zstd"):
        # pyarrow's frames carry no checksum, so that the change is found where it breaks what follows.
        assert read_or_none(path) != CONTENT
        return
    with pytest.raises(ValueError, match=rf"a{re.escape(suffix)}: cannot be decompressed as {name} \("):
        read(path)


def read_or_none(path):
    try:
        return read(path)
    except ValueError:
        return None


def test_streams_of_xz_may_have_padding_between_them(tmp_path):
    path = tmp_path / "a.xz"
    path.write_bytes(lzma.compress(b"ab") + bytes(2**18 + 4) + lzma.compress(b"c") + bytes(8))
    assert read(path) == b"abc"


def test_memory_that_a_file_asks_for_is_limited(tmp_path):
    xz = tmp_path / "a.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**29, "preset": 0}]
    xz.write_bytes(lzma.compress(b"ab", filters=[{**filters[0], "dict_size": 2**25}]))
    assert read(xz) == b"ab"
    # The size of the dictionary in the block's header, and that header's checksum: 2^29 bytes instead of 2^25.
    content = bytearray(xz.read_bytes())
    place = content.index(bytes([0x21, 0x01])) + 2
    content[place] = 2 * (29 - 12)
    end = 12 + 4 * (content[12] + 1) - 4
    content[end : end + 4] = struct.pack("<I", zlib.crc32(content[12:end]))
    xz.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.xz: cannot be decompressed as xz \(Memory usage limit exceeded\)"):
        read(xz)
    # A frame whose window is 2^30 bytes, of one block that is stored.
    zstd = tmp_path / "a.zst"
    zstd.write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0x00, (30 - 10) << 3]) + struct.pack("<I", 2 << 3 | 1)[:3] + b"ab")
    with pytest.raises(ValueError, match=r"a\.zst: cannot be decompressed as zstd \(.*(memory|Frame)"):
        read(zstd)
    zstd.write_bytes(zstd.read_bytes().replace(bytes([(30 - 10) << 3]), bytes([(20 - 10) << 3]), 1))
    assert read(zstd) == b"ab"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_texts_and_lines_count_as_they_do_plain(name, suffix, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json")
    texts = ["the fox", "naïve café", "日本語 🙂"] * 5
    lines = texts if name == "a.txt" else [f'{{"text": "{text}"}}' for text in texts]
    path = tmp_path / "data" / f"{name}{suffix}"
    path.parent.mkdir()
    path.write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    frequency = count_corpus([path.parent], 320, tokenizer=tokenizer)
    np.testing.assert_array_equal(frequency.counts.numpy(), counts_of(tokenizer, texts))
    path.with_name(f"b.bin{suffix}").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=rf"b\.bin{re.escape(suffix)}: is .* data, which is not read: decompress it"):
        count_corpus([path.parent], 320, tokenizer=tokenizer)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_random_damage_gives_errors_alone(suffix, tmp_path):
    generator = random.Random(suffix)
    whole = COMPRESS[suffix](CONTENT[:3000])
    path = tmp_path / f"a{suffix}"
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.choice([len(damaged), generator.randrange(len(damaged))])])
        check_damaged(lambda: read(path), str(path))
