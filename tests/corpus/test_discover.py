"""Which names are data and which are not: nothing is silently left out, misread or waited for."""

from __future__ import annotations

import json
import os
import re
import warnings

import numpy as np
import pytest
import torch
from flat_files import write_datatrove, write_llmc, write_megatron, write_npy
from golden_rows import TEXTS
from test_huggingface import save, write_stream
from text_tokenizer import save_tokenizer

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.corpus import TargetPolicy, count_corpus, discover
from pdl_ext.corpus.counting import preview_corpus
from pdl_ext.corpus.reading import lines, tokenizer
from pdl_ext.corpus.source import Format

V = 100
ROWS = [np.arange(start, start + 5, dtype=np.int32) for start in range(0, 20, 5)]


def total(*data, **options) -> int:
    return count_corpus(list(data), V, **options).total


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("format", [None, "raw"])
def test_pipes_and_devices_are_refused_unopened(tmp_path, format):
    os.mkfifo(tmp_path / "f.bin")
    for data in (tmp_path / "f.bin", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=r"(f\.bin|/dev/zero): is not a regular file"):
            total(data, dtype="uint16", format=format)


@pytest.mark.parametrize("damage", [lambda b: b"X" + b[1:], lambda b: b""], ids=["magic", "empty"])
def test_a_damaged_index_does_not_make_raw_ids_of_its_tokens(tmp_path, damage):
    write_megatron(tmp_path, ROWS)
    index = tmp_path / "text_document.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(ValueError, match=r"text_document\.idx: got"):
        total(tmp_path, dtype="uint16")
    assert total(tmp_path / "text_document.bin", dtype="int32", format="raw") == 20


def test_a_damaged_header_does_not_pass_for_ids(tmp_path):
    npy = write_npy(tmp_path, ROWS)
    npy.write_bytes(b"\0" + npy.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"tokens\.npy: is damaged or not a \.npy file"):
        total(npy, dtype="uint16")
    llmc = write_llmc(tmp_path, [row.astype(np.uint16) for row in ROWS])
    llmc.write_bytes((20240521).to_bytes(4, "little") + llmc.read_bytes()[4:])
    with pytest.raises(ValueError, match=r"llmc\.bin: got magic 20240521, expected 20240520 or 20240801"):
        total(llmc, dtype="uint16")


@pytest.mark.parametrize("name", ["data.jsonl", "a.txt", "tokens.bin", "0.ds", "a.slow"])
def test_a_folder_may_be_named_as_a_file_is(tmp_path, monkeypatch, name):
    # A format that asks for nothing but the name.
    slow = Format("slow", lambda path, options: [], lambda path, head: path.suffix == ".slow")
    monkeypatch.setitem(discover.FORMATS, "slow", slow)
    (tmp_path / name).mkdir()
    (tmp_path / name / "part-0.jsonl").write_text('{"input_ids": [1, 2]}')
    (tmp_path / "tokens.idx").mkdir()
    assert total(tmp_path) == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_empty_file_of_no_format_is_told_to_be_empty(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: is empty, so that its format is unknown"):
        total(tmp_path)


def test_names_may_come_in_an_array(tmp_path):
    paths = [str(write_npy(tmp_path, ROWS)), str(write_llmc(tmp_path, [row.astype(np.uint16) for row in ROWS]))]
    assert count_corpus(np.array(paths), V).total == 40


def test_a_name_that_is_too_long_is_told_as_any_that_cannot_be_read(tmp_path):
    name = "a" * 5000
    (tmp_path / "all.list").write_text(name)
    for data in (name, tmp_path / "all.list"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read \(File name too long\)"):
            total(data)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2]}')
    with pytest.raises(ValueError, match="data: got an empty name"):
        total("")


def test_a_folder_may_be_named_as_a_checkpoint_is(tmp_path):
    folder = tmp_path / "run.checkpoint-100"
    folder.mkdir()
    write_npy(folder, ROWS)
    assert total(tmp_path) == 20


