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

# The old name, kept for one release.
unpacked = CountTable.unpacked

_FORMAT = "pdl_ext.TokenFrequency/2"


@not_scriptable
class TokenFrequency(nn.Module):
    """Exact counts of the tokens of a corpus, gathered one batch at a time.

    Attributes:
        counts: int64 [V], how often each id occurs.
        ignored, out_of_range: int64, 0-d, the number of tokens that were not counted.
        seen: int64, 0-d, the number of tokens given: counts.sum() + ignored + out_of_range.
        provenance: the files that were counted (`pdl-ext count`, `corpus.count_corpus`), or None if there were none.

    All of these but `provenance` are buffers. They are int64, so that `.half()` and `.to(dtype)` leave them alone. Do
    not write to them: `save`, `load` and `merge` check that `seen` is that sum. `from_counts` makes a frequency of
    other counts. Over ranks `all_reduce` sums once, and `sync` may be called repeatedly.

    Threads may share one frequency: `update`, `merge`, `sync`, `all_reduce`, `save` and loading a state run one after
    the other. There are two exceptions. Compiled updates wait for other updates only, and only Inductor's do. A
    `state_dict` holds the counts themselves, so other threads may change them while it, or a deep copy, is made.

    Raises ValueError for a vocab_size outside 1 to 2^31 - 1, or an ignore_index that is not an int32.
    """

    counts: Tensor
    ignored: Tensor
    out_of_range: Tensor
    seen: Tensor
    provenance: Provenance | None
    # The counts that update and merge have added since the last sync, packed [V + 3]; None means none. It is not a
    # buffer, or DistributedDataParallel would overwrite it with rank 0's. Until _tracked is set, all counts are this
    # rank's own, so that a frequency that is never synced does not count twice.
    _own: Tensor | None
    _tracked: bool

    # Counting and training may begin under inference_mode and continue outside of it.
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

        Raises TypeError for another dtype, ValueError for another shape, a negative count or a sum of 2^63 or more.
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
        """The counts themselves, for use inside this package only: other code must not write to them."""
        # Not by attribute: nn.Module takes a microsecond for each, and a tiny step reads ten of them.
        buffers: Any = self._buffers
        return CountTable(buffers["counts"], buffers["ignored"], buffers["out_of_range"], buffers["seen"])

    @property
    def lock(self) -> AbstractContextManager[bool]:
        """While it is held no batch is half counted. For use inside this package."""
        return self._exclusion.lock

    @property
    def vocab_size(self) -> int:
        """V, the number of vocabulary entries."""
        return self.counts.shape[0]

    @property
    def total(self) -> int:
        """N, the number of tokens counted, without ignored ids and ids out of range. Waits for the device."""
        return int(self.counts.sum())

    @property
    def tokens_seen(self) -> int:
        """The number of all tokens given: counted, ignored or out of range. Waits for the device."""
        return int(self.seen)

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, ignore_index={self.ignore_index}"

    def update(self, tokens: Tensor | np.ndarray[Any, Any], *, strict: bool = False) -> None:
        """Counts a batch.

        Args:
            tokens: any shape, integers of any dtype: a tensor on the counts' device, or a NumPy array. An array is
                copied to a CUDA device in parts, and each part is counted while the next is copied. int8, int16 and
                uint64 are converted first; the other dtypes are read as they are.
            strict: an id outside the vocabulary raises IndexError before anything is counted; on CUDA this waits for
                the device. Without it the id adds to `out_of_range`.

        Raises TypeError or ValueError for a wrong dtype or device. The TypeError for a list or a batch of several
        entries says what to pass instead.
        """
        if torch.compiler.is_compiling():
            # A compiled graph cannot hold a lock.
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
            raise IndexError(f"tokens: got {rejected} ids outside 0 <= id < {self.vocab_size}, expected none")
        self.merge(batch)

    @torch.no_grad()
    def merge(self, other: TokenFrequency, *, allow_overlap: bool = False) -> None:
        """Adds the counts of another frequency of the same vocabulary.

        allow_overlap: also add counts of a shard that both have counted.

        Raises ValueError, with nothing changed, for another vocabulary or ignore_index, and for a sum of 2^63 or more.
        It also raises ValueError if both have a provenance and these differ in tokenizer or policy, or share a shard.
        Waits for the device.
        """
        if not isinstance(other, TokenFrequency):
            raise TypeError(f"other: got {type(other).__name__}, expected TokenFrequency")
        if other.vocab_size != self.vocab_size:
            raise ValueError(f"other: got a vocabulary of {other.vocab_size}, expected {self.vocab_size}")
        # One lock at a time: two threads that merge each into the other would wait for each other forever.
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
        # Before a sync DistributedDataParallel may have replaced the counts, but not the provenance, by those of rank
        # 0.
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

        It sums all counts, loaded ones included, and joins the provenances of the ranks. `sync` may follow, and
        continues from the sum. Without a process group it changes nothing, as `sync` does.
        Raises TypeError if `group` is not a process group. Raises ValueError on every rank, with nothing changed, if
        the vocabularies or ignored ids differ, or if `merge` would refuse the provenances. `allow_overlap` is as in
        `merge`.
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
        """Adds the counts that `update` and `merge` added on the other ranks of a group since the last sync.

        Afterwards the counts are the same on all ranks. The earlier counts (given, loaded, of the last sync or of
        `all_reduce`) must already be the same on all ranks. They are counted once, as the group's first rank has them.

        All ranks must call it equally often, or they wait for each other forever; they need not have counted equally
        much. Save after a sync: before that, one rank's state lacks what the others counted since the last sync.
        DistributedDataParallel overwrites the counts by those of rank 0: in such a module sync once before the first
        update. After that nothing is lost.

        Each rank keeps its own provenance. A pickled frequency keeps its own unsynced counts: on several ranks load the
        state, not the pickled module. Does nothing without a process group.
        Raises TypeError if `group` is not a process group, ValueError on every rank if their vocabularies or ignored
        ids differ.
        """
        if _is_alone(group):
            return
        name = "" if group is None else check_group(group).group_name
        if self._checked_group != name:
            # Once for each group, since it waits for the device.
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
        """n / N, float64 [V]; uniform if nothing was counted."""
        # A copy: another thread may count between two reads, and the sum would not be 1.
        counts = self.counts.clone()
        total = counts.sum()
        counted = counts.double() / total.clamp(min=1)
        return torch.where(total > 0, counted, 1.0 / self.vocab_size)

    def rarer_than(self, count: int) -> Tensor:
        """The entries that were seen less than `count` times, or never: bool [V].

        Raises ValueError unless count is an int from 1 to 2^63 - 1.
        Source: the low-frequency words of RSFD (arXiv 2211.15076), seen less than 200 times.
        """
        return self.counts < check_integer("count", count, 1, 2**63 - 1, "an int from 1 to 2^63 - 1")

    def buckets(self, shares: Sequence[float] = (0.8, 0.15, 0.05)) -> Tensor:
        """The frequency bucket of every vocabulary entry: int64 [V], 0 the most frequent.

        Entries are sorted by count. The share of all occurrences that come before an entry decides its bucket: bucket 0
        covers the first `shares[0]` of them. Entries never seen are in the last bucket.
        Raises ValueError unless the shares are positive and sum to 1. Source: the rank buckets of MiLe (NAACL 2024).
        """
        if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
            raise ValueError(f"shares: got {tuple(shares)}, expected positive numbers that sum to 1")
        counts, order = torch.sort(self.counts, descending=True, stable=True)
        before = (counts.cumsum(0) - counts).double() / counts.sum().clamp(min=1)
        edges = torch.tensor(shares, dtype=torch.float64, device=counts.device).cumsum(0)[:-1]
        # In floating point 0.8 + 0.15 exceeds 0.95; without this the entry that begins at 0.95 would move down a
        # bucket.
        edges = edges - 1e-9
        bucket = torch.bucketize(before, edges, right=True)
        bucket = torch.where(counts > 0, bucket, len(shares) - 1)
        return torch.empty_like(bucket).scatter_(0, order, bucket)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes counts and provenance as a safetensors file with metadata, completely or not at all.

        path: a path, or a URL that fsspec supports.

        Raises OSError that names the path if it cannot be written. Raises ValueError for invalid counts: a negative
        one, more or fewer than `seen` tokens in all, or fewer tokens than the provenance's files hold.
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
        # Copies, so that other threads can count while the file is written.
        return {name: getattr(self, name).to("cpu", copy=True) for name in names}, metadata

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenFrequency:
        """Reads a file that `save` wrote, onto the CPU. path: a path or a URL.

        Raises FileNotFoundError, or ValueError for a file that cannot be read, is damaged or is not a counts file.
        """
        try:
            tensors, metadata = read_tensors(place("path", path), "path", _FORMAT)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}, expected one that `pdl-ext count` or `save` wrote") from error
        try:
            vocab_size, tokens_seen = int(metadata["vocab_size"]), int(metadata["tokens_seen"])
            if tensors["counts"].shape != (vocab_size,):
                # Before a table is allocated, which might be larger than memory.
                raise ValueError(f"counts of shape {list(tensors['counts'].shape)}, a vocabulary of {vocab_size}")
            check_integer("tokens_seen", tokens_seen, 0, 2**63 - 1, "an int from 0 to 2^63 - 1")
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
        """Raises ValueError for counts that break the law, or are fewer than the files hold.

        For use inside this package.
        """
        self.table.check_conserved(name)
        read = 0 if self.provenance is None or not with_files else self.provenance.tokens
        if self.tokens_seen < read:
            raise ValueError(
                f"{name}: got {self.tokens_seen} tokens seen, expected the {read} of the provenance or more"
            )

    def track_own(self) -> None:
        """Treats the present counts as shared by all ranks, and later ones as this rank's own.

        For use inside this package.
        """
        self._tracked = True
        if self._own is not None:
            self._own.zero_()

    def _own_table(self) -> CountTable:
        if self._own is None:
            size = CountTable.packed_size(self.vocab_size)
            with torch.inference_mode(False):
                self._own = torch.zeros(size, dtype=torch.int64, device=self.counts.device)
        elif self._own.device != self.counts.device:
            # Moved here, since FSDP moves buffers without calling a method of the module. A tensor on meta has no
            # values to move.
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
        # For a copy that is made under inference_mode.
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
                # load_state_dict reports it with its other errors, and nothing is loaded.
                args[-1].append(f"{prefix}{error}")
                return
        before = None if self.provenance is None or self.counts.is_meta else self.table.packed()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if counts is not None:
            if before is None or self.counts.is_meta or not torch.equal(before, self.table.packed().to(before.device)):
                # The provenance belongs to other counts.
                self.provenance = None
            self.track_own()


def _check_is_one(tokens: Any) -> None:
    """Raises TypeError, which says what to pass instead, unless tokens is one tensor or one array."""
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
    """The integers in a dtype that the histogram reads.

    uint64 ids from 2^63 on become negative, which is out of range either way.
    """
    if tokens.dtype in (torch.int8, torch.int16):
        return tokens.to(torch.int32)
    return tokens.view(torch.int64) if tokens.dtype == torch.uint64 else tokens


def _is_alone(group: dist.ProcessGroup | None) -> bool:
    """Whether no group is given, and no default group exists."""
    return group is None and not (dist.is_available() and dist.is_initialized())
