"""The text of a source and of what it includes by name, so that a change compiles only what sees it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["with_headers"]


def with_headers(source: Path, csrc: Path) -> bytes:
    """Of a source file, whose includes lie beside it or in csrc."""
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
