"""The targets of supervised finetuning in rows of chats, prompts and completions, as TRL's SFTTrainer computes them."""

from __future__ import annotations

import functools
import itertools
import re
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdl_ext._optional import require
from pdl_ext.corpus.reading.chats import Chat, Messages, Text, example_of
from pdl_ext.corpus.reading.pretrained import errors_told_as, load_pretrained, load_tokenizer
from pdl_ext.corpus.reading.tokenizer import PlacedText, encoded, in_chunks
from pdl_ext.corpus.source import Batch, ReadOptions
from pdl_ext.storage.place import Place

__all__ = ["SupervisedEncoder"]

# The number of rows that TRL packs together, which is the default of the map of `datasets`.
_ROWS_PACKED = 1000
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Earlier releases of transformers keep the spans in the compiled template, which all threads share.
_rendering = threading.Lock()


class _Rendered(NamedTuple):
    """A row as texts: the whole, its prompt if that is not learned, and the spans of the assistant's turns.

    is_chat: whether the template has written the special tokens.
    """

    place: object
    text: str
    prompt: str | None
    spans: list[tuple[int, int]]
    is_chat: bool


class SupervisedEncoder:
    """Encodes rows as TRL's SFTTrainer does, and marks its targets by policy.learn, max_length and packing.

    Chats are rendered by the tokenizer's template. Texts get its special tokens, and end with its EOS.

    options.tokenizer: the folder of a transformers tokenizer; path: the file of the rows, for errors.
    Threads may share it. Raises ValueError without such a tokenizer, and for a chat template without marks if the
    policy needs them. Warns as load_tokenizer does.
    """

    def __init__(self, options: ReadOptions, path: Place) -> None:
        self._options = options
        self._learn = options.policy.learn
        folder = options.tokenizer
        if not isinstance(folder, Path) or not folder.is_dir():
            raise ValueError(
                f"{path}: got {'no tokenizer' if folder is None else folder}, expected --tokenizer with the folder of "
                "a transformers tokenizer, as save_pretrained writes it, for learn (--learn)"
            )
        self._folder = folder
        self._tokenizer = load_tokenizer(options)
        self._pretrained = load_pretrained(folder)
        self._special_tokens = self._pretrained.special_tokens_map
        self._render_template = require("transformers.utils.chat_template_utils", "chat").render_jinja_template
        self._has_template = self._pretrained.chat_template is not None
        if self._learn == "assistant":
            self._check_marks()

    def batches(self, rows: Iterable[tuple[object, Mapping[str, Any]]]) -> Iterator[Batch]:
        """The tokens of consecutive rows, uint32, and which of them are targets.

        rows: each with its place, for errors. Raises ValueError that names the place, for a row with unexpected content
        or one that the template refuses. If only the assistant is learned, it also raises for a row in which it says
        nothing.
        """
        sequences = _Sequences(self._options)
        rendered = (self._rendered(place, row) for place, row in rows)
        for chunk in in_chunks(rendered, _characters):
            of_runs = [self._encoded(list(run)) for _, run in itertools.groupby(chunk, lambda row: row.is_chat)]
            ids, learned = zip(*itertools.chain.from_iterable(of_runs), strict=True)
            is_target = [mask & sequences.predicted(mask.size) for mask in learned]
            yield Batch(np.concatenate(ids), np.concatenate(is_target))

    def _check_marks(self) -> None:
        template = self._pretrained.get_chat_template() if self._has_template else ""
        if not _GENERATION.search(template):
            raise ValueError(
                f"{self._folder}: got a chat template without {{% generation %}}, expected the assistant's turns "
                "between {% generation %} and {% endgeneration %}, for learn assistant (--learn). Put the marks there, "
                "or learn completions, or save a tokenizer with tokenizer.chat_template = "
                "trl.chat_template_utils.get_training_chat_template(tokenizer)"
            )

    def _rendered(self, place: object, row: Mapping[str, Any]) -> _Rendered:
        example = example_of(row, self._options, place, has_template=self._has_template)
        if example.prompt is None and self._learn == "completions":
            raise ValueError(
                f"{place}: got no prompt, expected 'prompt' and 'completion' for learn completions (--learn). For a "
                "chat without a prompt use assistant or all, for a text all"
            )
        return self._of_chat(example, place) if isinstance(example, Chat) else self._of_text(example, place)

    def _of_chat(self, chat: Chat, place: object) -> _Rendered:
        if not self._has_template:
            raise ValueError(
                f"{place}: got a chat, and {self._folder} has no chat template, expected the tokenizer of a chat model"
            )
        text, spans = self._from_template([*(chat.prompt or ()), *chat.answer], chat, place)
        prompt = None
        if chat.prompt is not None and self._learn != "all":
            prompt, _ = self._from_template(chat.prompt, chat, place, add_generation_prompt=True)
        return _Rendered(place, _unicode(text, place), prompt, spans, is_chat=True)

    def _of_text(self, example: Text, place: object) -> _Rendered:
        if self._learn == "assistant":
            raise ValueError(f"{place}: got a text, expected messages for learn assistant (--learn)")
        end = self._pretrained.eos_token
        if end is None:
            raise ValueError(f"{self._folder}: got a tokenizer without an EOS token, which a trainer adds to each text")
        text = example.answer if example.answer.endswith(end) else example.answer + end
        prompt = None if self._learn == "all" else example.prompt
        return _Rendered(place, _unicode((example.prompt or "") + text, place), prompt, [], is_chat=False)

    def _from_template(
        self, messages: Messages, chat: Chat, place: object, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        marked = self._learn == "assistant" and not add_generation_prompt
        with _rendering, errors_told_as(f"cannot be rendered by the chat template of {self._folder}", place):
            (text,), spans = self._render_template(
                conversations=[messages],
                tools=chat.tools,
                chat_template=self._pretrained.get_chat_template(tools=chat.tools),
                return_assistant_tokens_mask=marked,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **chat.template_options},
            )
        return text, spans[0] if marked else []

    def _encoded(self, rows: list[_Rendered]) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """The ids of rows, either all chats or none, and which of them are targets."""
        encodings = self._encode([PlacedText(row.place, row.text) for row in rows], rows[0].is_chat)
        prompts = [PlacedText(row.place, row.prompt) for row in rows if row.prompt is not None]
        ids_of_prompts = map(_ids, self._encode(prompts, rows[0].is_chat))
        for row, encoding in zip(rows, encodings, strict=True):
            ids = _ids(encoding)
            learned = np.ones(ids.size, np.bool_)
            if self._learn == "assistant":
                learned = _overlapping(encoding.offsets, row.spans)
                if not learned.any():
                    raise ValueError(f"{row.place}: the assistant says nothing, expected something to learn from")
            if row.prompt is not None:
                learned[: _common_prefix(next(ids_of_prompts), ids)] = False
            yield ids, learned

    def _encode(self, texts: list[PlacedText], is_chat: bool) -> list[Any]:
        # encode_batch_fast omits the offsets.
        encode = self._tokenizer.encode_batch if self._learn == "assistant" else self._tokenizer.encode_batch_fast
        return encoded(texts, functools.partial(encode, add_special_tokens=not is_chat), self._folder)