@pytest.mark.parametrize("data", ["", "*"])
def test_counts_and_checkpoints_are_no_corpus(tmp_path, data):
    (tmp_path / "a.bin").write_bytes(np.arange(20, dtype="<u2").tobytes())
    for name in ("counts.bin", "run.checkpoint-7"):
        frequency = TokenFrequency(V)
        frequency.update(torch.tensor([1]))
        frequency.save(tmp_path / name)
    # Nor are those that were cut off, whose bytes are ids as good.
    whole = (tmp_path / "counts.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-10])
    (tmp_path / "short.bin").write_bytes(whole[:64])
    options = {"format": "raw"} if data else {}
    assert total(tmp_path / data, dtype="uint16", **options) == 20


@pytest.mark.parametrize("name", ["weights.safetensors", "tokens.checkpoint-1"])
def test_files_of_others_are_not_left_out_by_their_names(tmp_path, name):
    (tmp_path / "a.bin").write_bytes(np.arange(20, dtype="<u2").tobytes())
    (tmp_path / name).write_bytes(b"others'")
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)}: (its format is unknown|got 7 bytes, expected a header of)"
    ):
        total(tmp_path, dtype="uint16")


def test_counts_that_are_named_are_not_dropped(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.arange(20, dtype="<u2").tobytes())
    frequency = count_corpus([tmp_path / "a.bin"], V, dtype="uint16", checkpoint=tmp_path / "c")
    frequency.save(tmp_path / "counts")
    (tmp_path / "all.list").write_text("a.bin\ncounts\n")
    for data, place in (
        ([tmp_path / "a.bin", tmp_path / "counts"], "data"),
        ([tmp_path / "all.list"], r"all\.list: line 2"),
    ):
        with pytest.raises(
            ValueError, match=rf"{place}: got .*counts, which holds counts, expected a corpus: `pdl-ext merge`"
        ):
            total(*data, dtype="uint16")
    # As a shell names them for `*` when an interrupted command goes on.
    assert total(tmp_path / "a.bin", tmp_path / "c-0", dtype="uint16") == 20


@pytest.mark.parametrize("data", ["", "*"])
def test_lists_are_followed_where_they_are_named_alone(tmp_path, data):
    write_npy(tmp_path, ROWS)
    (tmp_path / "all.list").write_text("tokens.npy\n")
    with pytest.raises(ValueError, match=r"all\.list: its format is unknown"):
        total(tmp_path / data)


def test_files_that_are_gone_since_the_folder_was_listed_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(np.arange(20, dtype="<u2").tobytes())
    gone = tmp_path / "b.checkpoint-0"
    TokenFrequency(V).save(gone)
    find = discover.format_of

    def removed_before(path):
        # As the count that it is of does when it ends.
        if path == gone:
            path.unlink()
        return find(path)

    monkeypatch.setattr(discover, "format_of", removed_before)
    assert total(tmp_path, dtype="uint16") == 20
    assert not gone.exists()
    # But not data, nor a link that leads nowhere, which were meant to be counted.
    (tmp_path / "b.bin").write_bytes(bytes(20))
    gone = tmp_path / "b.bin"
    with pytest.raises(ValueError, match=r"b\.bin: cannot be read"):
        total(tmp_path, dtype="uint16")
    (tmp_path / "c.bin").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"c\.bin: cannot be read"):
        total(tmp_path, dtype="uint16")


def test_files_that_a_dataset_does_not_list_are_told_of(tmp_path):
    save(tmp_path / "hf", [ROWS])
    (tmp_path / "hf" / "more").mkdir()
    write_npy(tmp_path / "hf" / "more", ROWS)
    (tmp_path / "hf" / "b.bin").write_bytes(bytes(8))
    for name in (".hidden.bin", "_other.bin", "cache-1.arrow"):
        (tmp_path / "hf" / name).write_bytes(bytes(8))
    with pytest.warns(UserWarning, match=r"hf: is one dataset, which does not list .*b\.bin and 1 other files in it"):
        counted = total(tmp_path)
    assert counted == 20


