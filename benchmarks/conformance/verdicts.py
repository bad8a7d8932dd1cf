"""The verdict on a way in a case."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from multiprocessing.connection import Connection

import torch
from cases import CASES, Case, NotOffered, Way, Wrong
from ways import ways

__all__ = ["ABSENT", "RIGHT", "verdict", "verdicts"]

RIGHT, ABSENT = "yes", "-"


def verdicts(way: Way, device: torch.device) -> dict[str, str]:
    """The verdicts by case.

    A way that may end the process runs in one of its own, which is restarted after each case that ended it.
    """
    found: dict[str, str] = {}
    if not way.may_abort:
        with device:
            return {case.name: verdict(way, case) for case in CASES}
    while len(found) < len(CASES):
        receiving, sending = multiprocessing.Pipe(duplex=False)
        arguments = (way.name, device.type, len(found), sending)
        process = multiprocessing.get_context("spawn").Process(target=_send_verdicts, args=arguments)
        process.start()
        sending.close()
        with contextlib.suppress(EOFError):
            while len(found) < len(CASES):
                found[CASES[len(found)].name] = receiving.recv()
        process.join()
        if len(found) < len(CASES):
            found[CASES[len(found)].name] = f"**error**: it ends the process, exit code {process.exitcode}"
    return found


def _send_verdicts(name: str, device: str, first: int, sending: Connection) -> None:
    torch._dynamo.config.cache_size_limit = 1000
    (way,) = (way for way in ways(torch.device(device)) if way.name == name)
    with torch.device(device):
        for case in CASES[first:]:
            sending.send(verdict(way, case))


def verdict(way: Way, case: Case) -> str:
    """RIGHT, ABSENT, or the error."""
    if case.of_logits not in (None, way.of_logits):
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
        return f"**error**: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    return RIGHT
