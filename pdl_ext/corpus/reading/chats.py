"""Rows of supervised finetuning: chats, prompts with completions, and texts, by the usual names of columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pdl_ext.corpus.source import ReadOptions

__all__ = ["Chat", "Messages", "Text", "are_chats", "columns_to_learn", "example_of"]

Messages = list[dict[str, Any]]

_PROMPT = ("prompt", "completion")
_ALPACA = ("instruction", "output")
_TEXT = ("text",)
# The first of these that a row has is used.
_LAYOUTS = (_PROMPT, ("messages",), ("conversations",), _TEXT, _ALPACA)
# Further columns: arguments of chat templates, Alpaca's input, and columns that are refused.
_BESIDE = ("tools", "chat_template_kwargs", "input", "system", "history", "image", "images")
# ShareGPT's names of the speakers.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Stanford Alpaca's prompts, for tokenizers without a chat template.
_ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Text(NamedTuple):
    """A row of text: an answer, with or without a prompt before it."""

    prompt: str | None
    answer: str


class Chat(NamedTuple):
    """A row of messages: an answer, with or without a prompt before it.

    tools, template_options: the row's arguments of the chat template.
    """

    prompt: Messages | None
    answer: Messages
    tools: list[Any] | None = None
    template_options: Mapping[str, Any] = MappingProxyType({})


class _MessagePlace(NamedTuple):
    """The position of a message, for errors. The row's place may search for its line only when it is printed."""

    of_row: object
    number: int
    column: str

    def __str__(self) -> str:
        return f"{self.of_row}: message {self.number} of {self.column!r}"


def are_chats(names: Collection[str]) -> bool:
    """Whether rows with these columns are chats or prompts with completions."""
    return any(all(name in names for name in layout) for layout in _LAYOUTS if layout != _TEXT)


def columns_to_learn(names: Collection[str], options: ReadOptions) -> list[str]:
    """The columns that `example_of` reads; empty if they contain no targets of options.policy.learn."""
    if not any(all(name in names for name in layout) for layout in _layouts(options)):
        return []
    wanted = {name for layout in _layouts(options) for name in layout}
    return [name for name in names if name in wanted or name in _BESIDE]


def example_of(row: Mapping[str, Any], options: ReadOptions, place: object, *, has_template: bool) -> Chat | Text:
    """The example to learn from a row. A column that is null counts as missing.

    place: of the row, for errors; has_template: whether Alpaca's rows become chats instead of texts.
    Raises ValueError that names the place and the column, for a row without an example or with an unexpected value.
    """
    row = {name: value for name, value in row.items() if value is not None}
    layout = next((names for names in _layouts(options) if all(name in row for name in names)), None)
    if layout is None:
        expected = ", ".join(" and ".join(map(repr, names)) for names in _layouts(options))
        raise ValueError(
            f"{place}: has {', '.join(map(repr, list(row)[:10])) or 'nothing'}, expected {expected} for learn "
            f"{options.policy.learn} (--learn; --column names another; for token ids use --mask or --skip-prompt)"
        )
    for name in ("image", "images"):
        if row.get(name):
            raise ValueError(
                f"{place}: got {name!r}, expected text alone: only a processor of images knows their tokens"
            )
    if layout == _ALPACA:
        return _alpaca(row, place, has_template)
    *prompts, answer = (_content(row, name, place) for name in layout)
    prompt = prompts[0] if prompts else None
    if isinstance(answer, str) and not isinstance(prompt, list):
        return Text(prompt, answer)
    if isinstance(answer, list) and not isinstance(prompt, str):
        return Chat(prompt, answer, _tools(row, place), _template_options(row, place))
    raise ValueError(f"{place}: got {' and '.join(map(repr, layout))} of two kinds, expected two texts or two chats")


def _layouts(options: ReadOptions) -> list[tuple[str, ...]]:
    if options.policy.column is not None:
        return [(options.policy.column,)]
    return [layout for layout in _LAYOUTS if layout != _TEXT or options.policy.learn == "all"]


def _content(row: Mapping[str, Any], name: str, place: object) -> Messages | str:
    value = row[name]
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"{place}: {name!r} is {kind}, expected a text or a list of messages")
    return [_message(message, _MessagePlace(place, number, name)) for number, message in enumerate(value)]


def _tools(row: Mapping[str, Any], place: object) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: 'tools' is not JSON ({error}), expected a list") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{place}: 'tools' is {type(tools).__name__}, expected a list")
    return tools


def _template_options(row: Mapping[str, Any], place: object) -> Mapping[str, Any]:
    options = row.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise ValueError(f"{place}: 'chat_template_kwargs' is {type(options).__name__}, expected an object")
    return options


def _message(message: Any, place: object) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{place} is {type(message).__name__}, expected an object with role and content")
    # Columns of Arrow have all keys in all rows.
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise ValueError(f"{place} is from {speaker!r}, expected one of {', '.join(_ROLES)}")
        message = {"role": _ROLES[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise ValueError(
            f"{place} has {', '.join(map(repr, list(message)[:10])) or 'nothing'}, expected role and content"
        )
    _check_content(message, place)
    return message


def _check_content(message: Mapping[str, Any], place: object) -> None:
    content = message.get("content")
    # A message that calls a tool may have no content.
    if isinstance(content, str) or (content is None and "tool_calls" in message):
        return
    if not isinstance(content, list):
        raise ValueError(f"{place} has a content of {type(content).__name__}, expected a text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{place} has a part of type {kind!r}, expected text alone")


def _alpaca(row: Mapping[str, Any], place: object, has_template: bool) -> Chat | Text:
    for name in ("system", "history"):
        if row.get(name):
            raise ValueError(f"{place}: got {name!r} beside 'instruction', expected a chat under 'messages' for it")
    instruction, given, output = (row.get(name, "") for name in ("instruction", "input", "output"))
    for name, value in (("instruction", instruction), ("input", given), ("output", output)):
        if not isinstance(value, str):
            raise ValueError(f"{place}: {name!r} is {type(value).__name__}, expected a text")
    if not has_template:
        prompt = _ALPACA_PROMPT_WITH_INPUT if given else _ALPACA_PROMPT
        return Text(prompt.format(instruction=instruction, input=given), output)
    asked = f"{instruction}\n{given}" if given else instruction
    return Chat([{"role": "user", "content": asked}], [{"role": "assistant", "content": output}])