@pytest.mark.parametrize("order", [1, -1])
def test_a_file_is_counted_in_one_way(tmp_path, order):
    folder = save(tmp_path / "hf", [ROWS], indices=[0, 2])
    data = [folder, folder / "data*"][::order]
    with pytest.raises(ValueError, match=r"got it as (huggingface and as arrow|arrow and as huggingface)"):
        total(*data)


def test_a_list_with_a_byte_order_mark(tmp_path):
    write_npy(tmp_path, ROWS)
    (tmp_path / "all.list").write_text("tokens.npy\n", encoding="utf-8-sig")
    assert total(tmp_path / "all.list") == 20


def test_long_texts_are_refused_in_every_format(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    file = save_tokenizer(tmp_path / "tokenizer.json")
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for module in (lines, tokenizer):
        monkeypatch.setattr(module, "MAX_TEXT_BYTES", 5)
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*got a (text of \d+ characters|line above 5)"):
            count_corpus([tmp_path / name], 320, tokenizer=file)


def test_labels_that_wrapped(tmp_path):
    pa = pytest.importorskip("pyarrow")
    columns = {"input_ids": [[1, 2, 3]], "labels": pa.array([[2**32 - 100, 2, 3]], pa.list_(pa.uint32()))}
    write_stream(tmp_path / "a.arrow", columns)
    frequency = count_corpus([tmp_path / "a.arrow"], V, policy=TargetPolicy(skip_prompt="labels"))
    assert (frequency.total, int(frequency.ignored)) == (2, 1)


def test_a_link_is_a_copy_like_any_other(tmp_path):
    np.repeat(np.arange(3, dtype="<u2"), 700).tofile(tmp_path / "a.bin")
    (tmp_path / "b.bin").symlink_to("a.bin")
    with pytest.raises(ValueError, match=r"b\.bin: got the same content as .*a\.bin"):
        count_corpus([tmp_path], 3, dtype="uint16")
    assert count_corpus([tmp_path], 3, dtype="uint16", allow_overlap=True).counts.tolist() == [1400] * 3
    assert count_corpus([tmp_path / "a.bin", f"{tmp_path}/./a.bin"], 3, dtype="uint16").counts.tolist() == [700] * 3


@pytest.mark.parametrize("column", ["input_ids", "tokens", "token_ids"])
def test_json_lines_find_ids_as_columns_do(tmp_path, column):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "hello", column: [1, 2]}))
    assert total(tmp_path) == 2


def test_json_lines_read_what_can_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["a", "b"], "input_ids": 5, "token_ids": [1, 2]}')
    assert total(tmp_path) == 2
    (tmp_path / "a.jsonl").write_text('{"tokens": 512, "text": "hello"}')
    with pytest.raises(ValueError, match="got text without a tokenizer"):
        total(tmp_path)


def test_a_mask_beside_the_tokens_is_recorded(tmp_path):
    rows = [row.astype(np.uint16) for row in ROWS]
    path = write_datatrove(tmp_path, rows, mask=np.arange(20) % 2)
    frequency = count_corpus([path], V)
    assert frequency.total == 10
    assert frequency.provenance.shards[0].format == "datatrove with its loss mask"
    (tmp_path / "000_shuffled.ds.loss").unlink()
    assert count_corpus([path], V).provenance.shards[0].format == "datatrove"


def test_an_empty_datatrove_shard_needs_no_dtype(tmp_path):
    write_datatrove(tmp_path, [row.astype(np.uint16) for row in ROWS])
    for name in ("1.ds", "1.ds.index"):
        (tmp_path / name).write_bytes(b"")
    assert total(tmp_path) == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"data: got no token in .*1\.ds, expected some"):
            count_corpus([tmp_path / "1.ds"], 2**17)


def test_counts_of_other_ignored_ids_do_not_add_up():
    first, second = TokenFrequency(V), TokenFrequency(V, ignore_index=0)
    second.merge(first)
    second.update(torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"other: got ignore_index 0, expected -100"):
        first.merge(second)
    assert first.total == 0
    second.merge(TokenFrequency.from_counts(torch.ones(V, dtype=torch.int64), ignore_index=0))
    assert second.total == V + 2


