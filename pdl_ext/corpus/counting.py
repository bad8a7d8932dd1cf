"""The loop that counts a corpus: parts of sources over threads and ranks, resumable at any moment.

A thread counts parts into a table of its own. Each second it adds the table to the totals, together with the parts it
has finished. A checkpoint is the totals with the set of finished parts. The division into parts depends on the files
alone, so a resumed count finds the same parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pdl_ext._checks import (
    check_choice,
    check_flag,
    check_group,
    check_integer,
    check_number,
    check_vocab_size,
)
from pdl_ext._printable import errors_in_one_line
from pdl_ext._version import __version__
from pdl_ext.corpus import ranks
from pdl_ext.corpus.discover import open_sources
from pdl_ext.corpus.objects import StreamedSource, opener_of
from pdl_ext.corpus.preview import FilePreview, previewed
from pdl_ext.corpus.reading.at_once import begun, in_order
from pdl_ext.corpus.reading.pretrained import chat_template_digest, tokenizer_digest, tokenizer_stamps
from pdl_ext.corpus.source import TOKEN_DTYPES, Batch, Part, ReadOptions, Source
from pdl_ext.corpus.state import State
from pdl_ext.corpus.table import Table
from pdl_ext.frequency import TokenFrequency
from pdl_ext.provenance import Provenance, TargetPolicy, check_distinct
from pdl_ext.storage.place import Place, check_path, place
from pdl_ext.storage.tensor_file import check_fits

__all__ = ["Progress", "count_corpus", "preview_corpus"]

# Large enough that tables are rarely added to the totals, small enough to be lost in a crash. A small corpus has
# smaller parts, so that threads have even shares.
PART_BYTES = 2**26
_LEAST_PART_BYTES = 2**22
_PARTS = 64
_THREADS_OF_A_STORE = 4
_SECONDS_BETWEEN_MERGES = 1.0
_SECONDS_BETWEEN_REPORTS = 0.2
_SECONDS_TO_FINISH_A_PART = 1.0
_SECONDS_FOR_A_STORE = 10.0


@dataclass(frozen=True)
class Progress:
    """The progress of a count: tokens read in this run, bytes of the files done and in all, seconds of this run."""

    tokens: int
    bytes_before: int
    bytes_now: int
    bytes_total: int
    seconds: float


# A caller's inference_mode does not apply to the threads, and both write to the tables.
@torch.inference_mode(False)
@errors_in_one_line()
def count_corpus(
    data: Iterable[Any],
    vocab_size: int,
    *,
    format: str | None = None,
    dtype: str | None = None,
    policy: TargetPolicy | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    strict: bool = False,
    allow_overlap: bool = False,
    threads: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    output: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
    group: Any = None,
) -> TokenFrequency:
    """Counts the tokens of files, of any size and in any format of docs/corpora.md, or of data in memory.

    Args:
        data: files, folders, glob patterns, and files that end in .list with one of these on each line. They are on
            disk, or URLs that fsspec supports. Or an object: a datasets.Dataset or IterableDataset, a table of Arrow,
            an iterable of integer arrays. The arrays are NumPy's, tensors or lists, and each row of their last axis is
            a sequence.
        vocab_size: V.
        format: the format of the files, needed only if it cannot be detected.
        dtype: of ids in files that do not state one: "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64".
        policy: which tokens are targets; None is TargetPolicy(): all but -100.
        tokenizer: for text, a file of the `tokenizers` library, or the folder of a transformers tokenizer. policy.learn
            needs a folder.
        strict: an id outside the vocabulary is an error, and so is a file whose content suggests another dtype or kind.
            Otherwise such an id is counted as out of range, and such a file gives a warning.
        allow_overlap: files with the same content are each counted. Otherwise they are an error, or a warning below
            4,096 bytes.
        threads: None is the number of processors, and at least 4 for data in a store.
        checkpoint: a path for the counts so far, written every `checkpoint_every` seconds and when the count is
            interrupted. An existing checkpoint is resumed. The caller deletes it, together with those of other ranks,
            whose names begin with it.
        output: where the caller is going to write the counts. An empty file there is left out of the data. Counts that
            are too large for such a file are an error before anything is counted.
        progress: called several times a second, from the calling thread.
        group: a process group of torch.distributed, whose ranks each count a share of the parts.

    Data that can be read only once, an IterableDataset or an iterable, can have neither checkpoint nor group.

    Returns the counts with their provenance, on the CPU, the same on every rank.
    Raises TypeError or ValueError that names the argument, or the file and the position in it. Data without a single
    token raise ValueError, too. Raises OSError for a checkpoint that cannot be written, and KeyboardInterrupt, after a
    checkpoint.
    """
    options = _checked_options(vocab_size, dtype, policy, tokenizer, strict)
    check_flag("allow_overlap", allow_overlap)
    if threads is not None:
        check_integer("threads", threads, 1, 1024, "None or an int from 1 to 1024")
    check_number("checkpoint_every", checkpoint_every, 0, float("inf"), "a number of seconds > 0", open_low=True)
    path = None if checkpoint is None else place("checkpoint", checkpoint)
    if output is not None:
        check_path("output", output)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: got {progress!r}, expected a function or None")
    check_group(group)

    stamps = () if options.tokenizer is None else tokenizer_stamps(options.tokenizer)
    open_object, data = opener_of(data)
    in_memory = None if open_object is None else open_object(options)
    if in_memory is not None:
        _check_for_objects(in_memory, format, checkpoint, group)
    sources = open_sources(data, format, options, output) if in_memory is None else [in_memory]
    at_once = _is_remote(sources)
    if threads is None:
        # With the many small files of a store, a thread reads two at a time.
        threads = max(_processors(), _THREADS_OF_A_STORE) if at_once else _processors()
    provenance = _provenance(sources, options)
    if not allow_overlap:
        check_distinct(provenance.shards)
    if output is not None:
        # Checked before hours of counting, like the checkpoint below.
        check_fits("data", f"{len(sources)} files", provenance.to_json())
    # Depends on the files alone, not on this run's number of threads.
    part_bytes = min(PART_BYTES, max(_LEAST_PART_BYTES, sum(source.size for source in sources) // _PARTS))
    if options.policy.packing == "wrapped":
        # The beginning of a sequence depends on all rows before it.
        part_bytes = sys.maxsize
    parts = [(source, part) for source in sources for part in source.parts(part_bytes)]
    identity = _identity(sources, provenance, options, part_bytes, len(parts))
    state = State.empty(vocab_size, options.policy.ignore_index, len(parts), identity)
    todo = ranks.share(state, [part.size for _, part in parts], path, group)
    if strict and int(state.frequency.out_of_range):
        raise ValueError(
            f"checkpoint: {path} has {int(state.frequency.out_of_range)} ids outside 0 <= id < {vocab_size}, expected "
            "none: it was counted without strict"
        )
    own = ranks.checkpoint_of_rank(path, group)

    if own is not None:
        # A path that cannot be written to is reported before hours of counting.
        state.save(own)

    def check_tokenizer() -> None:
        for file, stamp in stamps:
            stamp.check(file)

    _Count(parts, todo, state, strict, threads, own, checkpoint_every, progress, check_tokenizer).run()
    for _ in in_order(Source.check_unchanged, sources, at_once=at_once):
        pass
    tokens = ranks.total(state, group)
    if not tokens:
        if path is not None:
            # They hold nothing that another count could resume.
            for left in ranks.checkpoints(path):
                left.unlink(missing_ok=True)
        more = f" and {len(sources) - 1} other files" if len(sources) > 1 else ""
        where = f" in {sources[0].path}{more}" if in_memory is None else ""
        raise ValueError(f"data: got no token{where}, expected some")
    frequency = state.frequency
    if isinstance(in_memory, StreamedSource):
        provenance = dataclasses.replace(provenance, shards=(in_memory.shard_of(frequency),))
    frequency.provenance = dataclasses.replace(provenance, tokens=tokens)
    return frequency


@errors_in_one_line()
def preview_corpus(
    data: Iterable[str | os.PathLike[str]],
    vocab_size: int,
    *,
    format: str | None = None,
    dtype: str | None = None,
    policy: TargetPolicy | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    strict: bool = False,
    allow_overlap: bool = False,
    output: str | os.PathLike[str] | None = None,
) -> list[FilePreview]:
    """The files that count_corpus would count, each with its format, its dtype and its approximate number of tokens.

    The arguments are those of count_corpus. It raises and warns as count_corpus does before it counts.
    """
    options = _checked_options(vocab_size, dtype, policy, tokenizer, strict)
    check_flag("allow_overlap", allow_overlap)
    open_object, names = opener_of(data)
    if open_object is not None:
        raise TypeError(
            f"data: got {type(data).__name__}, expected files, folders or patterns: data in memory are counted by "
            "count_corpus, without a preview"
        )
    sources = open_sources(names, format, options, output)
    if not allow_overlap:
        check_distinct(_provenance(sources, options).shards)
    return list(previewed(sources))


def _checked_options(
    vocab_size: int,
    dtype: str | None,
    policy: TargetPolicy | None,
    tokenizer: str | os.PathLike[str] | None,
    strict: bool,
) -> ReadOptions:
    check_vocab_size(vocab_size)
    if policy is None:
        policy = TargetPolicy()
    elif not isinstance(policy, TargetPolicy):
        raise TypeError(f"policy: got {type(policy).__name__}, expected TargetPolicy")
    if dtype is not None:
        check_choice("dtype", dtype, TOKEN_DTYPES)
    check_flag("strict", strict)
    tokenizer_path = None if tokenizer is None else place("tokenizer", tokenizer)
    return ReadOptions(vocab_size, policy, dtype, tokenizer_path, strict)


def _check_for_objects(source: Source, format: Any, checkpoint: Any, group: Any) -> None:
    """Raises ValueError for arguments that are only for files, or only for data that can be read again."""
    if format is not None:
        raise ValueError(f"format: got {format!r} with data in memory, expected None: it is for files")
    for name, value in (("checkpoint", checkpoint), ("group", group)):
        if value is not None and isinstance(source, StreamedSource):
            raise ValueError(
                f"{name}: got one with {source.format}, which is read once from its beginning, expected None. On "
                "several ranks count each one's own, and call all_reduce on the result"
            )


def _processors() -> int:
    # The processors that this process may use, if the system reports them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_remote(sources: list[Source]) -> bool:
    return any(source.is_remote for source in sources)


def _provenance(sources: list[Source], options: ReadOptions) -> Provenance:
    try:
        shards = tuple(in_order(lambda source: source.shard(), sources, at_once=_is_remote(sources)))
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error
    tokenizer = template = None
    if options.tokenizer is not None:
        tokenizer = tokenizer_digest(options.tokenizer)
        # Only a folder on disk has a chat template.
        if options.policy.learn is not None and isinstance(options.tokenizer, Path):
            template = chat_template_digest(options.tokenizer)
    return Provenance(shards, 0, options.policy, tokenizer, __version__, template)


def _identity(sources: list[Source], provenance: Provenance, options: ReadOptions, part_bytes: int, parts: int) -> str:
    digest = hashlib.blake2b(provenance.to_json().encode(), digest_size=16)
    stamps = [[stamp for stamp in source.stamps.values()] for source in sources]
    digest.update(repr((options.vocab_size, options.dtype, part_bytes, parts, stamps)).encode())
    return digest.hexdigest()


class _Count:
    """One run of the loop over the parts `todo` of one process."""

    def __init__(
        self,
        parts: list[tuple[Source, Part]],
        todo: list[int],
        state: State,
        strict: bool,
        threads: int,
        checkpoint: Place | None,
        checkpoint_every: float,
        progress: Callable[[Progress], None] | None,
        check_tokenizer: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._todo = iter(todo)
        self._state = state
        self._strict = strict
        self._checkpoint = checkpoint
        self._checkpoint_every = checkpoint_every
        self._progress = progress
        self.check_tokenizer = check_tokenizer
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._stopped_at = 0.0
        self._left = len(todo)
        self._is_remote = any(source.is_remote for source, _ in parts)
        self._error: BaseException | None = None
        sizes = [part.size for _, part in parts]
        self._bytes_before = sum(size for size, done in zip(sizes, state.finished.tolist(), strict=True) if done)
        self._bytes_total = self._bytes_before + sum(sizes[index] for index in todo)
        self._workers = [_Worker(self) for _ in range(max(1, min(threads, len(todo))))]

    def run(self) -> None:
        try:
            self._run_workers()
            if self._error is not None:
                raise self._error
        finally:
            # Workers refer to this object, and an error's traceback refers to a worker. Without this their tables, of
            # any size, would wait for Python's cyclic collector.
            self._workers.clear()
            self._error = None

    def _run_workers(self) -> None:
        begin = saved = time.monotonic()
        try:
            for worker in self._workers:
                worker.start()
            while not all(worker.done.is_set() for worker in self._workers):
                self._wait()
                now = time.monotonic()
                self._report(now - begin)
                if self._checkpoint is not None and now - saved >= self._checkpoint_every:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._stop_workers()
            for worker in self._workers:
                # An interruption may come before the last of them is started.
                if worker.ident is not None:
                    # A store may never answer, and a part in progress is not counted.
                    worker.done.wait(_SECONDS_FOR_A_STORE if self._is_remote else None)
            # This process' whole share, if it is done: it is saved whatever happens to another rank.
            if self._checkpoint is not None:
                self._save()
        self._report(time.monotonic() - begin)

    def _wait(self) -> None:
        deadline = time.monotonic() + _SECONDS_BETWEEN_REPORTS
        for worker in self._workers:
            worker.done.wait(max(0.0, deadline - time.monotonic()))

    def _report(self, seconds: float) -> None:
        if self._progress is not None:
            tokens = sum(worker.tokens_read for worker in self._workers)
            done = sum(worker.bytes_done for worker in self._workers)
            self._progress(Progress(tokens, self._bytes_before, self._bytes_before + done, self._bytes_total, seconds))

    def _stop_workers(self) -> None:
        if not self._stop.is_set():
            self._stopped_at = time.monotonic()
            self._stop.set()

    def _save(self) -> None:
        assert self._checkpoint is not None
        with self._lock:
            self._state.save(self._checkpoint)

    # Called by workers.

    def next(self) -> int | None:
        with self._lock:
            self._left -= 1
            return None if self._stop.is_set() else next(self._todo, None)

    def next_ahead(self) -> int | None:
        """The part after a worker's present one, if it is a store's and others have enough to do."""
        return self.next() if self._is_remote and self._left > len(self._workers) else None

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def part(self, index: int) -> tuple[Source, Part]:
        return self._parts[index]

    def finish(self, table: Table, parts: list[int]) -> None:
        with self._lock:
            self._state.add(table, parts)

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop_workers()

    def new_table(self) -> Table:
        frequency = self._state.frequency
        return Table(frequency.vocab_size, frequency.ignore_index, self._strict)

    def told_of_id(self, source: Source, part: Part, error: IndexError) -> ValueError:
        """An id outside of the vocabulary as an error that names its place."""
        if not isinstance(source, StreamedSource):
            table = self.new_table()
            for place, batch in source.placed_batches(part):
                try:
                    table.add(batch)
                except IndexError as placed:
                    return ValueError(f"{place}: {placed}")
        return ValueError(f"{source.path}: {error}")

    @property
    def must_abandon(self) -> bool:
        """Whether a worker has to abandon its part: a short one may be finished."""
        return self._stop.is_set() and time.monotonic() - self._stopped_at > _SECONDS_TO_FINISH_A_PART


class _Worker(threading.Thread):
    """Counts parts until none is left.

    tokens_read, bytes_done: of this thread, for progress. done: an event, since before Python 3.13 a `join` that Ctrl-C
    interrupts treats the thread as ended.
    """

    def __init__(self, count: _Count) -> None:
        super().__init__(daemon=True)
        self._count = count
        self._table = count.new_table()
        self._finished: list[int] = []
        self._unchecked: list[Source] = []
        self._merged = time.monotonic()
        self.tokens_read = 0
        self.bytes_done = 0
        self.done = threading.Event()

    def run(self) -> None:
        try:
            taken = self._take(self._count.next())
            while taken is not None:
                following = self._take(self._count.next_ahead())
                if not self._count_part(*taken):
                    # The table now holds a part that is not complete.
                    return
                if time.monotonic() - self._merged >= _SECONDS_BETWEEN_MERGES:
                    self._merge()
                taken = self._take(self._count.next()) if following is None else following
                if self._count.is_stopped:
                    break
            self._merge()
        except BaseException as error:
            self._count.fail(error)
        finally:
            self.done.set()

    def _take(self, index: int | None) -> tuple[int, Iterator[Batch]] | None:
        """A part with its batches; a store already begins to send the first one."""
        if index is None:
            return None
        source, part = self._count.part(index)
        batches = source.batches(part)
        return index, begun(batches) if source.is_remote else batches

    def _count_part(self, index: int, batches: Iterator[Batch]) -> bool:
        """Counts a part. Returns whether it was counted to its end."""
        source, part = self._count.part(index)
        if not source.is_remote:
            source.check_unchanged()
        for batch in batches:
            if self._count.must_abandon:
                return False
            try:
                self._table.add(batch)
            except IndexError as error:
                raise self._count.told_of_id(source, part, error) from None
            self.tokens_read += batch.tokens.size
        if source.is_remote:
            self._unchecked.append(source)
        else:
            source.check_unchanged()
        # Each part may load the tokenizer again.
        self._count.check_tokenizer()
        self.bytes_done += part.size
        self._finished.append(index)
        return True

    def _merge(self) -> None:
        # Before this the table counts for nothing. Stores are asked rarely, and for many files at once.
        unchecked = list(dict.fromkeys(self._unchecked))
        self._unchecked.clear()
        for _ in in_order(Source.check_unchanged, unchecked, at_once=True):
            pass
        self._count.finish(self._table, self._finished)
        self._finished = []
        self._merged = time.monotonic()
