"""With `learn`, the counts of a file are TRL's SFTTrainer's targets: id by id, by its own dataloader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import fresh_python
import numpy as np
import pytest
from chat_tokenizer import TEMPLATE, VOCAB, save_chat_tokenizer

from pdl_ext.corpus import TargetPolicy, count_corpus

pytest.importorskip("pyarrow", reason="needs pdl_ext[corpus]")
pytest.importorskip("trl", minversion="1.16", reason="needs pdl_ext[trl], of the release that is compared with")
pytest.importorskip("datasets", reason="needs pdl_ext[trl]")

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("trl_counts.py")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog,", "and", "why", "not?", "Größe", "🙂"]
# Shorter than many rows, and longer than others.
LENGTH = 48
LENGTH_OF_TEXTS = 20
# More than TRL packs at once.
MANY = 1100


def said(number: int, words: int) -> str:
    return " ".join(WORDS[(number + 3 * index) % len(WORDS)] for index in range(words))


def turns(number: int) -> list[tuple[str, str]]:
    """Who says what in a chat: short ones and long ones, with and without a system's, one with nothing said."""
    system = [("system", said(number, 2))] if number % 3 == 0 else []
    first = [("user", said(number, 1 + number % 7)), ("assistant", said(number + 1, 1 + 5 * number % 11))]
    second = [("user", said(number, 2)), ("assistant", "" if number == 4 else said(number, 3))] if number % 2 else []
    return [*system, *first, *second]


def messages(number: int) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns(number)]


def prompt_and_completion(number: int) -> dict[str, Any]:
    """A chat, cut before what is said last, or behind what the user has said first."""
    chat = messages(number)
    cut = len(chat) - (3 if number % 4 == 1 else 1)
    return {"prompt": chat[:cut], "completion": chat[cut:]}


def alpaca(number: int) -> dict[str, str]:
    given = said(number, 3) if number % 2 else ""
    return {"instruction": said(number, 4), "input": given, "output": said(number + 5, 1 + number % 9)}


def prompt_of_alpaca(row: dict[str, str]) -> str:
    if not row["input"]:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        f"response that appropriately completes the request.\n\n### Instruction:\n{row['instruction']}\n\n"
        f"### Input:\n{row['input']}\n\n### Response:\n"
    )


def chat_of_alpaca(row: dict[str, str]) -> dict[str, Any]:
    asked = "\n".join(filter(None, [row["instruction"], row["input"]]))
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


TOOLS = [{"type": "function", "function": {"name": "bark", "parameters": {}}}]
# What pdl_ext counts.
ROWS = {
    "messages": [{"messages": messages(n)} for n in range(30)],
    "many": [{"messages": messages(n)[:3]} for n in range(MANY)],
    "tools": [
        {"messages": messages(n), "tools": json.dumps(TOOLS), "chat_template_kwargs": {"greeting": "hello " * n}}
        for n in range(3)
    ],
    "parts": [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": said(n, 4)}]}, *messages(n)]}
        for n in (1, 2)
    ],
    "from and value": [
        {"conversations": [{"from": role, "value": content} for role, content in turns(n)]} for n in range(9)
    ],
    "ShareGPT": [
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
                for role, content in turns(n)
            ]
        }
        for n in range(9)
    ],
    "conversations": [{"conversations": messages(n)} for n in range(9)],
    # Of which some end within a token, or in the mark of the end.
    "prompts": [
        {"prompt": said(n, 1 + n % 5) + " " * (n % 2), "completion": said(n + 2, n % 12) + "</s>" * (n % 4 == 3)}
        for n in range(30)
    ],
    "prompts of chats": [prompt_and_completion(n) for n in range(30)],
    "texts": [{"text": said(n, n % 20) + "</s>" * (n % 4 == 3)} for n in range(30)],
    "Alpaca": [alpaca(n) for n in range(12)],
    "Alpaca as texts": [alpaca(n) for n in range(12)],
}
# What TRL is given instead, where it does not know these columns.
FOR_TRL = {
    "ShareGPT": [{"messages": messages(n)} for n in range(9)],
    "conversations": [{"messages": row["conversations"]} for row in ROWS["conversations"]],
    "Alpaca": [chat_of_alpaca(row) for row in ROWS["Alpaca"]],
    "Alpaca as texts": [
        {"prompt": prompt_of_alpaca(row), "completion": row["output"]} for row in ROWS["Alpaca as texts"]
    ],
}
LEARNED = {
    "messages": ["all", "assistant"],
    "prompts": ["all", "completions"],
    "prompts of chats": ["all", "completions", "assistant"],
    "texts": ["all"],
}
# All where it is the rest of a row that differs.
OTHERS = [
    ("many", "all", "wrapped"),
    ("tools", "all", None),
    ("parts", "all", None),
    # Before it has made messages of them, TRL takes these for no chats, and refuses to learn the assistant of them.
    ("from and value", "all", None),
    ("ShareGPT", "assistant", None),
    ("conversations", "assistant", None),
    ("Alpaca", "all", None),
    ("Alpaca", "completions", None),
    ("Alpaca as texts", "all", None),
]
OPTIONS = {
    "all": {"completion_only_loss": False},
    "completions": {"completion_only_loss": True},
    "assistant": {"assistant_only_loss": True},
}


