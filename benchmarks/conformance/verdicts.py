"""The verdict on a way in a case."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from cases import CASES, Case, NotOffered, Way, Wrong
from ways import ways

__all__ = ["ABSENT", "RIGHT", "of_all", "verdict", "verdicts"]

RIGHT, ABSENT, ERROR = "yes", "-", "**error**"
# A rank that waits longer for another one has lost it.
TIMEOUT = datetime.timedelta(seconds=30)


def verdicts(way: Way, device: torch.device) -> dict[str, str]:
    """The verdicts by case.

    A way that may end the process, or has ranks, runs in processes of its own. They are restarted after each case that
    ended one of them, or that left ranks at different places.
    """
    if not way.may_abort and way.ranks == 1:
        with device:
            return {case.name: verdict(way, case) for case in CASES}
    found: list[str] = []
    while len(found) < len(CASES):
        found += _of_processes(way, device, len(found))
    return {case.name: said for case, said in zip(CASES, found, strict=True)}


def of_all(said: Iterable[str]) -> str:
    """The verdict on ranks: what the first one says that is not right."""
    return min(said, key=lambda each: each == RIGHT)


def _of_processes(way: Way, device: torch.device, first: int) -> list[str]:
    """The verdicts from one case on, up to the last or to one after which new processes are needed."""
    found: list[str] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiving, processes = [], []
        for rank in range(way.ranks):
            connection, sending = multiprocessing.Pipe(duplex=False)
            arguments = (way.name, device.type, first, rank, Path(folder) / "store", sending)
            processes.append(context.Process(target=_send_verdicts, args=arguments))
            processes[-1].start()
            sending.close()
            receiving.append(connection)
        try:
            while first + len(found) < len(CASES):
                said = []
                for connection, process in zip(receiving, processes, strict=True):
                    try:
                        said.append(connection.recv())
                    except EOFError:
                        process.join()
                        said.append(f"{ERROR}: it ends the process, exit code {process.exitcode}")
                found.append(of_all(said))
                if any(process.exitcode is not None for process in processes):
                    break
                if way.ranks > 1 and found[-1].startswith(ERROR):
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()
    return found


def _send_verdicts(name: str, device: str, first: int, rank: int, store: Path, sending: Connection) -> None:
    torch._dynamo.config.cache_size_limit = 1000
    (way,) = (way for way in ways(torch.device(device)) if way.name == name)
    if way.ranks > 1:
        dist.init_process_group("gloo", f"file://{store}", TIMEOUT, way.ranks, rank)
    with torch.device(device):
        for case in CASES[first:]:
            sending.send(verdict(way, case))


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
