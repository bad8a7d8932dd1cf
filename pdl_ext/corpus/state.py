"""The state of a count: totals and finished parts, in one file that is written completely or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from pdl_ext.corpus.table import Table
from pdl_ext.frequency import TokenFrequency
from pdl_ext.storage.place import Place
from pdl_ext.storage.tensor_file import read_tensors, write_tensors

__all__ = ["State"]

_FORMAT = "pdl_ext.corpus.State/2"


class State:
    """The counts of a corpus' finished parts.

    frequency: the counts; finished: uint8 [parts]; identity: a digest of the corpus, its division into parts and the
    policy.
    """

    def __init__(self, frequency: TokenFrequency, finished: Tensor, identity: str) -> None:
        self.frequency = frequency
        self.finished = finished
        self.identity = identity

    @classmethod
    def empty(cls, vocab_size: int, ignore_index: int, parts: int, identity: str) -> State:
        """A state with nothing counted."""
        frequency = TokenFrequency(vocab_size, ignore_index=ignore_index)
        return cls(frequency, torch.zeros(parts, dtype=torch.uint8, device="cpu"), identity)

    def add(self, table: Table, parts: list[int]) -> None:
        """Adds the counts of parts that are now finished."""
        table.move_to(self.frequency)
        self.finished[parts] = 1

    def adopt(self, other: State) -> None:
        """Adds another state of the same count; one that was added before changes nothing.

        Raises ValueError if some of its parts, but not all, are finished here.
        """
        both = int((self.finished & other.finished).sum())
        if both == 0:
            self.frequency.merge(other.frequency)
            self.finished |= other.finished
        elif both != int(other.finished.sum()):
            raise ValueError("checkpoint: got two that counted the same part, expected each part in one")

    def save(self, path: Place) -> None:
        """Raises OSError that names the path, with the old file untouched."""
        tensors = {f"frequency.{name}": buffer for name, buffer in self.frequency.state_dict().items()}
        tensors["finished"] = self.finished
        write_tensors(path, tensors, {"format": _FORMAT, "identity": self.identity})

    @classmethod
    def load(cls, path: Place, like: State) -> State:
        """The state that was saved of the same count as `like`.

        Raises ValueError for a state that is damaged, or of another corpus, policy or vocabulary.
        """
        tensors, metadata = read_tensors(path, "checkpoint", _FORMAT)
        loaded = cls.empty(like.frequency.vocab_size, like.frequency.ignore_index, like.finished.numel(), like.identity)
        if metadata["identity"] != like.identity:
            if not bool(tensors["finished"].any()):
                # A count with wrong arguments, which holds nothing.
                return loaded
            raise ValueError(
                f"checkpoint: {path} is that of another count (files, options or pdl_ext's version differ), expected "
                "this one's: delete it to begin anew"
            )
        loaded.finished = tensors["finished"]
        # Not load_state_dict: a later `sync` would then treat the counts as shared by all ranks instead of this rank's
        # own.
        for name, buffer in loaded.frequency.named_buffers():
            buffer.copy_(tensors[f"frequency.{name}"])
        return loaded
