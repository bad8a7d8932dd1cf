"""The root of a Hugging Face cache: each dataset once, no models, and no other files."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from column_files import VOCAB, count
from golden_rows import ROWS

from pdl_ext.corpus import count_corpus

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")
NUMBER = sum(map(len, ROWS))


def repository(hub, name, files, revisions=("abc",), main=None):
    """A repository as huggingface_hub keeps it: blobs, and links to them by revision."""
    folder = hub / name
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(main or revisions[-1])
    for number, revision in enumerate(revisions):
        for path, content in files.items():
            blob = folder / "blobs" / f"{number}{abs(hash((name, path))):x}"
            blob.write_bytes(content)
            link = folder / "snapshots" / revision / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return folder


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"input_ids": rows}), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(tmp_path):
    hub = tmp_path / "huggingface" / "hub"
    card = {"README.md": b"# A dataset", ".gitattributes": b"*", "dataset_infos.json": b"{}", "load.py": b"print()"}
    repository(hub, "datasets--owner--name", {"data/train-00000-of-00001.parquet": parquet(ROWS), **card})
    repository(hub, "datasets--squad", {"train.jsonl": json.dumps({"input_ids": [1, 2, 3]}).encode(), **card})
    (hub / "version.txt").write_text("1")
    (hub / ".locks").mkdir()
    (hub.parent / "token").write_text("hf_secret")
    return hub


@pytest.fixture
def model(hub):
    return repository(hub, "models--owner--model", {"config.json": b"{}", "model.safetensors": b"x", "vocab.txt": b"a"})


def total(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*got files of [23] formats")
        return count(path, **options).tokens_seen


def test_a_hub_its_repositories_and_their_revisions(hub):
    assert total(hub) == NUMBER + 3
    assert total(hub / "datasets--squad") == 3
    assert total(hub / "datasets--owner--name" / "snapshots" / "abc") == NUMBER
    assert total(hub / "datasets--owner--name" / "snapshots" / "abc" / "data") == NUMBER
    assert total(hub.parent) == NUMBER + 3
    with pytest.warns(UserWarning, match="got files of 2 formats"):
        shards = count(hub).provenance.shards
    assert [shard.name for shard in shards] == [
        f"{hub}/datasets--owner--name/snapshots/abc/data/train-00000-of-00001.parquet",
        f"{hub}/datasets--squad/snapshots/abc/train.jsonl",
    ]


@pytest.mark.filterwarnings("ignore:.*got files of 2 formats")
def test_models_are_left_out_and_told_of(hub, model):
    for data in (hub, hub.parent):
        with pytest.warns(UserWarning, match=r"models--owner--model: not a dataset, so left out of those in"):
            assert count(data).tokens_seen == NUMBER + 3


def test_the_revision_of_main(hub):
    name = repository(hub, "datasets--two", {"a.jsonl": b'{"input_ids": [5]}'}, ("old", "new"), main="old").name
    with pytest.warns(UserWarning, match=rf"{name}: holds 2 revisions, of which old is counted, that of refs/main"):
        assert [shard.name for shard in count(hub / name).provenance.shards] == [f"{hub}/{name}/snapshots/old/a.jsonl"]
    (hub / name / "refs" / "main").write_text("gone")
    with pytest.raises(ValueError, match=rf"{name}: holds the revisions new, old, expected one: name its folder, as"):
        count(hub / name)
    assert total(hub / name / "snapshots" / "new") == 1


def test_splits_are_not_counted_together(hub):
    files = {f"data/{split}-00000-of-00001.parquet": parquet(ROWS[:n]) for split, n in (("train", 9), ("test", 5))}
    folder = repository(hub, "datasets--split", files)
    with pytest.raises(ValueError, match=r"snapshots/abc: holds the splits test, train, expected one.*/data/train\*$"):
        count(hub)
    assert total(folder / "snapshots" / "abc" / "data" / "train*") == sum(map(len, ROWS[:9]))


def test_tables_and_what_they_were_made_of(tmp_path, hub):
    """What load_dataset leaves, by itself and beside the hub it was downloaded to."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")
    cache = hub.parent / "datasets"
    source = tmp_path / "source.parquet"
    source.write_bytes(parquet(ROWS))
    datasets.load_dataset("parquet", data_files=str(source), split="train", cache_dir=str(cache))
    datasets.Dataset.from_generator(lambda: iter([{"input_ids": [7, 8]}]), cache_dir=str(cache))
    downloads = cache / "downloads"
    downloads.mkdir(exist_ok=True)
    (downloads / ("ab" * 32)).write_bytes(source.read_bytes())
    (downloads / f"{'ab' * 32}.json").write_text("{}")
    (cache / "_lock_builder.lock").touch()
    assert total(cache) == NUMBER + 2
    assert total(hub.parent) == 2 * NUMBER + 2 + 3
    # The same dataset, under the name that each of the two has for it.
    (cache / "parquet").rename(cache / "owner___name")
    repository = hub / "datasets--owner--name"
    with pytest.warns(UserWarning, match="is left out") as warned:
        assert count(hub.parent).tokens_seen == NUMBER + 2 + 3
    (told,) = [str(warning.message) for warning in warned if "left out" in str(warning.message)]
    assert told == (
        f"{repository}: is left out: its dataset is counted from the tables in {cache / 'owner___name'}; "
        "to count the repository's files instead, name its folder"
    )
    # As the warning says.
    assert total(repository) == NUMBER
    (cache / "generator").rename(cache / "squad")
    with pytest.warns(UserWarning, match=r"name: is left out, and 1 other repositories likewise: its dataset is"):
        assert count(hub.parent).tokens_seen == NUMBER + 2


@pytest.mark.parametrize("name", ["README.md", "load.py", "dataset_infos.json"])
def test_elsewhere_files_of_no_known_format_are_an_error(tmp_path, name):
    np.save(tmp_path / "a.npy", np.arange(3))
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name}: (its format is unknown|is JSON)"):
        count_corpus([tmp_path], VOCAB)


def test_folders_that_are_named_like_a_cache(tmp_path):
    for name in ("hub", "datasets/a/b/c", "downloads", "snapshots", "datasets--a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.jsonl").write_text(json.dumps({"input_ids": [len(name)]}))
    assert total(tmp_path, allow_overlap=True) == 5
