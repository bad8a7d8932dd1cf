"""Counting files, beside counting in memory, NumPy, DuckDB, Polars, decoding alone, and the standard library.

    python benchmarks/corpus.py [--bytes N] [--folder DIR] [--output DIR]

Writes Zipf-distributed uint16 ids in several formats into a folder that it deletes afterwards. Counts each by
`count_corpus` while it is in the page cache. Leaves OUTPUT/benchmark.json and benchmark.md by harness.py. A time is
valid if all counts equal NumPy's. DuckDB and Polars take part if they are installed, with as many threads as PyTorch
has. They read Parquet; for ids without a format they count an Arrow array in memory, which they do not copy.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import importlib.util
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from harness import Group, Provider, Workload
from workloads import failures

from pdl_ext import TokenFrequency
from pdl_ext.corpus import count_corpus

VOCAB_SIZE = 50257
PROTOCOL = harness.Protocol(warm_up=0.0, least_rounds=9, most_rounds=9)
# The ids of a row of the columns, and the rows of a row group.
LENGTH, ROWS = 2048, 4096


def zipf(tokens: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Ids whose frequency is proportional to one over their rank, as `workloads.zipf_ids` makes them."""
    uniform = np.random.default_rng(0).random(tokens, np.float32)
    return np.minimum(np.exp(uniform * np.log(VOCAB_SIZE)) - 1, VOCAB_SIZE - 1).astype(np.uint16)


def write_megatron(folder: Path, ids: np.ndarray[Any, np.dtype[np.uint16]]) -> Path:
    """Writes consecutive documents of LENGTH tokens, as Megatron's preprocessing does."""
    documents = -(-ids.size // LENGTH)
    lengths = np.full(documents, LENGTH, np.int32)
    lengths[-1] = ids.size - LENGTH * (documents - 1)
    pointers = 2 * LENGTH * np.arange(documents, dtype=np.int64)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1)
    index = folder / "megatron.idx"
    index.write_bytes(header + lengths.tobytes() + pointers.tobytes() + np.arange(documents + 1).tobytes())
    ids.tofile(folder / "megatron.bin")
    return index


def write_parquet(folder: Path, ids: np.ndarray[Any, np.dtype[np.uint16]]) -> Path:
    """Writes lists of LENGTH tokens, ROWS of them a row group, as pyarrow does by default."""
    import pyarrow as pa
    import pyarrow.parquet

    path = folder / "ids.parquet"
    values = pa.array(ids[: ids.size // LENGTH * LENGTH])
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(values, LENGTH).cast(pa.list_(pa.uint16()))})
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS)
    return path


def decode_parquet(path: Path) -> int:
    """Decodes all row groups without counting, with as many threads as PyTorch has, in batches that fit into caches."""
    import pyarrow.parquet

    groups = pyarrow.parquet.ParquetFile(path).num_row_groups

    def decode(first: int) -> int:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)
        rows = 0
        for group in range(first, groups, torch.get_num_threads()):
            for batch in file.iter_batches(256, row_groups=[group], columns=["input_ids"], use_threads=False):
                rows += batch.num_rows
        return rows

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return sum(pool.map(decode, range(torch.get_num_threads())))


