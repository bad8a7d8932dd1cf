"""Files of trainers beside their tokens: they are left out with a warning, and no other file is."""

from __future__ import annotations

import gzip
import warnings

import numpy as np
import pytest
from flat_files import write_fairseq, write_llmc, write_megatron, write_npy

from pdl_ext.corpus import count_corpus

V = 500
ROWS = [np.arange(start, start + 50, dtype=np.uint16) for start in range(0, 400, 50)]
HASH = "0123456789abcdef" * 2
INDEX_MAPS = [
    "text_document_train_indexmap_300ns_64sl_1234s_doc_idx.npy",
    "text_document_train_indexmap_300ns_64sl_1234s_sample_idx.npy",
    "text_document_train_indexmap_300ns_64sl_1234s_shuffle_idx.npy",
    "text_document_train_0_indexmap_300ns_64sl_1234s_packedpi_ac_doc_idx.npy",
    "text_document_train_indexmap_5mns_64msl_0.10ssp_1234s.npy",
    "d_decoder_packed_batch_idx.npy",
    "d_decoder_packed_shuffle_idx.npy",
    "valid_ns_300_sl_64_s_1_shuffle_idx.npy",
    f"{HASH}_doc_idx.npy",
    f"{HASH}_index.npy",
    f"{HASH}_sample_index.npy",
    f"{HASH}.dsc",
    f"{HASH}-GPTDataset-train-document_index.npy",
    f"{HASH}-GPTDataset-train-sample_index.npy",
    f"{HASH}-MCoreGPTDataset-valid-shuffle_index.npy",
    f"{HASH}-GPTDataset-train-description.txt",
    f"{HASH}-BlendedDataset-dataset_index.npy",
    f"{HASH}-BlendedDataset-dataset_sample_index.npy",
    f"{HASH}-BlendedDataset-description.txt",
]


def write_index_map(path):
    if path.suffix == ".npy":
        np.save(path, np.arange(len(path.name) + 20, dtype=np.uint32))
    else:
        path.write_text('{"class": "GPTDataset"}')


