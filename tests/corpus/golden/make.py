"""Writes the golden files of a library, which must be installed: python make.py NAME, one of KINDS."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from golden_rows import CHOSEN, LABELS, ROWS, TEXTS  # noqa: E402


def fresh(name):
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    return FOLDER / name


def columns():
    return {"input_ids": ROWS, "attention_mask": [[1] * len(row) for row in ROWS], "labels": LABELS, "text": TEXTS}


def write_datasets():
    import datasets

    dataset = datasets.Dataset.from_dict(columns())
    dataset.save_to_disk(str(fresh("hf-saved")), num_shards=2)
    dataset.select(CHOSEN).save_to_disk(str(fresh("hf-chosen")))
    splits = datasets.DatasetDict({"train": dataset.select(range(30)), "test": dataset.select(range(30, 40))})
    splits.save_to_disk(str(fresh("hf-splits")))
    cache = fresh("hf-cache")
    dataset.to_parquet(str(cache.with_name("rows.parquet")))
    loaded = datasets.load_dataset(
        "parquet", data_files=str(cache.with_name("rows.parquet")), cache_dir=str(cache / "all"), split="train"
    )
    for file in Path(loaded.cache_files[0]["filename"]).parent.iterdir():
        shutil.copy(file, cache / file.name)
    shutil.rmtree(cache / "all")
    cache.with_name("rows.parquet").unlink()


def write_datasets_indices():
    import datasets

    dataset = datasets.Dataset.from_dict(columns())
    dataset.select(CHOSEN).save_to_disk(str(fresh("hf-indices")))


def write_mds():
    from streaming import MDSWriter

    kinds = {
        "mds-bytes": ({"tokens": "bytes"}, lambda i: {"tokens": np.array(ROWS[i], np.int64).tobytes()}),
        "mds-int32": ({"tokens": "ndarray:int32"}, lambda i: {"tokens": np.array(ROWS[i], np.int32)}),
        "mds-fixed": ({"tokens": "ndarray:uint16:6"}, lambda i: {"tokens": np.arange(i, i + 6, dtype=np.uint16)}),
        "mds-columns": (
            {
                "zeta": "str",
                "input_ids": "ndarray",
                "labels": "ndarray",
                "id": "int",
                "attention": "ndarray:int8",
                "text": "str",
            },
            lambda i: {
                "zeta": "z" * i,
                "input_ids": np.array(ROWS[i], [np.uint16, np.int64][i // 20]),
                "labels": np.array(LABELS[i], np.int64),
                "id": i,
                "attention": np.ones(len(ROWS[i]), np.int8),
                "text": TEXTS[i],
            },
        ),
    }
    for name, (encodings, sample) in kinds.items():
        with MDSWriter(out=str(fresh(name)), columns=encodings, size_limit=1500) as writer:
            for i in range(len(ROWS)):
                writer.write(sample(i))
    with MDSWriter(out=str(fresh("mds-zstd")), columns={"tokens": "ndarray:int32"}, compression="zstd") as writer:
        writer.write({"tokens": np.array(ROWS[5], np.int32)})
    encodings, sample = kinds["mds-columns"]
    with MDSWriter(out=str(fresh("mds-gz")), columns=encodings, size_limit=1500, compression="gz:9") as writer:
        for i in range(len(ROWS)):
            writer.write(sample(i))


def write_litdata():
    import torch
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    def columns(i):
        return {
            "text": TEXTS[i],
            "input_ids": torch.tensor(ROWS[i], dtype=torch.int32),
            "labels": np.array(LABELS[i], np.int64),
            "grid": torch.tensor([ROWS[i]]),
            "pair": np.array([ROWS[i], ROWS[i]], np.uint16),
            "id": i,
        }

    def tokens(i):
        return torch.tensor(ROWS[i])

    kinds = {
        "litdata-columns": (columns, {}),
        "litdata-zstd-batch": (columns, {"compression": "zstd", "compression_batch_size": 16}),
        "litdata-zstd-chunk": (
            tokens,
            {"compression": "zstd", "compression_level": "chunk", "item_loader": TokensLoader()},
        ),
    }
    for name, (item, options) in kinds.items():
        writer = BinaryWriter(str(fresh(name)), chunk_bytes=4000, **options)
        for i in range(len(ROWS)):
            writer[i] = item(i)
        writer.done()
        writer.merge()


KINDS = {
    "datasets": write_datasets,
    "datasets-indices": write_datasets_indices,
    "mds": write_mds,
    "litdata": write_litdata,
}

if __name__ == "__main__":
    KINDS[sys.argv[1]]()
