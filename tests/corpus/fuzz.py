"""Feeds the corpus readers damaged files, guided by coverage: only ValueError and warnings may come out.

    python tests/corpus/fuzz.py [SECONDS]        needs `pip install atheris`; default: 600 seconds

An input is a number that selects one of the files below, and its new content; the files beside it stay intact.
libFuzzer writes each finding (an exception, 2 GiB of memory, 20 seconds) to a file. With this file as the only argument
it is run again.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["pdl_ext"]):
    from pdl_ext.corpus import TargetPolicy, count_corpus

import flat_files
import pyarrow as pa
import pyarrow.parquet
import safetensors.numpy
import torch
from chat_tokenizer import save_chat_tokenizer
from text_tokenizer import save_tokenizer

GOLDEN = Path(__file__).parent / "golden"
VOCAB_SIZE = 512


def write_files(folder: Path) -> list[Path]:
    """A file of each kind that a reader looks into, each in a folder of its own."""
    documents = [np.array(document, np.uint16) for document in ([5, 1, 2], [7], [1, 1, 9, 300, 2], [4, 4])]
    files = []

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    files.append(flat_files.write_llmc(new("llmc"), documents))
    files.append(flat_files.write_npy(new("npy"), documents))
    files.append(flat_files.write_megatron(new("megatron"), documents).with_suffix(".idx"))
    files.append(flat_files.write_fairseq(new("fairseq"), documents).with_suffix(".idx"))
    for golden, name in [
        ("datatrove-uint16", "*.index"),
        ("litdata-tensors", "*.bin"),
        ("litdata-tensors", "index.json"),
        ("hf-saved", "state.json"),
        ("hf-saved", "data-00000*.arrow"),
        ("hf-indices", "indices.arrow"),
        ("mds-columns", "shard*.mds"),
        ("mds-columns", "index.json"),
        ("mds-gz", "shard*.gz"),
        ("litdata-columns", "*.bin"),
        ("litdata-columns", "index.json"),
        ("litdata-zstd-batch", "*.bin"),
        ("litdata-zstd-chunk", "*.bin"),
    ]:
        copy = folder / f"{golden}-{len(files)}"
        shutil.copytree(GOLDEN / golden, copy)
        files.append(next(copy.glob(name)))
    table = pa.table({"input_ids": [document.tolist() for document in documents], "text": ["a", "the fox", "", "é"]})
    pyarrow.parquet.write_table(table, new("parquet") / "a.parquet", row_group_size=2)
    with pa.OSFile(str(new("arrow") / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, 2)
    chat = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "é"}]
    said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "the fox"}]
    chats = [{"messages": chat, "tools": []}, {"conversations": said}, {"prompt": chat[:1], "completion": chat[1:]}]
    ids = np.concatenate(documents).reshape(1, -1)
    np.savez(new("npz") / "a.npz", tokens=ids)
    np.savez_compressed(new("deflated") / "b.npz", tokens=ids)
    safetensors.numpy.save_file({"tokens": ids, "others": np.ones(3)}, new("safetensors") / "a.safetensors")
    torch.save({"tokens": torch.from_numpy(ids)}, new("torch") / "a.pt")
    files += [folder / name for name in ("npz/a.npz", "deflated/b.npz", "safetensors/a.safetensors", "torch/a.pt")]
    lines = b'{"text": "the fox"}\n{"input_ids": [1, 2]}\n'
    for name, content in [
        ("a.txt", "the quick fox\r\n\né\n".encode()),
        ("a.txt.gz", gzip.compress(b"the fox\n")),
        ("a.txt.zst", pa.compress(b"the fox\n", "zstd", asbytes=True)),
        ("a.txt.bz2", bz2.compress(b"the fox\n")),
        ("a.txt.xz", lzma.compress(b"the fox\n")),
        ("a.txt.lz4", pa.compress(b"the fox\n", "lz4", asbytes=True)),
        ("a.jsonl", lines),
        ("chats.jsonl", "".join(json.dumps(row) + "\n" for row in chats).encode()),
    ]:
        (new(name) / name).write_bytes(content)
        files.append(folder / name / name)
    return files + [folder / name for name in ("parquet/a.parquet", "arrow/a.arrow")]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work, seeds = Path(folder) / "work", Path(folder) / "seeds"
        work.mkdir()
        seeds.mkdir()
        files = write_files(work)
        of_texts = save_tokenizer(Path(folder) / "tokenizer.json")
        of_chats = save_chat_tokenizer(Path(folder) / "tokenizer")
        for number, file in enumerate(files):
            (seeds / str(number)).write_bytes(bytes([number]) + file.read_bytes())

        def one_input(data: bytes) -> None:
            if not data:
                return
            file = files[data[0] % len(files)]
            whole = file.read_bytes()
            file.write_bytes(data[1:])
            is_odd = bool(data[0] & 128)
            policy, tokenizer = TargetPolicy(targets="shifted" if is_odd else "all"), of_texts
            if file.name == "chats.jsonl":
                policy, tokenizer = TargetPolicy(learn="assistant" if is_odd else "all"), of_chats
            try:
                count_corpus(
                    [file.parent], VOCAB_SIZE, policy=policy, tokenizer=tokenizer, threads=1, allow_overlap=True
                )
            except ValueError:
                pass
            finally:
                file.write_bytes(whole)

        warnings.simplefilter("ignore")
        # A number is for how long, anything else is libFuzzer's.
        arguments = sys.argv[1:] or ["600"]
        if len(arguments) == 1 and arguments[0].isdecimal():
            arguments = [f"-max_total_time={arguments[0]}", "-max_len=20000", str(seeds)]
        limits = ["-rss_limit_mb=2048", "-timeout=20"]
        atheris.Setup([sys.argv[0], *limits, *arguments], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
