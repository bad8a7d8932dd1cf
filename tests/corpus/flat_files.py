"""Writes documents of tokens in the formats with consecutive tokens."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8, "uint32": 9, "uint64": 10}
LITDATA_NUMBERS = {"uint8": 11, "int8": 12, "int16": 14, "int32": 16, "int64": 18, "uint16": 20}


def zipf_documents(vocab_size: int, dtype: str, seed: int = 0) -> list[np.ndarray]:
    """Documents of very different lengths, some empty, the first, the last and two in a row among them."""
    generator = np.random.default_rng(seed)
    lengths = [0, 3, 1, 0, 0, 70_000, 1, 1, 0, *generator.integers(1, 40, 3000), 0]
    share = 1 / np.arange(1, vocab_size + 1)
    tokens = generator.choice(vocab_size, sum(lengths), p=share / share.sum()).astype(dtype)
    return np.split(tokens, np.cumsum(lengths)[:-1])


def write_raw(folder: Path, documents: list[np.ndarray]) -> Path:
    path = folder / "raw.bin"
    np.concatenate(documents).tofile(path)
    return path


def write_llmc(folder: Path, documents: list[np.ndarray]) -> Path:
    tokens = np.concatenate(documents)
    magic, version = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[tokens.dtype.name]
    path = folder / "llmc.bin"
    path.write_bytes(llmc_header(magic, version, tokens.size) + tokens.tobytes())
    return path


def llmc_header(magic: int, version: int, tokens: int, order: str = "<") -> bytes:
    return struct.pack(f"{order}256i", magic, version, tokens, *[0] * 253)


def write_npy(folder: Path, documents: list[np.ndarray]) -> Path:
    path = folder / "tokens.npy"
    np.save(path, np.concatenate(documents))
    return path


def write_megatron(folder: Path, documents: list[np.ndarray], sequences_per_document: int = 1) -> Path:
    """Each document cut into sequences of which some are empty, too."""
    dtype = documents[0].dtype
    sequences, boundaries = [], [0]
    for document in documents:
        sequences += np.array_split(document, sequences_per_document)
        boundaries.append(len(sequences))
    np.concatenate(sequences).tofile(folder / "text_document.bin")
    (folder / "text_document.idx").write_bytes(
        megatron_index(MEGATRON_CODES[dtype.name], dtype.itemsize, list(map(len, sequences)), boundaries)
    )
    return folder / "text_document.bin"


def megatron_index(code: int, itemsize: int, lengths: list[int], boundaries: list[int]) -> bytes:
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries))
    places = np.concatenate(([0], ends))[: len(lengths)].astype("<i8")
    return b"".join(
        [header, np.array(lengths, "<i4").tobytes(), places.tobytes(), np.array(boundaries, "<i8").tobytes()]
    )


def write_fairseq(folder: Path, documents: list[np.ndarray]) -> Path:
    dtype = documents[0].dtype
    np.concatenate(documents).tofile(folder / "train.bin")
    index = fairseq_index(MEGATRON_CODES[dtype.name], dtype.itemsize, list(map(len, documents)))
    (folder / "train.idx").write_bytes(index)
    return folder / "train.bin"


def fairseq_index(code: int, itemsize: int, lengths: list[int]) -> bytes:
    whole = megatron_index(code, itemsize, lengths, [])
    # Megatron's but for the number of boundaries.
    return whole[:26] + whole[34:]


def write_datatrove(folder: Path, documents: list[np.ndarray], mask: np.ndarray | None = None) -> Path:
    path = folder / "000_shuffled.ds"
    np.concatenate(documents).tofile(path)
    np.cumsum(list(map(len, documents))).astype("<u8").tofile(folder / "000_shuffled.ds.index")
    if mask is not None:
        mask.astype(np.uint8).tofile(folder / "000_shuffled.ds.loss")
    return path


def write_litdata(folder: Path, documents: list[np.ndarray], chunks: int = 3, **config: object) -> Path:
    """The documents over some chunks; the folder that holds them."""
    folder = folder / "optimized"
    folder.mkdir()
    listed = []
    for number, items in enumerate(np.array_split(np.array(documents, object), chunks)):
        body = b"".join(item.tobytes() for item in items)
        first = 4 * (len(items) + 2)
        offsets = first + np.cumsum([0, *(item.nbytes for item in items)])
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(np.array([len(items), *offsets], "<u4").tobytes() + body)
        # As litdata has it: none where the first item is empty.
        tokens = sum(map(len, items)) if len(items[0]) else None
        listed.append({"chunk_bytes": len(body), "chunk_size": len(items), "dim": tokens, "filename": name})
    config = {
        "compression": None,
        "chunk_size": None,
        "chunk_bytes": 2**26,
        "data_format": [f"no_header_tensor:{LITDATA_NUMBERS[documents[0].dtype.name]}"],
        "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]',
        **config,
    }
    (folder / "index.json").write_text(json.dumps({"chunks": listed, "config": config}, sort_keys=True))
    return folder
