"""Processes that tests start import the same pdl_ext as the tests: the installed one, if it is installed."""

from __future__ import annotations

import re
from pathlib import Path

import fresh_python
import pytest
import torch.multiprocessing as mp

import pdl_ext

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent
WHERE = "import pdl_ext; print(pdl_ext.__file__)"
# Those that are about the source folder itself: its build, and the checks that build it in place.
OF_THE_SOURCES = {"fresh_python.py", "gpu_check", "test_gpu_check.py", "test_build.py", "emulated_tests.py", "wheels"}


@pytest.fixture(autouse=True)
def in_a_folder_with_another(tmp_path, monkeypatch):
    (tmp_path / "pdl_ext").mkdir()
    (tmp_path / "pdl_ext" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)


def same_package(found):
    return Path(found.strip()) == Path(pdl_ext.__file__)


def test_a_script_and_a_path_that_a_test_adds(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "where.py").write_text(f"import added; {WHERE}")
    (folder / "added.py").touch()
    assert same_package(fresh_python.run(folder / "where.py", check=True).stdout)
    assert same_package(fresh_python.run("-c", f"import added; {WHERE}", env={"PYTHONPATH": str(folder)}).stdout)


def test_torchrun(tmp_path):
    (tmp_path / "where").mkdir()
    (tmp_path / "where" / "where.py").write_text(WHERE)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "where"]
    assert same_package(fresh_python.run(*command, cwd=tmp_path / "where", check=True).stdout)


def tell(_rank, path):
    path.write_text(pdl_ext.__file__)


def test_ranks(tmp_path):
    mp.spawn(tell, (tmp_path / "told",), nprocs=1)
    assert same_package((tmp_path / "told").read_text())


def test_another_package_in_the_way_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"cwd: got .*, whose pdl_ext would be imported"):
        fresh_python.run("-c", WHERE, cwd=tmp_path)


def test_no_test_starts_python_otherwise():
    starts = re.compile(r"sys\.executable|\[[\"'](python3?|pytest|torchrun|pdl-ext)[\"']")
    found = (path.relative_to(TESTS) for path in TESTS.rglob("*.py") if starts.search(path.read_text()))
    assert [path for path in found if OF_THE_SOURCES.isdisjoint(path.parts)] == []
