"""Chats and prompts with completions: every format and option as for texts, errors, and the provenance."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from chat_tokenizer import TEMPLATE, TRAINED_ON, VOCAB, save_chat_tokenizer
from column_files import check_damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdl_ext import TokenFrequency
from pdl_ext.cli.main import main
from pdl_ext.corpus import TargetPolicy, count_corpus, counting
from pdl_ext.corpus.formats import jsonl
from pdl_ext.corpus.reading import pretrained
from pdl_ext.corpus.reading.supervised import SupervisedEncoder
from pdl_ext.corpus.source import Part, ReadOptions

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
transformers = pytest.importorskip("transformers", reason="needs pdl_ext[chat]")

DOCS = Path(__file__).parents[2] / "docs" / "corpora.md"
ASSISTANT = TargetPolicy(learn="assistant")


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"why does the fox {number}?"},
        {"role": "assistant", "content": TRAINED_ON[number % 3]},
    ]


CHATS = [{"messages": chat(number)} for number in range(300)]
UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def without_template(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer") / "base", None)


def write(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def count(path, tokenizer, policy=ASSISTANT, **options):
    return count_corpus([path], VOCAB, policy=policy, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def said(tokenizer):
    """The counts of each assistant's turns in CHATS."""
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = [
        token
        for row in CHATS
        for token in loaded(row["messages"][1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
    ]
    return np.bincount(ids, minlength=VOCAB)


def write_columns(path, rows):
    table = pa.table({"id": list(range(len(rows))), "messages": [row["messages"] for row in rows]})
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=70)
    elif path.name == "stream.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=90)
    else:
        with pa.ipc.new_file(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=90)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "stream.arrow"])
def test_every_format_in_parts_by_several_threads(name, tmp_path, monkeypatch, tokenizer, said):
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 500)
    monkeypatch.setattr(counting, "PART_BYTES", 500)
    path = (write if ".jsonl" in name else write_columns)(tmp_path / name, CHATS)
    frequency = count(path, tokenizer, threads=4)
    np.testing.assert_array_equal(frequency.counts.numpy(), said)
    # What others say is ignored, and not lost.
    assert frequency.provenance.tokens == frequency.total + int(frequency.ignored) > 2 * frequency.total


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "generator", "table"])
def test_chats_in_memory(kind, tokenizer, said):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'pdl_ext[trl]'")
    data = {
        "Dataset": lambda: datasets.Dataset.from_list(CHATS),
        "IterableDataset": lambda: datasets.Dataset.from_list(CHATS).to_iterable_dataset(),
        # Whose rows tell their types one by one.
        "generator": lambda: datasets.IterableDataset.from_generator(lambda: iter(CHATS)),
        "table": lambda: pa.Table.from_pylist(CHATS),
    }[kind]()
    frequency = count_corpus(data, VOCAB, policy=ASSISTANT, tokenizer=tokenizer)
    np.testing.assert_array_equal(frequency.counts.numpy(), said)
    assert frequency.provenance.chat_template is not None


