"""The code blocks of a page of the documentation, by their headings."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["run", "snippets"]

ROOT = Path(__file__).resolve().parents[2]


def snippets(page: str, heading: str | None = None, language: str = "python") -> list[str]:
    """What a page holds of a language, or the section of it that a heading begins."""
    text = (ROOT / page).read_text()
    if heading is not None:
        (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert found
    return found


def run(page: str, heading: str | None, namespace: dict[str, object]) -> None:
    """Runs them in order, as a reader would."""
    for snippet in snippets(page, heading):
        exec(compile(snippet, page, "exec"), namespace)