@pytest.mark.parametrize("data", ["", "*", "**"])
@pytest.mark.parametrize("folder", [".", "cache/GPTDataset_indices"])
def test_index_maps_are_left_out_with_one_note(tmp_path, folder, data):
    write_megatron(tmp_path, ROWS)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in INDEX_MAPS:
        write_index_map(tmp_path / folder / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counted = count_corpus([tmp_path / data], V)
    assert counted.counts.tolist() == [1] * 400 + [0] * 100
    assert [shard.format for shard in counted.provenance.shards] == ["megatron"]
    (note,) = caught
    number = len(INDEX_MAPS)
    assert f"holds no tokens: it was left out, and {number - 1} other files like it" in str(note.message)


@pytest.mark.parametrize("name", INDEX_MAPS)
@pytest.mark.parametrize("listed", [False, True])
def test_an_index_map_that_is_named_is_refused_and_with_a_format_read(tmp_path, name, listed):
    write_index_map(tmp_path / name)
    (tmp_path / "all.list").write_text(name)
    data = tmp_path / ("all.list" if listed else name)
    place = r"all\.list: line 1" if listed else "data"
    with pytest.raises(ValueError, match=rf"{place}: got .*, expected tokens: by its name it is a trainer's own"):
        count_corpus([data], V)
    if name.endswith(".npy"):
        assert count_corpus([data], V, format="npy").tokens_seen >= 20


@pytest.mark.parametrize(
    "name",
    [
        "train_idx.npy",
        "doc_idx_tokens.npy",
        "my-document_index.npy",
        "sample_index.npy",
        "indexmap.npy",
        "shuffle_idx.npy",
        f"{HASH}-tokens.npy",
        f"{HASH}.npy",
        f"{HASH[1:]}_index.npy",
        "a_doc_idx.bin",
    ],
)
def test_names_that_are_like_them_are_counted(tmp_path, name):
    np.save(tmp_path / "a", ROWS[0])
    (tmp_path / "a.npy").rename(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_corpus([tmp_path], V).total == 50
        assert count_corpus([tmp_path / name], V).total == 50


@pytest.mark.parametrize("name", ["dict.txt", "dict.en.txt", "dict.zh_CN.txt", "preprocess.log"])
def test_dictionaries_of_fairseq_are_left_out_beside_its_index_alone(tmp_path, name):
    write_fairseq(tmp_path, ROWS)
    (tmp_path / name).write_text("the 12\nof 7\n")
    for data in ("", "*", "*.[!bi]*"):
        if data == "*.[!bi]*":
            with pytest.warns(UserWarning, match=name), pytest.raises(ValueError, match="data: got nothing to count"):
                count_corpus([tmp_path / data], V)
        else:
            with pytest.warns(UserWarning, match=rf"{name}: is a trainer's own .*: it was left out$"):
                assert count_corpus([tmp_path / data], V).total == 400
    (tmp_path / "train.idx").unlink()
    with pytest.raises(ValueError, match=r"got text without a tokenizer|preprocess\.log: its format is unknown"):
        count_corpus([tmp_path], V, dtype="uint16")


def test_what_dolma_tells_of_its_documents_is_left_out_beside_its_tokens(tmp_path):
    ROWS[0].tofile(tmp_path / "part-0-00000.npy")
    (tmp_path / "part-0-00000.csv.gz").write_bytes(gzip.compress(b"0,50,id,src,1"))
    assert count_corpus([tmp_path], V, dtype="uint16").total == 50
    (tmp_path / "other.csv.gz").write_bytes(gzip.compress(b"0,50,id,src,1"))
    with pytest.raises(ValueError, match=r"other\.csv\.gz: is gzip data"):
        count_corpus([tmp_path], V, dtype="uint16")


@pytest.mark.parametrize("data", ["", "*", "**"])
def test_locks_are_left_out_if_they_are_empty(tmp_path, data):
    write_npy(tmp_path, ROWS)
    for name in ("a.incomplete_info.lock", "b_builder.lock", "_hidden_builder.lock", "tokens.npy.lock"):
        (tmp_path / name).touch()
    assert count_corpus([tmp_path / data], V).total == 400
    (tmp_path / "poetry.lock").write_text("[[package]]")
    with pytest.raises(ValueError, match=r"poetry\.lock: its format is unknown"):
        count_corpus([tmp_path / data], V)


@pytest.mark.parametrize("name", ["_SUCCESS", ".part-0.parquet.crc", "_metadata", ".DS_Store", "_committed_123"])
def test_what_other_programs_hide_is_left_out(tmp_path, name):
    write_npy(tmp_path, ROWS)
    (tmp_path / name).write_bytes(b"12345")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_corpus([tmp_path], V).total == 400


@pytest.mark.parametrize("data", ["", "*"])
def test_several_formats_of_one_folder_are_listed(tmp_path, data):
    write_megatron(tmp_path, ROWS)
    write_npy(tmp_path, ROWS[:3])
    write_llmc(tmp_path, ROWS[:2])
    np.save(tmp_path / "z.npy", ROWS[0])
    with pytest.warns(UserWarning, match="got files of") as caught:
        assert count_corpus([tmp_path / data], V).total == 400 + 150 + 100 + 50
    (note,) = caught
    message = str(note.message)
    assert message.startswith(f"{tmp_path / data}: got files of 3 formats, expected one: llmc (1, as ")
    assert f"megatron (1, as {tmp_path / 'text_document.bin'}), npy (2, as {tmp_path / 'tokens.npy'}); " in message


def test_formats_that_are_named_one_by_one_are_no_surprise(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    files = [write_megatron(tmp_path / "a", ROWS), write_npy(tmp_path / "b", ROWS[:3])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_corpus(files, V).total == 550
        assert count_corpus([tmp_path / "a", tmp_path / "b"], V).total == 550
