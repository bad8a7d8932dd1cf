"""`pdl-ext count`: the token counts of a corpus, resumable, over threads and, under torchrun, over machines."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from pdl_ext.cli.streams import report, tell, write

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  pdl-ext count train.bin --dtype uint16 --vocab-size 50257 -o counts.safetensors
  pdl-ext count corpus/ 'more/**/*.parquet' --vocab-size 128256 --column input_ids -o counts.safetensors
  pdl-ext count chats.jsonl --tokenizer model/ --learn assistant --vocab-size 151936 -o counts.safetensors
  pdl-ext count tokenised/ --vocab-size 151936 --skip-prompt labels --targets shifted -o counts.safetensors
  pdl-ext count texts.jsonl.gz --tokenizer tokenizer.json --vocab-size 32000 -o counts.safetensors
  pdl-ext count corpus/ --vocab-size 128256 --dry-run
  pdl-ext count s3://bucket/tokens/ --vocab-size 128256 -o s3://bucket/counts.safetensors
  torchrun --nnodes 4 ... -m pdl_ext.cli count corpus/ --vocab-size 128256 -o counts.safetensors

An interrupted count leaves OUTPUT.checkpoint-*; the same command resumes it.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the sub-command `count`."""
    parser = subparsers.add_parser(
        "count",
        help="count the tokens of a corpus",
        description="Counts how often each token occurs in a corpus, and writes a file for PDLLoss.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="files, folders, patterns, or .list files with one of these on each line; URLs, too (s3://, hf://, ...)",
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="V", help="entries of the vocabulary")
    parser.add_argument("-o", "--output", metavar="FILE", help="counts, as safetensors")
    parser.add_argument(
        "--dry-run", action="store_true", help="only list files, formats, dtypes and estimated tokens, without counting"
    )
    parser.add_argument("--format", metavar="NAME", help="the files' format, if it cannot be detected")
    parser.add_argument("--dtype", metavar="NAME", help="the ids' dtype, if files do not state it: uint16, uint32, ...")
    parser.add_argument("--column", metavar="NAME", help="the column of the ids or the text, in formats with columns")
    parser.add_argument("--mask", metavar="NAME", help="a column that is 0 where a token is not a target")
    parser.add_argument(
        "--skip-prompt", metavar="NAME", help="a column of labels, which are the ignore index in the prompt"
    )
    parser.add_argument(
        "--ignore-index", type=int, default=-100, metavar="ID", help="an id that is never a target (default: -100)"
    )
    parser.add_argument(
        "--targets",
        default="all",
        metavar="WHICH",
        help="all, or shifted: without the first token of each sequence, which nothing predicts (default: all)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="for text: a tokenizer.json, or the folder of a transformers tokenizer",
    )
    parser.add_argument(
        "--learn",
        metavar="WHAT",
        help="the targets in chats, prompts and completions: completions, assistant (its turns only) or all",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="with --learn: tokens of a row that training uses")
    parser.add_argument(
        "--packing",
        metavar="HOW",
        help="with --learn: how TRL packs rows into sequences: bfd, bfd_split or wrapped (default: no packing)",
    )
    parser.add_argument(
        "--no-special-tokens", action="store_true", help="leave out the tokens that the tokenizer adds to a text"
    )
    parser.add_argument(
        "--sample-by",
        default="line",
        metavar="UNIT",
        help="one text of a plain text file: a line, or the whole document (default: line)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail at an id outside the vocabulary, or a dtype that seems wrong"
    )
    parser.add_argument(
        "--allow-overlap", action="store_true", help="count each of several files with the same content"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads (default: one per processor)")
    parser.add_argument(
        "--checkpoint-every",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="time between checkpoints: a crash loses no more (default: 60)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output is None and not arguments.dry_run:
        raise ValueError("output: got none, expected a file for the counts (-o FILE)")
    import torch.distributed as dist

    from pdl_ext.cli.counts_file import check_counts_output
    from pdl_ext.cli.memory import is_out_of_memory
    from pdl_ext.corpus.ranks import checkpoints
    from pdl_ext.storage.file_lock import only_writer
    from pdl_ext.storage.place import address, place
    from pdl_ext.storage.whole_file import partial_files

    output = None if arguments.output is None else place("output", arguments.output)
    if output is not None:
        check_counts_output(output)
    if output is None or arguments.dry_run:
        # Only the first rank prints it.
        return _dry_run(arguments) if os.environ.get("RANK", "0") == "0" else 0
    checkpoint = output.with_name(f"{output.name}.checkpoint")
    group = None
    if dist.is_torchelastic_launched():
        # Ranks wait for the slowest, whose share may take hours longer.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        group = dist.group.WORLD
    is_first = group is None or dist.get_rank(group) == 0
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        # A store has no locks.
        with only_writer(output) if is_first and isinstance(output, Path) else contextlib.nullcontext():
            frequency = _count(arguments, address(checkpoint), group, is_first)
            if is_first:
                frequency.save(arguments.output)
            if group is not None:
                dist.barrier(group)
            _remove([*checkpoints(checkpoint), *partial_files(output)])
    except KeyboardInterrupt:
        kept = f"; the counts so far are in {checkpoint}-*, and the same command resumes from there"
        tell(f"pdl-ext count: interrupted{kept if checkpoints(checkpoint) else ''}")
        return 128 + _received
    except RuntimeError as error:
        if group is None or is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        tell(f"pdl-ext count: this rank ends, since another one has ({reason})")
        return 1
    if group is not None:
        dist.destroy_process_group()
    if is_first:
        _report(frequency, output)
    return 0


def _remove(files: list[Any]) -> None:
    for path in files:
        # Another rank of this machine may be first.
        path.unlink(missing_ok=True)


def _dry_run(arguments: argparse.Namespace) -> int:
    from pdl_ext._printable import printable
    from pdl_ext.cli.progress import waiting
    from pdl_ext.corpus.counting import preview_corpus

    with waiting("pdl-ext count: looks at the files"):
        files = preview_corpus(
            arguments.data, arguments.vocab_size, output=arguments.output, **_read_arguments(arguments)
        )
    lines = [("file", "bytes", "format", "dtype", "tokens")]
    for file in files:
        about = "" if file.is_exact else "about "
        lines.append((printable(file.name), f"{file.size:,}", file.format, file.dtype, f"{about}{file.tokens:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    about = "" if all(file.is_exact for file in files) else "about "
    write(
        *(
            f"{name:{widths[0]}}  {size:>{widths[1]}}  {format_name:{widths[2]}}  {dtype:{widths[3]}}  "
            f"{tokens:>{widths[4]}}"
            for name, size, format_name, dtype, tokens in lines
        ),
        f"{about}{sum(file.tokens for file in files):,} tokens in {len(files):,} files; nothing was counted",
    )
    return 0


def _read_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say how the data are read."""
    from pdl_ext.corpus import TargetPolicy

    policy = TargetPolicy(
        targets=arguments.targets,
        ignore_index=arguments.ignore_index,
        column=arguments.column,
        mask=arguments.mask,
        skip_prompt=arguments.skip_prompt,
        special_tokens=not arguments.no_special_tokens,
        sample_by=arguments.sample_by,
        learn=arguments.learn,
        max_length=arguments.max_length,
        packing=arguments.packing,
    )
    return {
        "format": arguments.format,
        "dtype": arguments.dtype,
        "policy": policy,
        "tokenizer": arguments.tokenizer,
        "strict": arguments.strict,
        "allow_overlap": arguments.allow_overlap,
    }


def _count(arguments: argparse.Namespace, checkpoint: str, group: Any, is_first: bool) -> Any:
    from pdl_ext.cli.progress import ProgressLine
    from pdl_ext.corpus import count_corpus

    line = ProgressLine(sys.stderr) if is_first else None
    try:
        return count_corpus(
            arguments.data,
            arguments.vocab_size,
            **_read_arguments(arguments),
            threads=arguments.threads,
            checkpoint=checkpoint,
            checkpoint_every=arguments.checkpoint_every,
            output=arguments.output,
            progress=line.show if line is not None else None,
            group=group,
        )
    finally:
        if line is not None:
            line.close()


_received: int = signal.SIGINT


def _interrupt(number: int, _: FrameType | None) -> None:
    global _received
    _received = number
    # A second signal would interrupt the checkpoint that this one causes.
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _report(frequency: Any, output: Any) -> None:
    provenance = frequency.provenance
    unseen = int((frequency.counts == 0).sum())
    if int(frequency.out_of_range):
        tell(
            f"pdl-ext count: warning: {int(frequency.out_of_range):,} ids outside 0 <= id < {frequency.vocab_size}: "
            "another tokenizer, another dtype, or a larger vocabulary? (--strict makes it an error)"
        )
    report(
        f"{output}: {frequency.total:,} tokens counted of {provenance.tokens:,} in {len(provenance.shards):,} files",
        f"{int(frequency.ignored):,} ignored, {int(frequency.out_of_range):,} out of range",
        f"{unseen:,} of {frequency.vocab_size:,} entries never seen",
        *_peak_memory(),
    )


def _peak_memory() -> list[str]:
    """A line with the peak memory, if the system reports it."""
    # On Linux, getrusage includes the memory of the process that started this one.
    with contextlib.suppress(OSError):
        status = dict(re.findall(r"(VmHWM|RssFile):\s*(\d+) kB", Path("/proc/self/status").read_text()))
        if len(status) == 2:
            peak, mapped = (int(status[name]) / 1024 for name in ("VmHWM", "RssFile"))
            return [f"peak memory {peak:,.0f} MiB, of which {mapped:,.0f} MiB are mapped files of libraries"]
    try:
        import resource
    except ImportError:
        return []
    # In KiB, but on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return [f"peak memory {peak:,.0f} MiB"]
