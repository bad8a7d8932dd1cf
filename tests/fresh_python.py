"""A Python process for a test, which imports the same pdl_ext as the test: the only way that tests start one.

Python searches the folder in which it is started, or that of the script, before installed packages. Started in the
source folder it would test the sources, and never the wheel that `make torch-versions` installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import pdl_ext

__all__ = ["environment", "popen", "run"]

PACKAGE = Path(pdl_ext.__file__).resolve().parent
# Kept while this process exists.
EMPTY = tempfile.TemporaryDirectory()


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """That of this process and more, in which Python imports the same pdl_ext."""
    found = {**os.environ, **(more or {})}
    if str(PACKAGE.parent) not in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        # Sources that are on this process' path by its command line, or by an editable install.
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE.parent), found.get("PYTHONPATH")]))
    return found


def popen(*arguments: str | os.PathLike[str], env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """Starts Python with these arguments, in a folder that has no pdl_ext.

    env: added to that of this process; cwd: by default an empty folder.
    """
    folder = Path(options.setdefault("cwd", EMPTY.name))
    if (folder / "pdl_ext").exists():
        raise ValueError(f"cwd: got {folder}, whose pdl_ext would be imported, expected another folder")
    return subprocess.Popen([sys.executable, *arguments], env=environment(env), **options)


def run(
    *arguments: str | os.PathLike[str], timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess:
    """The output of Python with these arguments, as text. check: an exit code other than 0 is an error."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with popen(*arguments, **options) as process:
        try:
            output, error = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, error)
    if check:
        assert done.returncode == 0, error
    return done
