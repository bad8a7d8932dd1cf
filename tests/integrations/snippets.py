"""The code blocks of a page of the documentation, by the heading that they stand under."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["run", "snippets"]

ROOT = Path(__file__).resolve().parents[2]


def snippets(page: str, heading: str | None = None) -> list[str]:
    """The Python of a page, or of the section of it that a heading begins."""
    text = (ROOT / page).read_text()
    if heading is not None:
        (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found


def run(page: str, heading: str | None, namespace: dict[str, object]) -> None:
    """Runs them in order, as a reader would."""
    for snippet in snippets(page, heading):
        exec(compile(snippet, page, "exec"), namespace)
