"""Files of named arrays, .npz, .safetensors and torch.save's: counted like the arrays, without running code."""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from column_files import VOCAB, assert_counts, check_damaged, count, sequences

from pdl_ext import TokenFrequency
from pdl_ext.corpus import count_corpus
from pdl_ext.corpus.counting import preview_corpus
from pdl_ext.corpus.formats import npz

IDS = np.random.default_rng(0).integers(0, VOCAB, (30, 7)).astype(np.int32)
OTHERS = {"weights": np.ones((2, 3), np.float32), "vocab_size": np.array(VOCAB)}


def save_npz(path, arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def save_compressed(path, arrays):
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def save_safetensors(path, arrays):
    safetensors.numpy.save_file({name: np.array(array, order="C") for name, array in arrays.items()}, path)


def save_torch(path, arrays):
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


SAVE = {
    "a.npz": save_npz,
    "b.npz": save_compressed,
    "a.safetensors": save_safetensors,
    "a.pt": save_torch,
    "a.bin": save_torch,
    "a.pth": save_torch,
}


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("name", SAVE)
def test_the_usual_name_among_others(name, dtype, tmp_path):
    ids = (IDS % 120).astype(dtype)
    SAVE[name](tmp_path / name, {**OTHERS, "input_ids": ids, "z": ids[:3]})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot hold ids")
        for data in (tmp_path, tmp_path / name):
            assert_counts(count(data), ids.reshape(-1).astype(np.int64), ids.size)
            shifted = count(data, targets="shifted")
            assert_counts(shifted, ids[:, 1:].reshape(-1).astype(np.int64), ids.size)
    (shard,) = shifted.provenance.shards
    assert (shard.format, shard.dtype) == (
        {".npz": "npz", ".safetensors": "safetensors"}.get(os.path.splitext(name)[1], "torch"),
        dtype,
    )


@pytest.mark.parametrize("name", SAVE)
def test_one_array_or_the_one_that_is_named(name, tmp_path):
    path = tmp_path / name
    SAVE[name](path, {"ids": IDS[0], "vocab_size": OTHERS["vocab_size"]})
    assert_counts(count(path, targets="shifted"), IDS[0, 1:], 7)
    SAVE[name](path, {"train": IDS[:4], "test": IDS[4:], **OTHERS})
    assert_counts(count(path, column="train"), IDS[:4].reshape(-1), 28)
    for column, message in [
        (None, r"got the arrays .*, expected one of integers in one axis or more. Name it with --column"),
        (
            "vocab_size",
            r"(got the arrays .*, expected 'vocab_size' of integers in one axis or more|vocab_size.* with 0 axes)",
        ),
        ("weights", r"weights.*(float32|F32)"),
        ("no", "got the arrays .*, expected 'no' of integers in one axis or more. Name it with --column"),
    ]:
        with pytest.raises(ValueError, match=rf"{name}: .*{message}|{name}.*{message}"):
            count(path, column=column)
    for option in ("mask", "skip_prompt"):
        with pytest.raises(ValueError, match=rf"{name}: got {option} 'm', expected None"):
            count(path, column="train", **{option: "m"})
    with pytest.raises(ValueError, match=rf"{name}: got dtype uint16, expected int32, which the file states"):
        count(path, column="train", dtype="uint16")


def test_several_parts_of_a_tensor_of_safetensors(tmp_path, monkeypatch):
    from pdl_ext.corpus import counting

    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 90)
    save_safetensors(tmp_path / "a.safetensors", {"a": OTHERS["weights"], "tokens": IDS, "z": OTHERS["weights"]})
    frequency = count_corpus([tmp_path], VOCAB, threads=3)
    assert_counts(frequency, IDS.reshape(-1), IDS.size)


