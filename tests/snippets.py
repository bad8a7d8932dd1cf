"""The code blocks of a page of the documentation, by the heading that they stand under, and what they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

__all__ = ["assert_same_output", "run", "snippets"]

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.(\d+))?")
# What is printed stands behind a print, or in a block of text behind the code.
PRINT = re.compile(r"^ *print\(.*\)  # (.+)$", re.MULTILINE)
OUTPUT = re.compile(r"\s*```text\n(.*?)```", re.DOTALL)


def text_of(page: str, heading: str | None) -> str:
    text = (ROOT / page).read_text()
    if heading is not None:
        (text,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return text


def snippets(page: str, heading: str | None = None, language: str = "python") -> list[str]:
    """What a page holds of a language, or the section of it that a heading begins."""
    found = re.findall(rf"```{language}\n(.*?)```", text_of(page, heading), flags=re.DOTALL)
    assert found
    return found


def run(page: str, heading: str | None, namespace: dict[str, object], without: str | None = None) -> None:
    """Runs them in order, as a reader would, but for those with a word in them. They must print what the page says."""
    text = text_of(page, heading)
    blocks = list(re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert blocks
    for block in blocks:
        if without is not None and without in block[1]:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block[1], page, "exec"), namespace)
        output = OUTPUT.match(text, block.end())
        told = PRINT.findall(block[1])
        if output is not None:
            assert_same_output(printed.getvalue(), output[1])
        elif told:
            assert_same_output(printed.getvalue(), "\n".join(told))


def assert_same_output(found: str, expected: str) -> None:
    """Whether two texts are the same, but for the last digit of numbers that have a decimal point."""
    assert NUMBER.sub("0", found.strip()) == NUMBER.sub("0", expected.strip())
    for mine, theirs in zip(NUMBER.finditer(found), NUMBER.finditer(expected), strict=True):
        tolerance = 0 if theirs[1] is None else 1.01 * 10.0 ** -len(theirs[1])
        values = [float(number[0].replace(",", "")) for number in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], abs=tolerance), expected
