"""The memory of a count, for any size of the corpus."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import fresh_python
import numpy as np
import pytest

from pdl_ext import TokenFrequency

pytestmark = [
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="a process' private memory is read from Linux' /proc"
    ),
    pytest.mark.serial,
    pytest.mark.slow,
]
VOCAB = 50257


def private_peak(folder: Path, name: str, tokens: int | None = None, *options: str) -> int:
    """The most bytes that a count over two threads had of its own: all but the files that libraries are mapped from.

    tokens: how many it has to count; None: some.
    """
    output = folder / f"{name}.safetensors"
    command = ["-m", "pdl_ext.cli", "count", name, "-o", str(output), "--vocab-size", str(VOCAB)]
    peak = 0
    command += ["--threads", "2", *options]
    with fresh_python.popen(*command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as count:
        while count.poll() is None:
            for line in Path(f"/proc/{count.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.005)
        assert count.returncode == 0, count.stderr.read().decode()
    total = TokenFrequency.load(output).total
    assert total == tokens if tokens is not None else total > 0
    assert peak > 0
    return peak


def check(small: int, large: int) -> None:
    assert large - small < 24e6
    assert large < 256e6


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
def test_of_flat_files(tmp_path, name):
    def peak(tokens):
        header = io.BytesIO()
        if name == "a.npy":
            np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
        with open(tmp_path / name, "wb") as file:
            file.write(header.getvalue())
            # Holes, which are read as zeros.
            file.truncate(len(header.getvalue()) + 2 * tokens)
        return private_peak(tmp_path, name, tokens, *(["--dtype", "uint16"] if name == "a.bin" else []))

    # The largest is twice what memory may be, and each of two threads has more than one part of it.
    check(peak(1000), peak(2**28))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_of_columns(tmp_path, name):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    # What pyarrow makes of them by itself: pages of 4 MB in Parquet, and here record batches of the same size.
    rows, length = 4096, 2048
    ids = np.random.default_rng(0).integers(0, VOCAB, rows * length, np.uint16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(ids), length).cast(pa.list_(pa.uint16()))
    table = pa.table({"input_ids": lists})

    def peak(times):
        if name == "a.parquet":
            with parquet.ParquetWriter(tmp_path / name, table.schema) as writer:
                for _ in range(times):
                    writer.write_table(table)
        else:
            with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
                for _ in range(times):
                    writer.write_table(table, max_chunksize=1024)
        return private_peak(tmp_path, name, times * ids.size)

    # 67 MB are two parts, and three times as much is eight times what may be added.
    check(peak(4), peak(12))


def test_of_text(tmp_path):
    text_tokenizer = pytest.importorskip("text_tokenizer")
    text_tokenizer.save_tokenizer(tmp_path / "tokenizer.json")
    # Long ones, in which a thread's share of what is encoded at once is two.
    sentence = text_tokenizer.TRAINED_ON[0] + " "
    text = sentence * (50_000 // len(sentence)) + "\n"

    def peak(times):
        (tmp_path / "a.txt").write_text(text * times)
        return private_peak(tmp_path, "a.txt", None, "--tokenizer", "tokenizer.json")

    # A token takes more bytes while it is encoded than its text has.
    check(peak(60), peak(240))