def test_an_output_that_holds_data_is_counted(tmp_path):
    (tmp_path / "a.bin").write_bytes(np.arange(8, dtype="<u2").tobytes())
    (tmp_path / "b.bin").write_bytes(np.arange(12, dtype="<u2").tobytes())
    assert total(tmp_path, dtype="uint16", output=tmp_path / "b.bin") == 20


# A line feed, a terminal's command, two characters that end a line elsewhere, and a byte that is no text.
ODD_NAMES = ["a\nb", "c\x1b[2Jd", "e\u2028f", "g\x85h", "i\x0bj", os.fsdecode(b"k\xffl")]
ESCAPED = [r"a\nb", r"c\x1b[2Jd", r"e\u2028f", r"g\x85h", r"i\x0bj", r"k\udcffl"]


def test_names_are_told_in_one_line(tmp_path, capsys):
    for number, name in enumerate(ODD_NAMES):
        np.full(9 + number, number, "<u2").tofile(tmp_path / f"{name}.bin")
    command = ["count", str(tmp_path), "--dtype", "uint16", "--vocab-size", str(V)]
    assert main([*command, "--dry-run"]) == 0
    head, *lines, _ = capsys.readouterr().out.split("\n")[:-1]
    assert [line.split()[0] for line in lines] == [f"{tmp_path}/{name}.bin" for name in ESCAPED]
    assert {line.index("uint16") for line in lines} == {head.index("dtype")}
    output = tmp_path / "counts\n.out"
    assert main([*command, "-o", str(output)]) == 0
    assert capsys.readouterr().out.startswith(rf"{tmp_path}/counts\n.out: ")
    # The provenance has them as they are.
    names = [shard.name for shard in TokenFrequency.load(output).provenance.shards]
    assert names == [f"{tmp_path}/{name}.bin" for name in ODD_NAMES]
    assert main(["show", str(output)]) == 0
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[4:7]] == [
        f"{tmp_path}/{name}.bin" for name in ESCAPED[:3]
    ]
    for name, escaped in zip(ODD_NAMES, ESCAPED, strict=True):
        (tmp_path / f"{name}.bin").write_bytes(b"odd")
        arguments = ([tmp_path / f"{name}.bin"], V)
        with pytest.raises(ValueError, match=rf"^{re.escape(f'{tmp_path}/{escaped}')}\.bin: got 3 bytes, expected"):
            count_corpus(*arguments, dtype="uint16")
        with pytest.raises(ValueError, match=re.escape(f"{escaped}.bin: has no header")):
            preview_corpus(*arguments)
        with pytest.warns(UserWarning, match=re.escape(f"{escaped}.bin: its tokens are uint8, and cannot hold")):
            count_corpus([tmp_path / f"{name}.bin"], 300, dtype="uint8")
        assert main(["count", *map(str, arguments[0]), *command[2:], "-o", str(tmp_path / "other")]) == 1
        (line,) = capsys.readouterr().err.split("\n")[:-1]
        assert line.startswith(f"pdl-ext: {tmp_path}/{escaped}.bin: got 3 bytes")


def test_names_of_a_list_end_at_line_feeds_alone(tmp_path):
    for name in ODD_NAMES[:-1]:
        np.arange(9, dtype="<u2").tofile(tmp_path / name)
    (tmp_path / "all.list").write_bytes("\r\n".join(ODD_NAMES[1:-1]).encode())
    assert total(tmp_path / "all.list", dtype="uint16", format="raw", allow_overlap=True) == 9 * 4
    # Such a name can only be found.
    (tmp_path / "all.list").write_text("# one name\na\nb\n")
    with pytest.raises(ValueError, match=r"all\.list: line 2: got .*/a, expected a file, a folder or a pattern"):
        total(tmp_path / "all.list", dtype="uint16", format="raw")
    assert total(tmp_path / "a*b", dtype="uint16", format="raw") == 9
    (tmp_path / "outer.list").write_text("all.list\n")
    with pytest.raises(ValueError, match=r"outer\.list: line 1: .*all\.list: line 2: got"):
        total(tmp_path / "outer.list")
