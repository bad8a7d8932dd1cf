"""The verdict on a way in a case."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from cases import CASES, Case, NotOffered, Way, Wrong

__all__ = ["ABSENT", "RIGHT", "of_all", "verdict", "verdicts"]

RIGHT, ABSENT, ERROR = "yes", "-", "**error**"
# A rank that waits longer for another one has lost it.
TIMEOUT = datetime.timedelta(seconds=30)
SECONDS_AFTER_A_FAULT = 2


def verdicts(way: Way, device: torch.device, cases: int = len(CASES)) -> dict[str, str]:
    """The verdicts on the first cases, by case.

    A way that may end the process, or has ranks, runs in processes of its own. New ones follow a case that ended one
    of them, or that may have left ranks at different places.
    """
    if not way.may_abort and way.ranks == 1:
        with device:
            return {case.name: verdict(way, case) for case in CASES[:cases]}
    found: list[str] = []
    while len(found) < cases:
        found += _of_processes(way, "cpu" if way.ranks > 1 else device.type, len(found), cases)
    return {case.name: said for case, said in zip(CASES, found, strict=False)}


def of_all(said: Sequence[str]) -> str:
    """The verdict on ranks, from theirs in the order of arrival: the first one that is not right."""
    return next((each for each in said if each not in (RIGHT, ABSENT)), said[0])


def _of_processes(way: Way, device: str, first: int, end: int) -> list[str]:
    """The verdicts from one case on, up to the end or to a case after which new processes are needed."""
    found: list[str] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, processes = [], []
        for rank in range(way.ranks):
            connection, sending = multiprocessing.Pipe(duplex=False)
            arguments = (way, device, range(first, end), rank, Path(folder) / "store", sending)
            processes.append(context.Process(target=_send_verdicts, args=arguments, daemon=True))
            processes[-1].start()
            sending.close()
            receiving.append(connection)
        try:
            while first + len(found) < end:
                found.append(of_all(_receive(dict(zip(receiving, processes, strict=True)))))
                if any(process.exitcode is not None for process in processes):
                    break
                if way.ranks > 1 and found[-1] not in (RIGHT, ABSENT):
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()
    return found


def _receive(pending: dict[Connection, BaseProcess]) -> list[str]:
    """What the ranks say of a case. Those that wait for one that failed say nothing."""
    said: list[str] = []
    while pending:
        failed = any(each not in (RIGHT, ABSENT) for each in said)
        ready = wait(list(pending), SECONDS_AFTER_A_FAULT if failed else None)
        if not ready:
            break
        for connection in ready:
            process = pending.pop(connection)
            try:
                said.append(connection.recv())
            except EOFError:
                process.join()
                said.append(f"{ERROR}: it ends the process, exit code {process.exitcode}")
    return said


def _send_verdicts(way: Way, device: str, cases: range, rank: int, store: Path, sending: Connection) -> None:
    torch._dynamo.config.cache_size_limit = 1000
    if way.ranks > 1:
        dist.init_process_group("gloo", f"file://{store}", TIMEOUT, way.ranks, rank)
    with torch.device(device):
        for place in cases:
            begin = time.monotonic()
            said = verdict(way, CASES[place])
            # A case that allows an error must not take this one for it.
            if way.ranks > 1 and time.monotonic() - begin >= TIMEOUT.total_seconds():
                said = f"{ERROR}: a rank waits for another one"
            sending.send(said)
            if way.ranks > 1 and said not in (RIGHT, ABSENT):
                break
    # The other ranks may still need this one; the parent ends it.
    threading.Event().wait()


def verdict(way: Way, case: Case) -> str:
    """RIGHT, ABSENT, or the error."""
    if not case.concerns(way):
        return ABSENT
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.check(way)
    except NotOffered:
        return ABSENT
    except Wrong as wrong:
        return f"**no**: {wrong}"
    except Exception as error:
        return f"{ERROR}: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return RIGHT