def test_packed_rows_are_counted_in_their_order(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(counting, "_LEAST_PART_BYTES", 500)
    monkeypatch.setattr(counting, "PART_BYTES", 500)
    policy = TargetPolicy(learn="all", max_length=50, packing="wrapped")
    found = [
        count(writer(tmp_path / name, CHATS), tokenizer, policy, threads=4).counts.tolist()
        for writer, name in ((write, "a.jsonl"), (write_columns, "a.parquet"), (write_columns, "a.arrow"))
    ]
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    rows = [loaded.apply_chat_template(row["messages"], return_dict=True)["input_ids"] for row in CHATS]
    tokens = np.concatenate(rows)
    tokens = np.delete(tokens, np.arange(0, tokens.size, 50))
    assert found == [np.bincount(tokens, minlength=VOCAB).tolist()] * 3


def test_a_tokenizers_folder_is_for_texts_too(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(TRAINED_ON))
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = np.concatenate([loaded(text)["input_ids"] for text in TRAINED_ON])
    frequency = count(tmp_path / "a.txt", tokenizer, TargetPolicy())
    assert frequency.counts.tolist() == np.bincount(ids, minlength=VOCAB).tolist()
    # Its special tokens are there, and its truncation is not.
    assert int(frequency.counts[1]) == 3
    assert ids.size > 3 * 5
    assert frequency.provenance.chat_template is None


def test_a_column_by_its_name(tmp_path, tokenizer, said):
    path = write(tmp_path / "a.jsonl", [{"talk": row["messages"], "messages": "seven"} for row in CHATS])
    frequency = count(path, tokenizer, TargetPolicy(learn="assistant", column="talk"))
    np.testing.assert_array_equal(frequency.counts.numpy(), said)


REFUSED = {
    "a role that the template refuses": (
        {"messages": [{"role": "critic", "content": "no"}]},
        r"cannot be rendered by the chat template of .*tokenizer \(critics are not heard\)",
    ),
    "nothing said": ({"messages": [{"role": "user", "content": "why?"}]}, "the assistant says nothing"),
    "a text": ({"prompt": "a", "completion": "b"}, "got a text, expected messages for learn assistant"),
    "two kinds": (
        {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
        "got 'prompt' and 'completion' of two kinds",
    ),
    "no chat": ({"prompt": "a", "text": "b"}, "has 'prompt', 'text', expected 'prompt' and 'completion', 'messages', "),
    "null": ({"messages": None}, "has nothing, expected 'prompt' and 'completion', 'messages'"),
    "token ids": ({"input_ids": [1, 2]}, "has 'input_ids', expected .* for token ids use --mask or --skip-prompt"),
    "no list": ({"messages": {"role": "user"}}, "'messages' is dict, expected a text or a list of messages"),
    "no messages": ({"messages": []}, "'messages' is an empty list, expected a text or a list of messages"),
    "no object": ({"messages": ["a"]}, "message 0 of 'messages' is str, expected an object with role and content"),
    "no role": ({"messages": [{"content": "a"}]}, "message 0 of 'messages' has 'content', expected role and content"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 of 'messages' has a content of NoneType"),
    "a stranger": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "b"}]},
        "message 1 of 'conversations' is from 'observation', expected one of human, user, gpt, assistant, system",
    ),
    "an image in a message": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
        "message 0 of 'messages' has a part of type 'image', expected text alone",
    ),
    "an image beside": ({**CHATS[0], "images": ["a.png"]}, "got 'images', expected text alone"),
    "tools": ({**CHATS[0], "tools": "bark"}, "'tools' is not JSON"),
    "one tool": ({**CHATS[0], "tools": {"name": "bark"}}, "'tools' is dict, expected a list"),
    "options": ({**CHATS[0], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is list, expected an object"),
    "another template": (
        {**CHATS[0], "chat_template_kwargs": {"chat_template": "a"}},
        "cannot be rendered by the chat template of .*chat_template",
    ),
    "half a character": ({"messages": [*chat(1), {"role": "user", "content": "\ud800"}]}, "is not Unicode text"),
    "Alpaca with a history": (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "got 'history' beside 'instruction', expected a chat under 'messages'",
    ),
    "Alpaca's number": ({"instruction": "a", "output": 3}, "'output' is int, expected a text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_file_and_place(name, tmp_path, tokenizer):
    row, message = REFUSED[name]
    path = write(tmp_path / "a.jsonl", [CHATS[0], row])
    place = path.read_bytes().index(b"\n") + 1
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 2 \(byte {place}\): {message}") as raised:
        count(path, tokenizer)
    assert "\n" not in str(raised.value)


KEYS = st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "greeting", "tools"])
WORDS = st.sampled_from(["user", "assistant", "human", "gpt", "text", "critic", "</s>", "the fox", "\ud800", "[1]"])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(KEYS, ANYTHING, min_size=2, max_size=3), max_size=3)
COLUMNS = ["prompt", "completion", "messages", "conversations", "text", "instruction", "input", "output", "tools"]
ROWS = st.dictionaries(st.sampled_from([*COLUMNS, "chat_template_kwargs"]), ANYTHING | MESSAGES, max_size=5)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, max_size=2), learn=st.sampled_from(["completions", "assistant", "all"]))
def test_odd_rows_are_counted_or_refused(rows, learn, tmp_path, tokenizer):
    encoder = SupervisedEncoder(ReadOptions(VOCAB, TargetPolicy(learn=learn), tokenizer=tokenizer), tmp_path / "a")
    check_damaged(lambda: list(encoder.batches(("the place", row) for row in rows)), "the place: ")


