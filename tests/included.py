"""The text of a source and its includes, so that a change recompiles only the sources that include it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["with_headers"]


def with_headers(source: Path, csrc: Path) -> bytes:
    """The text of a source file, whose includes are beside it or in csrc."""
    texts: dict[Path, bytes] = {}
    paths = [source]
    while paths:
        path = paths.pop().resolve()
        if path not in texts:
            texts[path] = path.read_bytes()
            names = re.findall(rb'^#include "(.+)"$', texts[path], re.MULTILINE)
            found = (folder / name.decode() for name in names for folder in (path.parent, csrc))
            paths += filter(Path.is_file, found)
    return b"".join(texts.values())