class _Sequences:
    """The beginnings of a trainer's sequences among the tokens of consecutive rows."""

    def __init__(self, options: ReadOptions) -> None:
        self._packing = options.policy.packing
        self._length = options.policy.max_length
        self._rows = 0
        self._begun = 0

    def predicted(self, size: int) -> NDArray[np.bool_]:
        """Which of the next row's tokens are predicted: not the first of a sequence, and not those cut off."""
        predicted = np.ones(size, np.bool_)
        if self._packing == "wrapped" and self._length is not None:
            if self._rows == _ROWS_PACKED:
                self._rows = self._begun = 0
            predicted[-self._begun % self._length :: self._length] = False
            self._rows += 1
            self._begun = (self._begun + size) % self._length
        elif self._packing == "bfd_split":
            predicted[:: self._length] = False
        else:
            predicted[:1] = False
            predicted[size if self._length is None else self._length :] = False
        return predicted


def _characters(row: _Rendered) -> int:
    return len(row.text) + len(row.prompt or "")


def _unicode(text: str, place: object) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair.
        raise ValueError(f"{place}: is not Unicode text ({error.reason})") from error
    return text


def _ids(encoding: Any) -> NDArray[np.uint32]:
    return np.asarray(array("I", encoding.ids), np.uint32)


def _common_prefix(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> int:
    size = min(first.size, second.size)
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if differ.size else size


def _overlapping(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which tokens share a character with one of the spans, which are in order."""
    # Twice as fast as np.array of the pairs.
    begins, ends = np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    # The first span that does not end before the token, or the last entry, which is after every token.
    of_spans = np.array([*spans, (2**62, 2**62)], np.int64)
    return ends > of_spans[np.searchsorted(of_spans[:-1, 1], begins, side="right"), 0]
