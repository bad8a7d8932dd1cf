"""The origin of counts: the files, the tokens counted in them, and the tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pdl_ext._checks import check_choice, check_flag, check_ignore_index, check_integer
from pdl_ext._printable import printable, warn
from pdl_ext.storage.place import Place

__all__ = ["Provenance", "Shard", "TargetPolicy", "shard_digest"]

TARGETS = ("all", "shifted")
SAMPLES = ("line", "document")
LEARNED = ("completions", "assistant", "all")
PACKINGS = ("bfd", "bfd_split", "wrapped")
# Smaller files are equal by chance: one document of a few tokens or words per file. The overhead of some formats is one
# to three KB.
_LEAST_COMPARED_BYTES = 4096
# Of the beginning and of the end each. A change that keeps both, and the size, is not detected.
_DIGESTED_BYTES = 16 * 1024


@dataclass(frozen=True)
class TargetPolicy:
    """Which tokens of a corpus are counted as targets.

    Args:
        targets: "all", or "shifted" without the first token of each sequence, which nothing predicts.
        ignore_index: an id that is never a target.
        column: the column of the tokens or of the text, None for the format's own.
        mask: a column that is 0 where a token is not a target.
        skip_prompt: a column of labels, ignore_index where a token belongs to the prompt.
        special_tokens: whether a tokenizer adds them to text.
        sample_by: one text of a plain text file is a "line" or the whole "document".
        learn: the targets of supervised finetuning in rows of chats, prompts and completions, or texts: "completions",
            the turns of the "assistant", or "all". It implies the targets "shifted". None for token ids and plain text.
        max_length: with learn, how many tokens of a row are trained on. None for all.
        packing: with learn and max_length, how rows become sequences, by TRL's names: "bfd", "bfd_split", "wrapped".
            None for one row a sequence, which has the same targets as "bfd".

    Raises TypeError or ValueError that names the option.
    """

    targets: str = "all"
    ignore_index: int = -100
    column: str | None = None
    mask: str | None = None
    skip_prompt: str | None = None
    special_tokens: bool = True
    sample_by: str = "line"
    learn: str | None = None
    max_length: int | None = None
    packing: str | None = None

    def __post_init__(self) -> None:
        check_choice("targets", self.targets, TARGETS)
        check_ignore_index(self.ignore_index)
        for name in ("column", "mask", "skip_prompt"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: got {value!r}, expected the name of a column or None")
        check_flag("special_tokens", self.special_tokens)
        check_choice("sample_by", self.sample_by, SAMPLES)
        if self.learn is not None:
            self._check_learn()
        elif self.max_length is not None or self.packing is not None:
            name = "packing" if self.max_length is None else "max_length"
            raise ValueError(f"{name}: got {getattr(self, name)!r} without learn, expected one of {LEARNED} as learn")

    def _check_learn(self) -> None:
        check_choice("learn", self.learn, LEARNED)
        for name, without in (("mask", None), ("skip_prompt", None), ("special_tokens", True)):
            if getattr(self, name) != without:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with learn={self.learn!r}, expected {without}: learn itself "
                    "selects the tokens of a row, special tokens included"
                )
        if self.max_length is not None:
            check_integer("max_length", self.max_length, 1, 2**31 - 1, "None or an int from 1 to 2^31 - 1")
        if self.packing is not None:
            check_choice("packing", self.packing, PACKINGS)
            if self.max_length is None:
                raise ValueError(f"packing: got {self.packing!r} without max_length, expected the length of sequences")
        object.__setattr__(self, "targets", "shifted")


class Shard(NamedTuple):
    """A file that was counted: its name, size in bytes, digest of its head and tail, format and dtype."""

    name: str
    size: int
    digest: str
    format: str
    dtype: str


@dataclass(frozen=True)
class Provenance:
    """The origin of the counts of a TokenFrequency.

    Args:
        shards: the files counted, in order.
        tokens: how many tokens they hold, counted or not.
        policy: which of the tokens were counted.
        tokenizer: the digest of the tokenizer, None for files of ids.
        version: the version of pdl_ext that counted.
        chat_template: the digest of the tokenizer's chat template, None without one or without policy.learn.
    """

    shards: tuple[Shard, ...]
    tokens: int
    policy: TargetPolicy
    tokenizer: str | None
    version: str
    chat_template: str | None = None

    def merged(self, other: Provenance, *, allow_overlap: bool = False) -> Provenance:
        """The provenance of both counts together.

        Raises ValueError that names the difference if policies or tokenizers differ, or a shard that both have.
        """
        for field in dataclasses.fields(TargetPolicy):
            mine, theirs = getattr(self.policy, field.name), getattr(other.policy, field.name)
            if mine != theirs:
                raise ValueError(f"other: got counts with {field.name}={theirs!r}, expected {mine!r}: another policy")
        if self.tokenizer != other.tokenizer:
            raise ValueError(f"other: got counts of tokenizer {other.tokenizer}, expected {self.tokenizer}")
        if self.chat_template != other.chat_template:
            raise ValueError(f"other: got counts of chat template {other.chat_template}, expected {self.chat_template}")
        # Only between the two: within one it was allowed before.
        if not allow_overlap and _may_overlap(self.shards, other.shards):
            check_distinct(other.shards, among=self.shards)
        shards = self.shards + other.shards
        return dataclasses.replace(self, shards=shards, tokens=self.tokens + other.tokens)

    def to_json(self) -> str:
        """The provenance as JSON, for from_json."""
        # Not asdict of the whole, which copies the shards one by one.
        return json.dumps({**vars(self), "policy": dataclasses.asdict(self.policy)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Reads the text that to_json wrote. Raises ValueError for any other text."""
        try:
            fields: Mapping[str, Any] = json.loads(text)
            shards = tuple(Shard(*shard) for shard in fields["shards"])
            policy = TargetPolicy(**fields["policy"])
            tokens, tokenizer, version = fields["tokens"], fields["tokenizer"], fields["version"]
            # Counts of earlier versions have none.
            chat_template = fields.get("chat_template")
            for size in (tokens, *(shard.size for shard in shards)):
                check_integer("size or tokens", size, 0, 2**63 - 1, "an int >= 0")
            names = [name for shard in shards for name in (shard.name, shard.digest, shard.format, shard.dtype)]
            if not all(isinstance(name, str) for name in (version, tokenizer or "", chat_template or "", *names)):
                raise TypeError("got a name that is not text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"no provenance of counts ({error!r})") from error
        return cls(shards, tokens, policy, tokenizer, version, chat_template)


def _may_overlap(first: tuple[Shard, ...], second: tuple[Shard, ...]) -> bool:
    # A set of the smaller side only: merging many files makes one side grow with each.
    few, many = sorted((first, second), key=len)
    digest = operator.attrgetter("digest")
    return not set(map(digest, few)).isdisjoint(map(digest, many))


def check_distinct(shards: Iterable[Shard], among: Iterable[Shard] | None = None) -> None:
    """Raises ValueError that names two shards of equal content, by size, head and tail.

    among: if given, a shard is compared with these instead of with the other shards.
    Shards below 4,096 bytes only give one warning, unless all shards are in `among`.
    """
    seen = {(shard.size, shard.digest): shard.name for shard in among or ()}
    # Empty shards have no tokens to count twice.
    shards = [shard for shard in shards if shard.size]
    small = []
    for shard in shards:
        content = (shard.size, shard.digest)
        if content not in seen:
            if among is None:
                seen[content] = shard.name
            continue
        small.append((shard.name, seen[content]))
        # If every shard is among the others, this is not by chance.
        if shard.size >= _LEAST_COMPARED_BYTES or (among is not None and len(small) == len(shards)):
            name, other = printable(shard.name), printable(seen[content])
            raise ValueError(
                f"{name}: got the same content as {other}, by size, head and tail, expected each shard once: "
                "allow_overlap (--allow-overlap) counts it again"
            )
    if small:
        others = f", and {len(small) - 1} other files like it" if len(small) > 1 else ""
        warn(
            f"{small[0][0]}: has the same content as {small[0][1]}{others}: each is counted, since files below "
            f"{_LEAST_COMPARED_BYTES} bytes may be equal by chance (allow_overlap, --allow-overlap: no warning)"
        )


def shard_digest(path: Place) -> str:
    """A digest of a file's size, head and tail, 32 hexadecimal digits. Raises OSError if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_DIGESTED_BYTES))
        if size > _DIGESTED_BYTES:
            file.seek(max(size - _DIGESTED_BYTES, _DIGESTED_BYTES))
            digest.update(file.read(_DIGESTED_BYTES))
    return digest.hexdigest()
