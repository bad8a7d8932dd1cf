"""How often each token occurs: the streaming histogram of a corpus, and its file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pdl_ext._array import tensor_to_read
from pdl_ext._checks import (
    check_group,
    check_ignore_index,
    check_integer,
    check_vocab_size,
    default_device,
    is_traced,
    not_scriptable,
)
from pdl_ext._lock import Exclusion, exclusive
from pdl_ext.counts import CountTable, check_count_values, check_counts
from pdl_ext.engine import host_stream
from pdl_ext.provenance import Provenance
from pdl_ext.storage.place import place
from pdl_ext.storage.tensor_file import read_tensors, write_tensors

__all__ = ["TokenFrequency", "unpacked"]

# The old name of it, for one release.
unpacked = CountTable.unpacked

_FORMAT = "pdl_ext.TokenFrequency/2"


@not_scriptable
class TokenFrequency(nn.Module):
    """Counts of the tokens of a corpus, exact, gathered a batch at a time.

    Buffers, all int64, so that `.half()` and `.to(dtype)` leave them alone: `counts` [V], and the 0-d `ignored`,
    `out_of_range` and `seen`, the number of tokens given, which counts.sum() + ignored + out_of_range must be: `save`,
    `load` and `merge` check it. Write to none of them; `from_counts` makes a frequency of other counts. `provenance`
    tells of those that were read from files (`pdl-ext count`, `corpus.count_corpus`) where they come from; None if none
    were. Over ranks `all_reduce` sums once, `sync` as often as wanted.

    Threads may share one: `update`, `merge`, `sync`, `all_reduce`, `save` and loading a state take place one after the
    other, each whole. With two exceptions: compiled updates wait for other updates only, and only Inductor's do; and a
    `state_dict` holds the counts themselves, which other threads go on adding to while it, or a deep copy, is made.

    Raises ValueError for a vocab_size outside [1, 2^31) or an ignore_index that is no int.
    """

    counts: Tensor
    ignored: Tensor
    out_of_range: Tensor
    seen: Tensor
    provenance: Provenance | None
    # What update and merge have added since the last sync, packed [V + 3]; None is nothing. No buffer, or
    # DistributedDataParallel would overwrite it by rank 0's. Until _tracked it is everything that the counts hold, and
    # a frequency that only counts does not count twice.
    _own: Tensor | None
    _tracked: bool

    # Counting and training may begin under inference_mode, and must be able to go on without.
    @torch.inference_mode(False)
    def __init__(self, vocab_size: int, *, ignore_index: int = -100) -> None:
        super().__init__()
        vocab_size = check_vocab_size(vocab_size)
        self.ignore_index = check_ignore_index(ignore_index)
        self.provenance = None
        self._own = None
        self._tracked = False
        self._checked_group: str | None = None
        self._exclusion = Exclusion()
        device = default_device()
        self.register_buffer("counts", torch.zeros(vocab_size, dtype=torch.int64, device=device))
        for name in ("ignored", "out_of_range", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def from_counts(cls, counts: Tensor, *, ignore_index: int = -100) -> TokenFrequency:
        """A frequency with a copy of the given counts, int64 [V], on their device.

        Raises TypeError for another dtype, ValueError for another shape, a negative count or a sum past 2^63.
        """
        check_counts(counts)
        if counts.is_cuda and not is_traced():
            check_count_values("counts", counts)
        with counts.device:
            frequency = cls(counts.numel(), ignore_index=ignore_index).to(counts.device)
        frequency.counts.copy_(counts)
        frequency.seen.copy_(counts.sum())
        frequency.track_own()
        return frequency

    @property
    def table(self) -> CountTable:
        """The counts themselves, for this package: nobody else writes to them."""
        # Not as attributes, which nn.Module looks up in a microsecond each: a tiny step has ten of them.
        buffers: Any = self._buffers
        return CountTable(buffers["counts"], buffers["ignored"], buffers["out_of_range"], buffers["seen"])

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """Who holds it sees whole batches; for this package."""
        return self._exclusion.lock

    @property
    def vocab_size(self) -> int:
        """V, the number of vocabulary entries."""
        return self.counts.shape[0]

    @property
    def total(self) -> int:
        """N, the number of tokens counted, without the ignored and the out of range. Waits for the device."""
        return int(self.counts.sum())

    @property
    def tokens_seen(self) -> int:
        """All tokens, counted, ignored or out of range. Waits for the device."""
        return int(self.seen)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, ignore_index={self.ignore_index}"

    def update(self, tokens: Tensor | np.ndarray[Any, Any], *, strict: bool = False) -> None:
        """Counts a batch.

        tokens: any shape, integers of any dtype, read in that: a tensor on the counts' device, or a NumPy array, of
        which a CUDA device counts a part while the next is copied to it. An id outside [0, V) adds to `out_of_range`;
        with `strict` it raises IndexError before anything is counted (on CUDA this waits for the device). int8, int16
        and uint64 are converted first.
        Raises TypeError or ValueError for a wrong dtype or device, TypeError that says what to pass for a list or a
        batch of several entries.
        """
        if torch.compiler.is_compiling():
            # No graph holds a lock.
            self._update(tokens, strict)
        else:
            with self.lock:
                self._update(tokens, strict)

    def _update(self, tokens: Tensor | np.ndarray[Any, Any], strict: bool) -> None:
        table = self.table
        device = table.counts.device
        _check_is_one(tokens)
        if isinstance(tokens, np.ndarray):
            tokens = tensor_to_read(np.ascontiguousarray(tokens))
            if device.type == "cuda" and tokens.nbytes > host_stream.PART_BYTES and not strict:
                for part in host_stream.parts_on_device(tokens.view(-1), device):
                    self._update(part, strict)
                return
            tokens = tokens.to(device)
        tokens = _countable(tokens)
        if strict and device.type != "cpu":
            self._update_strictly(tokens)
        else:
            table.add(tokens, ignore_index=self.ignore_index, strict=strict)
            if self._tracked:
                self._own_table().add(tokens, ignore_index=self.ignore_index)

    def _update_strictly(self, tokens: Tensor) -> None:
        batch = TokenFrequency(self.vocab_size, ignore_index=self.ignore_index).to(self.counts.device)
        batch.update(tokens)
        rejected = int(batch.out_of_range)
        if rejected:
            raise IndexError(f"tokens: got {rejected} ids outside [0, {self.vocab_size}), expected none")
        self.merge(batch)

    @torch.no_grad()
    def merge(self, other: TokenFrequency, *, allow_overlap: bool = False) -> None:
        """Adds the counts of another frequency of the same vocabulary.

        Raises ValueError, with nothing changed, for another vocabulary or ignore_index, for a sum past 2^63, and where
        both have a provenance for another tokenizer or policy, or for a shard that both have counted (`allow_overlap`
        counts it again). Waits for the device.
        """
        if not isinstance(other, TokenFrequency):
            raise TypeError(f"other: got {type(other).__name__}, expected TokenFrequency")
        if other.vocab_size != self.vocab_size:
            raise ValueError(f"other: got a vocabulary of {other.vocab_size}, expected {self.vocab_size}")
        # One lock at a time, or two threads that merge each into the other would wait for ever.
        with other.lock:
            other.check_conserved("other")
            packed, of_files = other.table.packed().to(self.counts.device), other.provenance
        added = CountTable.unpacked(packed)
        if other.ignore_index != self.ignore_index and int(added.seen):
            raise ValueError(f"other: got ignore_index {other.ignore_index}, expected {self.ignore_index}")
        self._add(added, of_files, allow_overlap)

    @exclusive
    def _add(self, added: CountTable, provenance: Provenance | None, allow_overlap: bool) -> None:
        if self.provenance is not None and provenance is not None:
            provenance = self.provenance.merged(provenance, allow_overlap=allow_overlap)
        # DistributedDataParallel may have put rank 0's counts, but not its provenance, in place of these until a sync.
        self.check_conserved("self", with_files=not self._tracked)
        tokens = int(added.seen)
        if self.tokens_seen + tokens >= 2**63:
            raise ValueError(f"other: got {tokens} tokens, expected a sum with {self.tokens_seen} below 2^63")
        if self._tracked:
            self._own_table().merge(added)
        self.table.merge(added)
        self.provenance = provenance or self.provenance

    @exclusive
    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None, *, allow_overlap: bool = False) -> None:
        """Replaces the counts by their sum over the ranks of a group: once, when every rank has counted its part.

        It sums all that the counts hold, also what was loaded, and joins the ranks' provenances. `sync` may follow, and
        goes on from the sum. Without a process group it changes nothing, as `sync`.
        Raises TypeError for what is no process group, ValueError on every rank, with nothing changed, if their
        vocabularies or ignored ids differ, or as `merge` does for their provenances (`allow_overlap` is its).
        """
        if _is_alone(group):
            return
        self._check_ranks(group)
        provenance = self._provenance_of_ranks(group, allow_overlap)
        self._replace_by_sum(self.table.packed(), group)
        self.provenance = provenance

    def _provenance_of_ranks(self, group: dist.ProcessGroup | None, allow_overlap: bool) -> Provenance | None:
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, None if self.provenance is None else self.provenance.to_json(), group)
        joined = None
        for rank, text in enumerate(found):
            if text is None:
                continue
            provenance = Provenance.from_json(text)
            try:
                joined = provenance if joined is None else joined.merged(provenance, allow_overlap=allow_overlap)
            except ValueError as error:
                raise ValueError(f"rank {rank} of the group: {error}") from error
        return joined

    @exclusive
    @torch.no_grad()
    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds what `update` and `merge` have counted on the other ranks of a group since the last sync.

        Afterwards the counts are the same on all ranks. What else they held (given, loaded, of the last sync or of
        `all_reduce`) must be the same on all ranks beforehand and is counted once, as the group's first rank has it.

        All ranks call it equally often, or they wait for each other for ever; how much each has counted makes no
        difference. Save after a sync: the state of one rank lacks what others have counted since. In a module under
        DistributedDataParallel, which overwrites the counts by those of rank 0, sync once before the first update; from
        then on nothing is lost. Each rank keeps its own provenance, and a pickled frequency what it had counted as its
        own: load the state, and not the module, on several ranks. Does nothing without a process group.
        Raises TypeError for what is no process group, ValueError on every rank if their vocabularies or
        ignored ids differ.
        """
        if _is_alone(group):
            return
        name = "" if group is None else check_group(group).group_name
        if self._checked_group != name:
            # Once, since it waits for the device.
            self._check_ranks(group)
            self._checked_group = name
        all_of_it = not self._tracked or dist.get_rank(group) == 0
        given = self.table if all_of_it else self._own_table()
        self._replace_by_sum(given.packed(), group)

    def _check_ranks(self, group: dist.ProcessGroup | None) -> None:
        values = torch.tensor([self.vocab_size, self.ignore_index], dtype=torch.int64, device=self.counts.device)
        bounds = torch.cat([values, -values])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=check_group(group))
        *largest, _, _ = bounds.tolist()
        smallest = (-bounds[2:]).tolist()
        for name, low, high in zip(("vocab_size", "ignore_index"), smallest, largest, strict=True):
            if low != high:
                raise ValueError(f"{name}: got {low} to {high} over the ranks, expected the same on all")

    def _replace_by_sum(self, packed: Tensor, group: dist.ProcessGroup | None) -> None:
        dist.all_reduce(packed, group=group)
        self.table.copy_(CountTable.unpacked(packed))
        self.track_own()

    def probabilities(self) -> Tensor:
        """n / N, float64 [V]; uniform while nothing is counted."""
        # What another thread adds between two reads would leave a sum that is not 1.
        counts = self.counts.clone()
        total = counts.sum()
        counted = counts.double() / total.clamp(min=1)
        return torch.where(total > 0, counted, 1.0 / self.vocab_size)

    def rarer_than(self, count: int) -> Tensor:
        """Which vocabulary entries were seen less often than `count` times, if ever: bool [V].

        Raises ValueError unless count is an int in [1, 2^63).
        Source: the low-frequency words of RSFD (arXiv 2211.15076), seen less than 200 times.
        """
        return self.counts < check_integer("count", count, 1, 2**63 - 1, "an int in [1, 2^63)")

    def buckets(self, shares: Sequence[float] = (0.8, 0.15, 0.05)) -> Tensor:
        """The frequency bucket of every vocabulary entry: int64 [V], 0 the most frequent.

        Entries are sorted by count; an entry belongs to the bucket in which the occurrences before it end, so bucket 0
        covers the first `shares[0]` of all occurrences. An entry that was never seen is in the last one.
        Raises ValueError unless the shares are positive and sum to 1. Source: the rank buckets of MiLe (NAACL 2024).
        """
        if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
            raise ValueError(f"shares: got {tuple(shares)}, expected positive numbers that sum to 1")
        counts, order = torch.sort(self.counts, descending=True, stable=True)
        before = (counts.cumsum(0) - counts).double() / counts.sum().clamp(min=1)
        edges = torch.tensor(shares, dtype=torch.float64, device=counts.device).cumsum(0)[:-1]
        # 0.8 + 0.15 is a little more than 0.95, which must not pull in the entry that begins there.
        edges = edges - 1e-9
        bucket = torch.bucketize(before, edges, right=True)
        bucket = torch.where(counts > 0, bucket, len(shares) - 1)
        return torch.empty_like(bucket).scatter_(0, order, bucket)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes counts and provenance as a safetensors file with metadata; the file appears whole or not at all.

        path: also a URL that fsspec takes.

        Raises OSError that names the path if it cannot be written, ValueError if the counts break the law that they are
        saved under: none is negative, with the ignored and the out of range they are as many as the tokens seen, and
        files have not given more than these.
        """
        write_tensors(place("path", path), *self._for_a_file())

    @exclusive
    def _for_a_file(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        self.check_conserved("counts")
        metadata = {
            "format": _FORMAT,
            "vocab_size": str(self.vocab_size),
            "ignore_index": str(self.ignore_index),
            "tokens_seen": str(self.tokens_seen),
        }
        if self.provenance is not None:
            metadata["provenance"] = self.provenance.to_json()
        names = ("counts", "ignored", "out_of_range")
        # Copies, so that nobody waits for a disk to count on.
        return {name: getattr(self, name).to("cpu", copy=True) for name in names}, metadata

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenFrequency:
        """Reads a file that `save` wrote, onto the CPU. path: also a URL.

        Raises FileNotFoundError, or ValueError for a file that cannot be read, is damaged or is no counts file.
        """
        tensors, metadata = read_tensors(place("path", path), "path", _FORMAT)
        try:
            vocab_size, tokens_seen = int(metadata["vocab_size"]), int(metadata["tokens_seen"])
            if tensors["counts"].shape != (vocab_size,):
                # Before a table is made that may be larger than memory.
                raise ValueError(f"counts of shape {list(tensors['counts'].shape)}, a vocabulary of {vocab_size}")
            check_integer("tokens_seen", tokens_seen, 0, 2**63 - 1, "an int in [0, 2^63)")
            with torch.device("cpu"):
                frequency = cls(vocab_size, ignore_index=int(metadata["ignore_index"]))
            seen = torch.tensor(tokens_seen, dtype=torch.int64, device="cpu")
            frequency.load_state_dict({**tensors, "seen": seen})
            if "provenance" in metadata:
                frequency.provenance = Provenance.from_json(metadata["provenance"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"path: {path} has tensors or metadata that do not fit together ({error})") from error
        if any(tensor.dtype != torch.int64 for tensor in tensors.values()):
            raise ValueError(f"path: {path} has counts of dtype {tensors['counts'].dtype}, expected int64")
        frequency.check_conserved(f"path: {path}")
        return frequency

    def check_conserved(self, name: str, *, with_files: bool = True) -> None:
        """Raises ValueError for counts that break their law, or hold less than files have given; for this package."""
        self.table.check_conserved(name)
        read = 0 if self.provenance is None or not with_files else self.provenance.tokens
        if self.tokens_seen < read:
            raise ValueError(
                f"{name}: got {self.tokens_seen} tokens seen, expected the {read} of the provenance or more"
            )

    def track_own(self) -> None:
        """What the counts hold now is no rank's own; what is added from now on is. For this package."""
        self._tracked = True
        if self._own is not None:
            self._own.zero_()

    def _own_table(self) -> CountTable:
        if self._own is None:
            size = CountTable.packed_size(self.vocab_size)
            with torch.inference_mode(False):
                self._own = torch.zeros(size, dtype=torch.int64, device=self.counts.device)
        elif self._own.device != self.counts.device:
            # Here, since FSDP moves buffers without a call of the module's. Of meta there is nothing to move.
            with torch.inference_mode(False):
                own = torch.zeros_like(self._own, device="cpu") if self._own.is_meta else self._own
                self._own = own.to(self.counts.device)
        return CountTable.unpacked(self._own)

    @exclusive
    @torch.inference_mode(False)
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenFrequency:
        return super()._apply(fn, recurse)

    @torch.inference_mode(False)
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Of a copy that is made under inference_mode.
        self._apply(lambda total: total.clone() if total.is_inference() else total)
        if self._own is not None and self._own.is_inference():
            self._own = self._own.clone()

    @exclusive
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        counts = state_dict.get(f"{prefix}counts")
        if counts is not None and not counts.is_meta and not is_traced():
            try:
                check_counts(counts)
                if counts.is_cuda:
                    check_count_values("counts", counts)
            except (TypeError, ValueError) as error:
                # Told with what else is wrong, and nothing is loaded.
                args[-1].append(f"{prefix}{error}")
                return
        before = None if self.provenance is None or self.counts.is_meta else self.table.packed()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if counts is not None:
            if before is None or self.counts.is_meta or not torch.equal(before, self.table.packed().to(before.device)):
                # It was that of other counts.
                self.provenance = None
            self.track_own()


def _check_is_one(tokens: Any) -> None:
    """Raises TypeError for what is not one tensor or array, that says what to pass instead."""
    if isinstance(tokens, (Tensor, np.ndarray)):
        return
    instead = ""
    if isinstance(tokens, Mapping):
        targets = next((name for name in ("labels", "input_ids") if name in tokens), "labels")
        instead = f": pass the entry that holds the targets, as batch[{targets!r}]"
    elif isinstance(tokens, (list, tuple)):
        instead = ": pass torch.tensor of it, or one sequence after the other"
    raise TypeError(f"tokens: got {type(tokens).__name__}, expected a tensor or a NumPy array{instead}")


def _countable(tokens: Tensor) -> Tensor:
    """Integers as the histogram counts them: those above 2^63 become negative, and are of no vocabulary either way."""
    if tokens.dtype in (torch.int8, torch.int16):
        return tokens.to(torch.int32)
    return tokens.view(torch.int64) if tokens.dtype == torch.uint64 else tokens


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    """Whether no group is meant, and there is none."""
    return group is None and not (dist.is_available() and dist.is_initialized())