def test_a_row_that_the_tokenizer_refuses_or_that_is_too_long_is_named(tmp_path, tokenizer, monkeypatch):
    folder = shutil.copytree(tokenizer, tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {token["content"]: token["id"] for token in content["added_tokens"]}
    # Without an entry for unknown words.
    content["model"] = {"type": "WordLevel", "vocab": {**vocabulary, "a": 9, "p": 10}, "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for rows, learn, row in [
        ([{"text": text} for text in ("a", "a", "b", "a")], "all", 2),
        ([{"prompt": "<pad>", "completion": text} for text in ("a", "b")], "completions", 1),
    ]:
        path = write(tmp_path / "a.jsonl", rows)
        with pytest.raises(
            ValueError, match=rf"a\.jsonl: line {row + 1} \(byte \d+\): cannot be encoded by .*tokenizer "
        ):
            count(path, folder, TargetPolicy(learn=learn))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=rf"a\.parquet: row {row} of row group 0: cannot be encoded by"):
            count(tmp_path / "a.parquet", folder, TargetPolicy(learn=learn))
    monkeypatch.setattr("pdl_ext.corpus.reading.tokenizer.MAX_TEXT_BYTES", 2000)
    path = write(tmp_path / "long.jsonl", [*CHATS[:3], {"messages": [*chat(1)] * 30}])
    with pytest.raises(
        ValueError, match=r"line 4 \(byte \d+\): got a text of [\d,]+ characters, expected 2,000 at most"
    ):
        count(path, tokenizer)


def test_a_place_in_columns(tmp_path, tokenizer):
    path = write_columns(tmp_path / "a.parquet", [*CHATS[:71], {"messages": [{"role": "critic", "content": "no"}]}])
    with pytest.raises(ValueError, match=r"a\.parquet: row 1 of row group 1: cannot be rendered"):
        count(path, tokenizer)


@pytest.mark.parametrize(
    ("rows", "learn", "message"),
    [
        (CHATS, "completions", "got no prompt, expected 'prompt' and 'completion' for learn completions"),
        ([{"text": "the fox"}], "completions", "has 'text', expected 'prompt' and 'completion', 'messages'"),
        ([{"text": "the fox"}], "assistant", "has 'text', expected 'prompt' and 'completion', 'messages'"),
    ],
)
def test_what_the_policy_finds_nothing_in(rows, learn, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=rf"a\.jsonl: line 1 \(byte 0\): {message}"):
        count(write(tmp_path / "a.jsonl", rows), tokenizer, TargetPolicy(learn=learn))


