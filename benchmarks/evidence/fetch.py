"""Fetches the texts that no Python package has, by apt: WordNet, and Debian's lists of packages with descriptions.

    python -m evidence.fetch

They go into build/evidence/sources; nothing else on the system changes. Existing files stay, so that a task keeps its
text; a task's digest shows whether two machines have the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from evidence.sources import DEBIAN, SOURCES, WORDNET

# Decompresses a list in whatever format apt keeps it.
CAT_FILE = "/usr/lib/apt/apt-helper"


def fetch_wordnet(folder: Path) -> None:
    """Fetches WordNet 3.0's files index.* and data.* from apt's package wordnet-base."""
    partial = _emptied(folder.with_name("wordnet.partial"))
    _run("apt-get", "download", "-q", "wordnet-base", cwd=partial)
    (package,) = partial.glob("*.deb")
    _run("dpkg", "-x", package.name, "unpacked", cwd=partial)
    (partial / "unpacked" / "usr" / "share" / "wordnet").rename(folder)
    shutil.rmtree(partial)


def fetch_debian(folder: Path) -> None:
    """Fetches the lists Packages and Translation-en of the release that apt is set up for, decompressed.

    Updates between point releases are left out, so that the examples are the same for months.
    """
    partial = _emptied(folder.with_name("debian.partial"))
    lists = _emptied(partial / "lists")
    _run("apt-get", "update", "-q", "-o", "Acquire::Languages=en", "-o", f"Dir::State::lists={lists.resolve()}")
    texts = _emptied(partial / "texts")
    for kind in ("Packages", "Translation-en"):
        for path in sorted(lists.glob(f"*_debian_dists_*_main_*{kind}*")):
            if "-updates_" in path.name:
                continue
            content = subprocess.run([CAT_FILE, "cat-file", path], check=True, stdout=subprocess.PIPE).stdout
            (texts / f"{path.name.partition(kind)[0]}.{kind}").write_bytes(content)
    texts.rename(folder)
    shutil.rmtree(partial)


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, check=True, cwd=cwd, stdout=subprocess.DEVNULL)


def main() -> int:
    if shutil.which("apt-get") is None:
        print("apt-get is missing: of the tasks only kjv can be run; take the others' sources from a Debian system")
        return 1
    for name, fetch in ((WORDNET, fetch_wordnet), (DEBIAN, fetch_debian)):
        if not (SOURCES / name).exists():
            fetch(SOURCES / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