class Case(NamedTuple):
    """What is counted of which rows, and how they are packed and cut."""

    rows: str
    learn: str
    packing: str | None
    max_length: int | None

    def for_trl(self, folder: Path) -> dict[str, Any]:
        packed = {} if self.packing is None else {"packing": True, "packing_strategy": self.packing}
        return {
            "name": str(self),
            "file": str(folder / "trl" / f"{self.rows}.jsonl"),
            "tokenizer": str(tokenizer_of(folder, self.rows)),
            "options": {"max_length": self.max_length, **packed, **OPTIONS[self.learn]},
        }


CASES = [
    *(
        Case(rows, learn, packing, LENGTH_OF_TEXTS if cut and rows in ("prompts", "texts") else cut)
        for rows, policies in LEARNED.items()
        for learn in policies
        for packing, cut in [(None, None), *((packing, LENGTH) for packing in (None, "bfd", "bfd_split", "wrapped"))]
    ),
    *(Case(rows, learn, packing, packing and LENGTH) for rows, learn, packing in OTHERS),
]


def tokenizer_of(folder: Path, rows: str) -> Path:
    return folder / ("without a template" if rows == "Alpaca as texts" else "tokenizer")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of rows, for pdl_ext and for TRL, and tokenizers."""
    folder = tmp_path_factory.mktemp("chats")
    save_chat_tokenizer(folder / "tokenizer", TEMPLATE)
    save_chat_tokenizer(folder / "without a template", None)
    (folder / "trl").mkdir()
    for name, rows in ROWS.items():
        write_lines(folder / f"{name}.jsonl", rows)
        write_lines(folder / "trl" / f"{name}.jsonl", FOR_TRL.get(name, rows))
    return folder


@pytest.fixture(scope="module")
def of_trl(folder):
    cases = {"vocab_size": VOCAB, "cases": [case.for_trl(folder) for case in CASES]}
    (folder / "cases.json").write_text(json.dumps(cases))
    fresh_python.run(SCRIPT, folder / "cases.json", folder / "counts.npz", timeout=120, check=True)
    return np.load(folder / "counts.npz")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_counts_are_those_of_its_dataloader(case, folder, of_trl):
    policy = TargetPolicy(learn=case.learn, max_length=case.max_length, packing=case.packing)
    file = folder / f"{case.rows}.jsonl"
    frequency = count_corpus([file], VOCAB, policy=policy, tokenizer=tokenizer_of(folder, case.rows))
    expected = of_trl[str(case)]
    assert expected.sum() > 20
    np.testing.assert_array_equal(frequency.counts.numpy(), expected)