def read_parquet(path: Path) -> int:
    """The whole column, as users of pyarrow read it."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path, columns=["input_ids"]).num_rows


def stream_parquet(path: Path) -> int:
    """The column one record batch at a time, as users of pyarrow read files larger than memory."""
    import pyarrow.parquet

    return sum(batch.num_rows for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["input_ids"]))


def _dense(tokens: Any, counts: Any) -> torch.Tensor:
    found = torch.zeros(VOCAB_SIZE, dtype=torch.int64)
    found[torch.from_numpy(np.asarray(tokens, np.int64))] = torch.from_numpy(np.asarray(counts, np.int64))
    return found


def _arrow_table(ids: Any) -> Any:
    import pyarrow as pa

    return pa.table({"token": pa.array(ids)})


def count_by_duckdb(ids: Any = None, path: Path | None = None) -> Callable[[int], torch.Tensor]:
    """Counts the ids of an array, or those of a Parquet file."""
    import duckdb

    connection = duckdb.connect()
    connection.execute(f"SET threads = {torch.get_num_threads()}")
    # 16 bits and NULL: DuckDB then finds groups by value instead of a hash, which is several times as fast.
    connection.execute("SET perfect_ht_threshold = 17")
    if path is None:
        connection.register("ids", _arrow_table(ids))
    source = "ids" if path is None else "(SELECT unnest(input_ids) AS token FROM read_parquet(?))"
    query, parameters = f"SELECT token, count(*) AS n FROM {source} GROUP BY token", [] if path is None else [str(path)]

    def count(_: int) -> torch.Tensor:
        found = connection.execute(query, parameters).fetchnumpy()
        return _dense(found["token"], found["n"])

    return count


def count_by_polars(ids: Any = None, path: Path | None = None) -> Callable[[int], torch.Tensor]:
    """As `count_by_duckdb`. No other way of Polars was faster in our trials: its other engine, `value_counts`."""
    os.environ.setdefault("POLARS_MAX_THREADS", str(torch.get_num_threads()))
    import polars

    if path is None:
        tokens = polars.from_arrow(_arrow_table(ids)).lazy()
    else:
        tokens = polars.scan_parquet(path).select(polars.col("input_ids").explode().alias("token"))
    query = tokens.group_by("token").len()

    def count(_: int) -> torch.Tensor:
        found = query.collect(engine="streaming")
        return _dense(found["token"].to_numpy(), found["len"].to_numpy())

    return count


PEERS = {"DuckDB": ("duckdb", count_by_duckdb), "Polars": ("polars", count_by_polars)}


def _peers(what: str, error: Callable[[Any], float], **source: Any) -> list[Provider]:
    return [
        Provider(f"{name}, {what}", count(**source), error)
        for name, (module, count) in PEERS.items()
        if importlib.util.find_spec(module) is not None
    ]


def groups(folder: Path, size: int) -> list[Group]:
    """The workloads for files of `size` bytes."""

    def error_from(truth: torch.Tensor) -> Callable[[Any], float]:
        def error(counts: Any) -> float:
            return 0.0 if torch.equal(torch.as_tensor(counts), truth) else 1.0

        return error

    def counted(path: Path, **options: Any) -> Callable[[int], torch.Tensor]:
        return lambda _: count_corpus([path], VOCAB_SIZE, **options).counts

    def flat() -> Iterator[Workload]:
        ids = zipf(size // 2)
        truth = torch.from_numpy(np.bincount(ids, minlength=VOCAB_SIZE))
        raw, npy = folder / "ids.bin", folder / "ids.npy"
        ids.tofile(raw)
        np.save(npy, ids)
        megatron = write_megatron(folder, ids)
        resident = torch.from_numpy(ids)

        def in_memory(_: int) -> torch.Tensor:
            frequency = TokenFrequency(VOCAB_SIZE)
            frequency.update(resident)
            return frequency.counts

        def mapped(_: int) -> Any:
            return np.bincount(np.memmap(raw, np.uint16, "r"), minlength=VOCAB_SIZE)

        error = error_from(truth)
        providers = [
            Provider("pdl_ext, raw", counted(raw, dtype="uint16"), error),
            Provider("in memory", in_memory, error, note="TokenFrequency.update"),
            Provider("pdl_ext, npy", counted(npy), error),
            Provider("pdl_ext, Megatron", counted(megatron), error),
            Provider("np.bincount of a mapped file", mapped, error),
            *_peers("in memory", error, ids=ids),
        ]
        yield Workload(f"{size / 1e9:g} GB of uint16, V {VOCAB_SIZE}", providers, 0.0, size, items=ids.size)
        part = ids[: size // 64]
        raw_part = folder / "part.bin"
        part.tofile(raw_part)

        def by_counter(_: int) -> list[int]:
            counter = collections.Counter(np.memmap(raw_part, np.uint16, "r").tolist())
            return [counter[token] for token in range(VOCAB_SIZE)]

        error = error_from(torch.from_numpy(np.bincount(part, minlength=VOCAB_SIZE)))
        providers = [
            Provider("pdl_ext, raw", counted(raw_part, dtype="uint16"), error),
            Provider("collections.Counter", by_counter, error),
        ]
        name = f"{part.nbytes / 1e6:g} MB of uint16, V {VOCAB_SIZE}"
        yield Workload(name, providers, 0.0, part.nbytes, items=part.size)
        for path in (raw, npy, megatron.with_suffix(".bin"), raw_part):
            path.unlink()

    def columns() -> Iterator[Workload]:
        ids = zipf(size // 8)
        path = write_parquet(folder, ids)
        ids = ids[: ids.size // LENGTH * LENGTH]
        rows = ids.size // LENGTH
        error = error_from(torch.from_numpy(np.bincount(ids, minlength=VOCAB_SIZE)))
        providers = [
            Provider("pdl_ext, Parquet", counted(path), error),
            *_peers("Parquet", error, path=path),
            Provider("pyarrow, read_table alone", lambda _: read_parquet(path), lambda got: float(got != rows)),
            Provider("pyarrow, iter_batches alone", lambda _: stream_parquet(path), lambda got: float(got != rows)),
            Provider("pyarrow, by our threads alone", lambda _: decode_parquet(path), lambda got: float(got != rows)),
        ]
        name = f"Parquet, {ids.size / 1e6:.0f} M ids, V {VOCAB_SIZE}"
        yield Workload(name, providers, 0.0, path.stat().st_size, items=ids.size)
        path.unlink()

    return [Group("flat files", flat), Group("columns", columns)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=2 * 10**9, metavar="N", help="of the raw file; default: 2 GB")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where files are written; default: the system's")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/corpus-DEVICE-DATE")
    options = parser.parse_args()
    clock = harness.HostClock()
    about = harness.machine(clock.device)
    about |= {name: harness.version_of(module, module) for name, (module, _) in PEERS.items()}
    folder = options.output or harness.results_folder("corpus", about)
    report = harness.Report(folder, "pdl_ext: counting files", about, PROTOCOL, kernel_times=False)
    with tempfile.TemporaryDirectory(dir=options.folder) as files:
        harness.run(groups(Path(files), options.bytes), clock, report, float("inf"), 2**28)
    broken = failures(report)
    print("\n".join([f"written to {report.folder}", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
