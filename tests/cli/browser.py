"""A headless Chromium for tests, over the Chrome DevTools protocol: keys, the pointer, and a page's content."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

__all__ = ["CHROMIUM", "Page", "chromium"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# What the protocol asks for beside the name of a key.
_KEY_CODES = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    # No name has an address: what asks for the network gets an error.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@contextlib.contextmanager
def chromium() -> Iterator[ClientConnection]:
    """The protocol's connection to a browser that lives as long."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [CHROMIUM, *_OPTIONS, *sandbox, f"--user-data-dir={folder}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, path = _where_it_listens(Path(folder) / "DevToolsActivePort", process)
            with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as connection:
                yield connection
        finally:
            process.terminate()
            process.wait()


def _where_it_listens(file: Path, process: subprocess.Popen[bytes]) -> tuple[str, str]:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return lines[0], lines[1]
        time.sleep(0.02)
    raise RuntimeError(f"{CHROMIUM} does not start (exit code {process.poll()})")


class Page:
    """A tab of a browser. events: the protocol's events of it, as pairs of method and parameters."""

    _numbers = itertools.count(1)

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The protocol's answer to a method."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._connection.send(json.dumps(message))
        while (answer := self._receive()).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        answer = json.loads(self._connection.recv(timeout=30))
        if "method" in answer and answer.get("sessionId") == self._session:
            self.events.append((answer["method"], answer["params"]))
        return answer

    def open(self, path: Path) -> None:
        """Loads a file, and returns when it is drawn."""
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.told("Page.loadEventFired"):
            self._receive()
        self.drawn()

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of a method."""
        return [parameters for name, parameters in self.events if name == method]

    def run(self, script: str) -> Any:
        """The value of an expression in the page, or what a promise comes to. Raises RuntimeError where it throws."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def drawn(self) -> None:
        """Waits until what was changed is drawn."""
        self.run("new Promise(then => requestAnimationFrame(() => requestAnimationFrame(() => then())))")

    def press(self, *keys: str) -> None:
        """Presses keys, one after the other, in the focused element."""
        for key in keys:
            told = {"key": key, "code": key, "windowsVirtualKeyCode": _KEY_CODES[key]}
            self.call("Input.dispatchKeyEvent", type="rawKeyDown", **told)
            self.call("Input.dispatchKeyEvent", type="keyUp", **told)
        self.drawn()

    def close(self) -> None:
        """Closes the tab."""
        self._session = None
        self.call("Target.closeTarget", targetId=self._target)
