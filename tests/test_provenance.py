"""The origin of counts: digests, what merges and what does not, and its text form."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from pdl_ext.provenance import Provenance, Shard, TargetPolicy, check_distinct, shard_digest

A, B = (Shard(f"{name}.bin", 4096, name * 32, "raw", "uint16") for name in "ab")
FIRST = Provenance((A,), 5, TargetPolicy(), "f" * 32, "0.1")


def test_text_keeps_all_of_it():
    provenance = dataclasses.replace(FIRST, policy=TargetPolicy("shifted", 3, "ids", "mask", "labels", False))
    assert Provenance.from_json(provenance.to_json()) == provenance
    learned = TargetPolicy(column="chat", learn="assistant", max_length=9, packing="wrapped")
    provenance = dataclasses.replace(FIRST, policy=learned, chat_template="c" * 32)
    assert Provenance.from_json(provenance.to_json()) == provenance


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{}", '{"shards": 3}', '{"shards": [["a"]], "tokens": 1}', pytest.param("[" * 10**5, id="deep")],
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no provenance of counts"):
        Provenance.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", -1),
        ("tokens", 1.5),
        ("tokens", float("inf")),
        ("tokens", "5"),
        ("tokenizer", ["f"]),
        ("chat_template", 3),
        ("version", None),
        ("policy", {"targets": "some"}),
        ("policy", []),
        ("shards", ["a1bcd"]),
        ("shards", [["a.bin", -1, "d", "raw", "uint16"]]),
        ("shards", [["a.bin", float("inf"), "d", "raw", "uint16"]]),
        ("shards", [["a.bin", 1, "d", "raw", None]]),
        ("shards", [["a.bin", 1, "d", "raw", "uint16", "more"]]),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_refused(field, value):
    fields = {**json.loads(FIRST.to_json()), field: value}
    with pytest.raises(ValueError, match="no provenance of counts"):
        Provenance.from_json(json.dumps(fields))


def test_counts_of_before_chats_were_counted():
    fields = json.loads(FIRST.to_json())
    del fields["chat_template"]
    for name in ("learn", "max_length", "packing"):
        del fields["policy"][name]
    assert Provenance.from_json(json.dumps(fields)) == FIRST


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "user"}, r"learn: got 'user', expected one of \['all', 'assistant', 'completions'\]"),
        ({"max_length": 9}, "max_length: got 9 without learn"),
        ({"packing": "bfd"}, "packing: got 'bfd' without learn"),
        ({"learn": "all", "max_length": 0}, r"max_length: got 0, expected None or an int from 1 to 2\^31 - 1"),
        ({"learn": "all", "packing": "bfd"}, "packing: got 'bfd' without max_length"),
        ({"learn": "all", "max_length": 9, "packing": "best"}, "packing: got 'best', expected one of"),
        ({"learn": "all", "mask": "m"}, "mask: got 'm' with learn='all', expected None"),
        ({"learn": "all", "special_tokens": False}, "special_tokens: got False with learn='all', expected True"),
    ],
)
def test_policies_that_contradict_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        TargetPolicy(**options)


def test_who_learns_learns_no_first_token():
    assert TargetPolicy(learn="all").targets == "shifted"


def test_a_policy_that_this_version_does_not_know_is_refused():
    fields = json.loads(FIRST.to_json())
    fields["policy"]["sampled"] = True
    with pytest.raises(ValueError, match="no provenance of counts"):
        Provenance.from_json(json.dumps(fields))


def test_merged():
    both = FIRST.merged(dataclasses.replace(FIRST, shards=(B,), tokens=7))
    assert (both.shards, both.tokens) == ((A, B), 12)
    # The content decides, not the name.
    renamed = dataclasses.replace(FIRST, shards=(A._replace(name="c.bin"),))
    with pytest.raises(ValueError, match=r"c.bin: got the same content as a.bin"):
        FIRST.merged(renamed)
    assert len(FIRST.merged(renamed, allow_overlap=True).shards) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "e" * 32}, "other: got counts of tokenizer eeee"),
        ({"tokenizer": None}, "other: got counts of tokenizer None"),
        ({"chat_template": "c" * 32}, "other: got counts of chat template cccc.*, expected None"),
        ({"policy": TargetPolicy(targets="shifted")}, "other: got counts with targets='shifted', expected 'all'"),
        ({"policy": TargetPolicy(mask="m")}, "other: got counts with mask='m', expected None"),
    ],
)
def test_what_differs_does_not_merge(change, message):
    with pytest.raises(ValueError, match=message):
        FIRST.merged(dataclasses.replace(FIRST, shards=(B,), **change))


def test_a_shards_digest_depends_on_head_tail_and_size(tmp_path):
    path = tmp_path / "a"
    content = bytearray(100_000)

    def digest():
        path.write_bytes(content)
        return shard_digest(path)

    digests = [digest()]
    for change in (0, 16 * 1024 - 1, 100_000 - 16 * 1024, 99_999):
        content[change] ^= 1
        digests.append(digest())
    content.append(0)
    digests.append(digest())
    assert len(set(digests)) == len(digests)
    # A short file is read once, whole.
    for size in (0, 1, 16 * 1024, 20_000):
        content = bytearray(size)
        empty = digest()
        for place in range(0, size, 777):
            content[place] ^= 1
            assert digest() != empty
            content[place] ^= 1


def test_small_shards_are_the_same_by_chance():
    small = tuple(Shard(f"{number}.bin", 4095, "c" * 32, "raw", "uint16") for number in range(3))
    with pytest.warns(
        UserWarning, match=r"^1\.bin: has the same content as 0\.bin, and 1 other files like it: each is c"
    ):
        check_distinct(small)
    first, second, same = (dataclasses.replace(FIRST, shards=of) for of in (small[:1], (small[1], B), small[2:]))
    with pytest.warns(
        UserWarning, match=r"^1\.bin: has the same content as 0\.bin: each is counted, since files below"
    ):
        assert len(first.merged(second).shards) == 3
    # By chance it is hardly all of them.
    with pytest.raises(ValueError, match=r"^2\.bin: got the same content as 0\.bin"):
        first.merged(same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.merged(second, allow_overlap=True)
        # None is copied where nothing is.
        check_distinct([small[0]._replace(size=0)] * 3)
    with pytest.raises(ValueError, match=r"b\.bin: got the same content as b\.bin"):
        check_distinct([*small, B, B])


def test_an_overlap_that_was_allowed_before_stands_in_no_ones_way():
    twice = dataclasses.replace(FIRST, shards=(A, A))
    other = dataclasses.replace(FIRST, shards=(B, B))
    assert len(twice.merged(other).shards) == 4
    with pytest.raises(ValueError, match="same content"):
        twice.merged(FIRST)
    by_document = dataclasses.replace(other, policy=TargetPolicy(sample_by="document"))
    with pytest.raises(ValueError, match="sample_by='document', expected 'line'"):
        FIRST.merged(by_document)
