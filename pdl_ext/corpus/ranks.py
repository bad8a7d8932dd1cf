"""A count over several processes: the division of the parts, and the sum of the counts."""

from __future__ import annotations

import glob
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pdl_ext.corpus.state import State
from pdl_ext.storage.place import Place

__all__ = ["checkpoint_of_rank", "checkpoints", "share", "total"]


def checkpoint_of_rank(checkpoint: Place | None, group: Any) -> Place | None:
    """The path of this rank's own checkpoint."""
    return None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}-{_rank(group)}")


def checkpoints(checkpoint: Place) -> list[Place]:
    """The checkpoints of all ranks that are visible on this machine."""
    found = {path.name.rpartition("-")[2]: path for path in checkpoint.parent.glob(f"{glob.escape(checkpoint.name)}-*")}
    return [found[rank] for rank in sorted(filter(str.isdecimal, found), key=int)]


def share(state: State, sizes: list[int], checkpoint: Place | None, group: Any) -> list[int]:
    """The parts that this rank has to count: an even share of those that no rank has finished.

    Each rank's state resumes its own checkpoint. The first rank adopts all that it sees, of any number of ranks, and
    deletes the others. So checkpoints may also be on each machine's own disk.
    Raises ValueError if the ranks do not count the same data, or if a checkpoint is of another count or damaged.
    """
    identities: list[Any] = [state.identity]
    if group is not None:
        identities = [None] * dist.get_world_size(group)
        dist.all_gather_object(identities, state.identity, group=group)
    if len(set(identities)) != 1:
        raise ValueError("data: got different files or options over the ranks, expected the same on all")
    own = checkpoint_of_rank(checkpoint, group)
    if checkpoint is not None and _rank(group) == 0:
        _take_over(state, checkpoint)
    if group is not None:
        dist.barrier(group)
    if own is not None and _rank(group) != 0 and own.exists():
        state.adopt(State.load(own, state))
    finished = state.finished.to(torch.int32)
    if group is not None:
        finished = _all_reduce(finished, group)
    if finished.numel() and int(finished.max()) > 1:
        raise ValueError("checkpoint: got the same part counted by two ranks, expected each part in one checkpoint")
    return _own_parts(finished.tolist(), sizes, _rank(group), len(identities))


def total(state: State, group: Any) -> int:
    """Replaces the state's counts by those of all ranks; returns the number of tokens read.

    Raises RuntimeError on every rank if a part is missing, ValueError if the counts do not add up to the tokens read.
    """
    finished = state.finished.to(torch.int32)
    if group is not None:
        finished = _all_reduce(finished, group)
        frequency = state.frequency.to(_device(group))
        frequency.all_reduce(group)
        state.frequency = frequency.cpu()
    if not bool((finished == 1).all()):
        raise RuntimeError(f"got {int((finished != 1).sum())} parts not counted once, expected none")
    state.frequency.check_conserved("counts")
    return state.frequency.tokens_seen


def _take_over(state: State, checkpoint: Place) -> None:
    own = checkpoint_of_rank(checkpoint, None)
    others = checkpoints(checkpoint)
    for path in others:
        state.adopt(State.load(path, state))
    if others and own is not None:
        # Written before any is deleted: after a crash in between, adopting them again changes nothing.
        state.save(own)
        for path in others:
            if path != own:
                path.unlink()


def _own_parts(finished: list[int], sizes: list[int], rank: int, ranks: int) -> list[int]:
    todo = [index for index, done in enumerate(finished) if not done]
    total_size = sum(sizes[index] for index in todo)
    own, before = [], 0
    for index in todo:
        # Assigned by its middle, so that an empty part has an owner, too.
        middle = before + sizes[index] / 2
        if min(int(middle * ranks / max(total_size, 1)), ranks - 1) == rank:
            own.append(index)
        before += sizes[index]
    return own


def _rank(group: Any) -> int:
    return 0 if group is None else dist.get_rank(group)


def _device(group: Any) -> torch.device:
    is_nccl = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")


def _all_reduce(values: Tensor, group: Any) -> Tensor:
    on_device = values.to(_device(group))
    dist.all_reduce(on_device, group=group)
    return on_device.cpu()
