"""Executes docs/quickstart.ipynb, as a reader would.

python tests/notebook.py     writes what its cells print and draw into it
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import fresh_python
import nbformat
from nbclient import NotebookClient

__all__ = ["NOTEBOOK", "executed"]

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "quickstart.ipynb"


def executed(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """A copy with new outputs, run in a folder. Cells that install packages are left out, since nothing is installed.

    Raises CellExecutionError, with the cell and its traceback, for a cell that fails.
    """
    notebook = copy.deepcopy(notebook)
    sources = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.source.startswith("%pip install"):
            cell.source = ""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=600, resources=resources, record_timing=False)
    client.execute(env=fresh_python.environment())
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
    # Without the Python that it happened to run on.
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(notebook, Path(folder)), NOTEBOOK)


if __name__ == "__main__":
    main()