@pytest.mark.parametrize("size", [3, 64])
def test_pieces_of_an_npz(tmp_path, monkeypatch, size):
    monkeypatch.setattr(npz, "_PIECE_BYTES", 4 * size)
    save_compressed(tmp_path / "a.npz", {"tokens": IDS})
    assert_counts(count(tmp_path / "a.npz", targets="shifted"), IDS[:, 1:].reshape(-1), IDS.size)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_of_tensors(tmp_path, kind):
    rows = [row for row in sequences(9) if row.size]
    torch.save(kind(map(torch.from_numpy, rows)), tmp_path / "a.pt")
    kept = np.concatenate([row[1:] for row in rows])
    assert_counts(count(tmp_path / "a.pt", targets="shifted"), kept, sum(row.size for row in rows))
    torch.save([torch.arange(3), "text"], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 1 is a str, expected a tensor of integers"):
        count(tmp_path / "a.pt")


def test_a_tensor_alone_and_one_that_is_a_view(tmp_path):
    for tensor in (torch.from_numpy(IDS), torch.from_numpy(IDS).t(), torch.from_numpy(IDS)[::2]):
        torch.save(tensor, tmp_path / "a.pt")
        assert_counts(count(tmp_path / "a.pt"), tensor.numpy().reshape(-1), tensor.numel())
    # 4 TB of a file of a KB.
    torch.save(torch.zeros(1, dtype=torch.int32).expand(2**20, 2**20), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: 'tokens' is a tensor with more numbers than the file"):
        count(tmp_path / "a.pt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_that_could_run_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    bomb = np.array([Bomb()], object)
    torch.save({"tokens": Bomb()}, data / "a.pt")
    np.save(data / "a.npy", bomb)
    save_npz(data / "a.npz", {"tokens": bomb})
    (data / "a.pkl").write_bytes(pickle.dumps(Bomb()))
    torch.save({"tokens": Bomb()}, data / "old.pt", _use_new_zipfile_serialization=False)
    for name, message in [
        ("a.pt", r"cannot be read by torch\.load\(weights_only=True\)"),
        (
            "a.npy",
            r"got an array of object, expected one of .*: it holds pickles: give the rows, as arrays of integers",
        ),
        ("a.npz", r"tokens: got an array of object, expected one of .*: it holds pickles"),
        ("a.pkl", r"is a pickle, which is not read: loading it can run any code: load it only if you trust it"),
        (
            "old.pt",
            r"is a file of PyTorch before 1\.6, which is not read: count it in Python: count_corpus\(\[torch\.load",
        ),
    ]:
        with pytest.raises(ValueError, match=rf"{name}: {message}"):
            count(data / name, dtype="uint16" if name == "a.npy" else None)
    assert not (tmp_path / "exploded").exists()


def test_members_are_read_where_they_are(tmp_path):
    """A name that leads out of the archive is a name like any other, and nothing is written."""
    buffer = io.BytesIO()
    np.save(buffer, IDS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../../out.npy", buffer.getvalue())
    before = sorted(tmp_path.parent.rglob("*"))
    assert_counts(count(tmp_path / "a.npz"), IDS.reshape(-1), IDS.size)
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_methods_that_numpy_does_not_write_are_refused(tmp_path, method):
    buffer = io.BytesIO()
    np.save(buffer, IDS)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("tokens.npy", buffer.getvalue())
    with pytest.raises(ValueError, match=r"a\.npz: got 'tokens' of method \d+, expected stored or deflated"):
        count(tmp_path / "a.npz")


def test_an_archive_of_pytorch_that_is_compressed_is_refused(tmp_path):
    save_torch(tmp_path / "a.pt", {"tokens": IDS})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(ValueError, match=r"b\.pt: cannot be read by torch\.load.*it is compressed"):
        count(tmp_path / "b.pt")


def test_counts_are_no_arrays(tmp_path):
    TokenFrequency(VOCAB).save(tmp_path / "counts.safetensors")
    np.save(tmp_path / "a.npy", IDS)
    assert count(tmp_path).total == int((IDS < VOCAB).sum())
    with pytest.raises(ValueError, match="which holds counts, expected a corpus"):
        count(tmp_path / "counts.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "is damaged or not a file of safetensors"),
        (b"[]", "is damaged or not a file of safetensors"),
        (b'{"tokens": 5}', "is damaged or not a file of safetensors"),
        (b'{"tokens": {"dtype": "I32", "shape": [2]}}', "is damaged or not a file of safetensors"),
        (b'{"tokens": {"dtype": "I32", "shape": [2], "data_offsets": [0, 7]}}', "expected \\d+ and the 7 of its"),
        (b'{"tokens": {"dtype": "I32", "shape": [3], "data_offsets": [0, 8]}}', "got 'tokens' in bytes 0 to 8 of"),
        (b'{"tokens": {"dtype": "I32", "shape": [-2], "data_offsets": [0, 8]}}', "without shape and place"),
        (b'{"tokens": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}', "expected \\d+ and the 16 of its"),
        (b'{"tokens": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}', "is a tensor of BF16"),
        (b"{}", "expected 10 and the 0 of its"),
    ],
)
def test_headers_of_safetensors_that_lie(tmp_path, header, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{message}"):
        count(path)
    path.write_bytes(struct.pack("<Q", 2**40) + header)
    with pytest.raises(ValueError, match=r"a\.safetensors: got \d+ bytes, expected a header of 1099511627776"):
        count(path)


@pytest.mark.parametrize("read", [count_corpus, preview_corpus])
def test_an_npz_that_is_shorter_than_it_states(tmp_path, read):
    buffer = io.BytesIO()
    np.save(buffer, IDS)
    for content in (buffer.getvalue()[:-4], buffer.getvalue() + bytes(4)):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr("tokens.npy", content)
        with pytest.raises(ValueError, match=r"a\.npz: 'tokens' is not as long as it states: \(30, 7\) of int32"):
            read([tmp_path / "a.npz"], VOCAB)


@pytest.mark.parametrize("read", [count_corpus, preview_corpus])
def test_a_tensor_that_is_shorter_than_it_states(tmp_path, read):
    torch.save({"tokens": torch.arange(100), "x": torch.arange(9)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive, zipfile.ZipFile(tmp_path / "b.pt", "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name)[: 400 if name.endswith("data/0") else None])
    with pytest.raises(
        ValueError, match=r"b\.pt: (cannot be read|'tokens' is a tensor with more numbers than the file)"
    ):
        read([tmp_path / "b.pt"], VOCAB)


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "a.pt", "a.bin", "b.bin"])
def test_an_archive_that_was_cut_off(tmp_path, name):
    path = tmp_path / name
    (save_npz if "npz" in name or name == "b.bin" else save_torch)(path, {"input_ids": IDS})
    whole = path.read_bytes()
    for size in (60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for read in (count_corpus, preview_corpus):
            with pytest.raises(
                ValueError, match=rf"/{name}: was cut off: it begins as a zip archive and has no record"
            ):
                read([path], VOCAB)


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "a.ckpt"])
def test_what_only_its_name_makes_an_archive(tmp_path, name):
    (tmp_path / name).write_bytes(b"the fox" * 40)
    writer = "NumPy" if name == "a.npz" else r"torch\.save of PyTorch 1\.6 or later"
    with pytest.raises(
        ValueError, match=rf"{name}: begins with b'the ', expected a zip archive, as {writer} writes it"
    ):
        count(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=rf"{name}: (begins with|is a pickle, which is not read)"):
        count(tmp_path / name)


@pytest.mark.parametrize("name", ["a.npz", "b.npz", "a.safetensors", "a.pt"])
def test_damage_gives_errors_alone(tmp_path, name):
    generator = random.Random(name)
    SAVE[name](tmp_path / name, {"input_ids": IDS[:3], "weights": OTHERS["weights"]})
    whole = (tmp_path / name).read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.choice([0, 1, 255, generator.randrange(256)])
        size = generator.choice([len(damaged), len(damaged), generator.randrange(len(damaged))])
        (tmp_path / name).write_bytes(damaged[:size])
        check_damaged(lambda: count(tmp_path / name, column="input_ids"), name)


def test_bytes_behind_the_last_tensor_are_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"tokens": IDS})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header["tokens"]["data_offsets"] == [0, IDS.nbytes]
    path.write_bytes(content + bytes(4))
    with pytest.raises(ValueError, match=rf"a\.safetensors: got \d+ bytes, expected {8 + size} and the 840 of its"):
        count(path)


@pytest.mark.parametrize("kind", ["meta", "nested"])
def test_tensors_without_numbers_of_their_own_are_refused(tmp_path, kind):
    tensor = torch.zeros(3, dtype=torch.int64, device="meta")
    if kind == "nested":
        tensor = torch.nested.nested_tensor([torch.arange(2), torch.arange(3)])
    torch.save([torch.arange(3), tensor], tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt: 1 is a {kind} tensor, expected a tensor of integers"):
        count_corpus([tmp_path], 10)


def test_a_pickle_is_refused_without_advice_to_load_it(tmp_path):
    torch.save({"tokens": pathlib.PurePosixPath("x")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: cannot be read by torch\.load\(weights_only=True\)") as raised:
        count_corpus([tmp_path], 10)
    assert "weights_only` set" not in str(raised.value)
    assert "False" not in str(raised.value)
