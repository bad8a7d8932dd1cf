"""The parts of a check in their order, their common budget, and the folder of results."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu_check import ROOT
from gpu_check.variants import RELEASE, flags_of

# The log of one part keeps its beginning and its end.
LOG_BYTES_OF_A_PART = 2**21
# Failures of one part that are printed; all are in the results.
PRINTED_FAILURES = 20


@dataclass(frozen=True)
class Setting:
    """Where the parts run, and which build of the extension they import."""

    # A device of devices.py.
    device: str = "cuda"
    # Objects compiled ahead; None where the build is made here, in place.
    built: Path | None = None
    # What the second command measures.
    variant: str = RELEASE
    # Programs that stand in for a card's, in a dry run.
    programs: Path | None = None
    root: Path = ROOT

    def home(self, variant: str) -> Path:
        """The folder to run in: its pdl_ext is what is imported."""
        return self.root if self.built is None else self.built / variant


@dataclass
class Part:
    """One part of the check and how it went."""

    name: str
    # The seconds that it may take, and those below which it is not worth to begin.
    most: float
    least: float
    run: Callable[[Part, Check, float], None]
    # The build that it imports.
    variant: str = RELEASE
    # not begun, running, passed, failed, timed out, left out, or one of these:
    # - absent: a tool is not installed.
    # - refused: the machine does not allow it.
    # - incomplete: some of it was left out for time.
    status: str = "not begun"
    seconds: float = 0.0
    detail: str = ""
    failures: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return self.status in ("passed", "refused")

    def record(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "status", "seconds", "detail", "failures", "results")}


@dataclass
class Outcome:
    """How a command ended, and what it printed."""

    status: str
    output: str


class Check:
    """The parts in their order, their common budget, and the folder of results."""

    def __init__(
        self,
        folder: Path,
        machine: dict[str, Any],
        budget: float,
        parts: Sequence[Part],
        setting: Setting | None = None,
        command: str = "first",
    ) -> None:
        self.folder, self.machine, self.budget, self.parts = folder, machine, budget, parts
        self.setting, self.command = setting or Setting(), command
        self.start = time.monotonic()
        self.log = _new_log(folder, command)

    @property
    def remaining(self) -> float:
        return self.budget - (time.monotonic() - self.start)

    def run(self) -> bool:
        """Runs all parts; whether every one passed, or was refused by the machine."""
        self.write()
        for number, part in enumerate(self.parts):
            self._run_part(part, reserved=sum(later.least for later in self.parts[number + 1 :]))
            self.write()
        shutil.rmtree(self.running, ignore_errors=True)
        print(self.table(), flush=True)
        return all(part.is_good for part in self.parts)

    def _run_part(self, part: Part, reserved: float) -> None:
        start = time.monotonic()
        build = self.parts[0]
        limit = min(part.most, max(self.remaining - reserved, part.least))
        shutil.rmtree(self.running, ignore_errors=True)
        self.running.mkdir()
        if part is not build and build.status != "passed" and part.variant not in build.results:
            part.status, part.detail = "left out", "there is no build to check"
        elif self.remaining < part.least:
            part.status, part.detail = "left out", f"{max(self.remaining, 0):.0f} s were left of {self.budget:.0f}"
        else:
            part.status = "running"
            self.write()
            print(f"{part.name} ...", flush=True)
            self.note(f"\n===== {part.name}")
            try:
                part.run(part, self, limit)
            except Exception as error:
                part.status, part.detail = "failed", f"{type(error).__name__}: {error}"
            self._take_in(part)
            if limit < part.most:
                part.detail += f" (allowed {limit:.0f} s of its {part.most:.0f})"
        part.seconds = round(time.monotonic() - start, 1)
        print(f"{part.name}: {part.status}, {part.seconds} s, {part.detail}", flush=True)

    @property
    def running(self) -> Path:
        """The file of the part that is running, in case all is interrupted."""
        return self.folder / "running"

    def _take_in(self, part: Part) -> None:
        """Puts the part's JSON files into its results, since not every machine returns many files."""
        for path in sorted(self.running.glob("*.json")):
            # One that was being written when its time was up is left to the log.
            with contextlib.suppress(ValueError):
                part.results[path.stem] = json.loads(path.read_text(encoding="utf-8"))

    @property
    def path(self) -> str:
        """PATH with the programs that were installed with this Python, also where it is not activated."""
        return os.pathsep.join([*map(str, filter(None, [self.setting.programs])), search_path()])

    def python(self, *arguments: str, limit: float, variant: str = RELEASE, **environment: str) -> Outcome:
        """Runs this Python, where it imports the variant."""
        return self.execute([sys.executable, *arguments], limit, variant, **environment)

    def execute(self, command: Sequence[str], limit: float, variant: str = RELEASE, **environment: str) -> Outcome:
        """Runs a command for at most `limit` seconds, its output in the log."""
        home = self.setting.home(variant)
        # Until it is linked there is none.
        home = home if home.is_dir() else self.setting.root
        self.note(f"+ {' '.join(map(str, command))}")
        begin = os.fstat(self.log.fileno()).st_size
        root = self.setting.root
        paths = [str(home), str(root / "tests"), str(root / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment = {
            "PATH": self.path,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PDL_EXT_EMULATOR_FLAGS": flags_of(variant),
            **environment,
        }
        status = run_limited(command, limit, self.log, {**os.environ, **environment}, home)
        output = self._end_of_log(begin)
        if status == "timed out":
            self.note(f"\ngpu-check: ended after {limit:.0f} s")
        return Outcome(status, output)

    def note(self, line: str) -> None:
        self.log.write(f"{line}\n".encode())

    def _end_of_log(self, begin: int) -> str:
        """What was logged since `begin`, which is shortened in the log if it is long."""
        with open(self.log.name, "rb") as log:
            log.seek(begin)
            output = log.read()
        if len(output) > LOG_BYTES_OF_A_PART:
            half = LOG_BYTES_OF_A_PART // 2
            left_out = f"\n[{len(output) - 2 * half} bytes are left out here]\n"
            output = output[:half] + left_out.encode() + output[-half:]
            self.log.truncate(begin)
            self.log.write(output)
        return output.decode(errors="replace")

    def write(self) -> None:
        data = {
            "command": self.command,
            "variant": self.setting.variant,
            "machine": self.machine,
            "budget": self.budget,
            "seconds": round(time.monotonic() - self.start, 1),
            "parts": [part.record() for part in self.parts],
        }
        path = self.folder / f"{self.command}.json"
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    def table(self) -> str:
        """The failures, then a line for each part, then the verdict."""
        lines = []
        for part in self.parts:
            lines += [f"{part.name}: {failure}" for failure in part.failures[:PRINTED_FAILURES]]
            if len(part.failures) > PRINTED_FAILURES:
                lines.append(f"{part.name}: and {len(part.failures) - PRINTED_FAILURES} more, in {self.command}.json")
        width = max(len(part.name) for part in self.parts)
        lines += [""] if lines else []
        lines += [
            f"{part.name:<{width}}  {part.status:<10}  {part.seconds:6.1f} s  {part.detail}" for part in self.parts
        ]
        bad = [part.name for part in self.parts if not part.is_good]
        refused = [part.name for part in self.parts if part.status == "refused"]
        verdict = f"not passed: {', '.join(bad)}" if bad else "all parts passed"
        verdict += f"; refused by the machine: {', '.join(refused)}" if refused else ""
        return "\n".join([*lines, f"{self.machine.get('device')}: {verdict}; results are in {self.folder}"])


def _new_log(folder: Path, command: str) -> IO[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    # An earlier run's results beside this one's would be taken for this one's.
    for name in (f"{command}.json", f"{command}.log"):
        (folder / name).unlink(missing_ok=True)
    # Not buffered, and every write at the end: commands write to it, too.
    return open(folder / f"{command}.log", "ab", buffering=0)


def run_limited(
    command: Sequence[str], limit: float, output: IO[bytes], environment: dict[str, str], folder: Path
) -> str:
    """Returns passed, failed or timed out; in any case no process that the command started continues."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return "passed" if process.wait(timeout=limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        # Interrupted, pytest still writes its report.
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=5)
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that waits for a stuck device may not die.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def search_path() -> str:
    """PATH with the programs that were installed with this Python, such as ninja, also where it is not activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def last_lines(text: str, count: int = 1) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])