def test_columns_that_hold_nothing_to_learn(tmp_path, tokenizer):
    pq.write_table(pa.table({"input_ids": [[1, 2]], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: got the columns input_ids, text, expected those of chats"):
        count(tmp_path / "a.parquet", tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chats_without_a_policy(name, tmp_path, tokenizer):
    path = (write if name == "a.jsonl" else write_columns)(tmp_path / name, CHATS)
    with pytest.raises(ValueError, match=r"messages.*choose the targets by --learn"):
        count(path, tokenizer, TargetPolicy())


def test_files_without_rows_of_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the fox\n")
    np.arange(9, dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.txt: got texts, and learn assistant \(--learn\), expected rows"):
        count(tmp_path / "a.txt", tokenizer)
    with pytest.raises(ValueError, match=r"a\.bin: holds token ids, and got learn assistant \(--learn\)"):
        count(tmp_path / "a.bin", tokenizer, dtype="uint16")


def test_tokenizers_that_cannot_do_it(tmp_path, tokenizer, without_template):
    path = write(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(ValueError, match=r"a\.jsonl: got no tokenizer, expected --tokenizer with the folder"):
        count(path, None)
    with pytest.raises(ValueError, match=r"a\.jsonl: got .*tokenizer\.json, expected --tokenizer with the folder"):
        count(path, tokenizer / "tokenizer.json")
    with pytest.raises(ValueError, match=r"got a chat, and .*base has no chat template"):
        count(path, without_template, TargetPolicy(learn="all"))
    unmarked = save_chat_tokenizer(tmp_path / "unmarked", UNMARKED)
    for folder in (unmarked, without_template):
        with pytest.raises(
            ValueError, match=rf"{folder.name}: got a chat template without .*get_training_chat_template"
        ):
            count(path, folder)
    assert count(path, unmarked, TargetPolicy(learn="all")).total > 0


def test_a_tokenizer_without_an_end(tmp_path, tokenizer):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    loaded.eos_token = None
    loaded.save_pretrained(tmp_path / "endless")
    path = write(tmp_path / "a.jsonl", [{"text": "the fox"}])
    with pytest.raises(ValueError, match=r"endless: got a tokenizer without an EOS token, which a trainer adds"):
        count(path, tmp_path / "endless", TargetPolicy(learn="all"))


@pytest.mark.parametrize("damage", ["empty", "not json", "code", "weights alone"])
def test_folders_that_are_no_tokenizer(damage, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    if damage == "weights alone":
        (folder / "model.safetensors").write_bytes(bytes(99))
    if damage == "not json":
        (folder / "tokenizer_config.json").write_text("{")
    if damage == "code":
        # What runs only with trust_remote_code.
        configuration = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
        (folder / "own.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\nclass Own: pass\n")
    path = write(tmp_path / "a.jsonl", CHATS)
    with pytest.raises(ValueError, match=r"folder: (got a folder without|is damaged or not a folder of)") as raised:
        count(path, folder)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize("module", ["transformers", "jinja2"])
def test_without_the_libraries(module, tmp_path, monkeypatch, tokenizer):
    path = write(tmp_path / "a.jsonl", CHATS)
    monkeypatch.setitem(sys.modules, module, None)
    pretrained._load_pretrained.cache_clear()
    pretrained._load.cache_clear()
    with pytest.raises(ImportError, match=rf'{module} is not installed: run `pip install "pdl_ext\[chat\]"`'):
        count(path, tokenizer)


def test_a_tokenizer_that_is_replaced_during_the_count(tmp_path, monkeypatch):
    folder = save_chat_tokenizer(tmp_path / "tokenizer")
    path = write(tmp_path / "a.jsonl", CHATS)
    count_part = counting._Worker._count_part

    def replaced_before(self, *taken):
        (folder / "chat_template.jinja").write_text(UNMARKED)
        return count_part(self, *taken)

    monkeypatch.setattr(counting._Worker, "_count_part", replaced_before)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: changed while it was counted"):
        count(path, folder)


def test_what_is_kept_with_the_counts(tmp_path, tokenizer):
    path, other = (write(tmp_path / f"{name}.jsonl", CHATS[start:]) for name, start in (("a", 0), ("b", 150)))
    policy = TargetPolicy(learn="all", max_length=20, packing="bfd")
    frequency = count(path, tokenizer, policy)
    provenance = frequency.provenance
    assert (provenance.policy, provenance.policy.targets) == (policy, "shifted")
    # The tokenizer is the same whatever its template is, and both are the same wherever they lie.
    unmarked = save_chat_tokenizer(tmp_path / "unmarked", UNMARKED)
    of_unmarked = count(other, unmarked, policy).provenance
    of_copy = count(other, save_chat_tokenizer(tmp_path / "copy"), policy).provenance
    assert provenance.tokenizer == of_unmarked.tokenizer == of_copy.tokenizer
    assert provenance.chat_template == of_copy.chat_template != of_unmarked.chat_template
    with pytest.raises(ValueError, match="other: got counts of chat template"):
        provenance.merged(of_unmarked)
    with pytest.raises(ValueError, match="other: got counts with max_length=30, expected 20"):
        provenance.merged(count(other, tokenizer, TargetPolicy(learn="all", max_length=30, packing="bfd")).provenance)
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    loaded.eos_token = "<|end|>"
    loaded.save_pretrained(tmp_path / "ends")
    with pytest.raises(ValueError, match="other: got counts of tokenizer"):
        provenance.merged(count(other, tmp_path / "ends", policy).provenance)
    frequency.save(tmp_path / "counts.safetensors")
    assert TokenFrequency.load(tmp_path / "counts.safetensors").provenance == provenance


def test_a_checkpoint_of_another_policy_is_not_gone_on_from(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", CHATS)
    count(path, tokenizer, TargetPolicy(learn="all"), checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="checkpoint"):
        count(path, tokenizer, TargetPolicy(learn="all", max_length=9), checkpoint=tmp_path / "checkpoint")


def test_some_rows_are_encoded_at_a_time(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", CHATS * 20)
    (source,) = jsonl.FORMAT.open(path, ReadOptions(VOCAB, ASSISTANT, tokenizer=tokenizer))
    batches = [batch.tokens.size for batch in source.batches(Part(0, source.size, source.size))]
    assert len(batches) > 3
    assert max(batches) < sum(batches) / 2


def test_the_documented_command(tmp_path, monkeypatch, capsys, tokenizer, said):
    commands = re.findall(r"^pdl-ext (count chats\.jsonl .*)$", DOCS.read_text(), flags=re.MULTILINE)
    assert len(commands) == 1
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats.jsonl", CHATS)
    (tmp_path / "model").symlink_to(tokenizer)
    assert main(shlex.split(commands[0])) == 0
    np.testing.assert_array_equal(TokenFrequency.load("counts.safetensors").counts.numpy()[:VOCAB], said)
    capsys.readouterr()
    assert main(["show", "counts.safetensors", "--tokenizer", "model"]) == 0
    shown = capsys.readouterr()
    assert "learn assistant, max length 1024" in shown.out
    assert re.search(r"tokenizer [0-9a-f]{32}, special tokens, chat template [0-9a-f]{32}$", shown.out, re.MULTILINE)
    assert "'<|end|>'" in shown.out
    assert shown.err == ""
