"""Imports within the corpus: formats are independent, and shared code does not depend on formats."""

import ast
from pathlib import Path

import pytest

import pdl_ext.corpus

CORPUS = Path(pdl_ext.corpus.__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ["formats", "reading"])
def test_readers_import_what_is_below_them(folder):
    files = sorted((CORPUS / folder).glob("*.py"))
    assert len(files) > 2
    own = {f"{path.name}: {name}" for path in files for name in imported(path) if name.startswith("pdl_ext")}
    below = ("corpus.reading.", "corpus.source.", "storage.place.", "_")
    assert [line for line in sorted(own) if not line.partition(": pdl_ext.")[2].startswith(below)] == []


def test_sources_know_no_reader():
    assert not [name for name in imported(CORPUS / "source.py") if name.startswith("pdl_ext.corpus")]
