"""`pdl-ext doctor`: what is wrong is found, with something to run, and what may be left out is no fault."""

from __future__ import annotations

import re
import shlex
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pdl_ext
from pdl_ext.cli import doctor
from pdl_ext.cli.main import main
from pdl_ext.engine import ops

REQUIRES = [
    "torch>=2.10",
    "tqdm>=4.66",
    'pyarrow>=16; extra == "corpus"',
    'tokenizers>=0.20; extra == "corpus"',
    'jinja2>=3.1; extra == "chat"',
    'pdl_ext[corpus]; extra == "chat"',
    'ruff==0.17.6; extra == "dev"',
]
INSTALLED = {"torch": "2.13.0+cpu", "tqdm": "4.66", "pyarrow": "20.1", "tokenizers": "0.22", "jinja2": "3.1.6"}


@pytest.fixture
def told(capsys):
    """Runs the command, and gives its exit code and, by subject, states with what is told and what there is to run."""

    def run():
        code = main(["doctor"])
        findings, last = {}, None
        for line in capsys.readouterr().out.splitlines():
            if found := re.fullmatch(
                r"(ok|absent|wrong) +((?:package|extra|loss on|compiled|CUDA|PyTorch) ?\S*) +(.*)", line
            ):
                state, last, text = map(str.strip, found.groups())
                findings[last] = (state, text, "")
            elif line.startswith(" "):
                findings[last] = (*findings[last][:2], line.strip())
        return code, findings

    return run


@pytest.fixture
def installed(monkeypatch):
    """Versions by package, which a test may change."""
    versions = dict(INSTALLED)

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "EXTRAS", {"corpus": "counts columns", "chat": "counts chats"})
    return versions


def test_all_is_well(told, installed):
    code, findings = told()
    assert code == 0
    # A PyTorch with CUDA may have this module's CPU kernels alone.
    lacks_kernels = torch.version.cuda is not None and not ops._C.cuda_architectures()
    assert findings.pop("CUDA kernels")[0] == ("absent" if lacks_kernels else "ok")
    assert {state for state, _, _ in findings.values()} == {"ok"}
    assert findings["package torch"][1] == "2.13.0+cpu (2.10 or later)"
    assert findings["extra chat"][1] == "counts chats"
    assert findings["loss on cpu"][1] == "counts, loss and gradient are those of PyTorch"
    module = f"built with PyTorch {ops._C.built_with_torch()}, runs with {torch.__version__}"
    assert findings["compiled module"][1] == module


def test_the_installation_of_the_tests_fits_together(told):
    code, findings = told()
    assert code == 0, findings
    assert {f"extra {extra}" for extra in doctor.EXTRAS} <= findings.keys()


@pytest.mark.parametrize(
    ("package", "version", "told_of"),
    [
        ("torch", "2.9.1", "got 2.9.1, expected 2.10 or later"),
        ("torch", "1.13", "got 1.13, expected 2.10 or later"),
        ("tqdm", None, "is not installed, expected 4.66 or later"),
    ],
)
def test_a_package_that_is_needed(package, version, told_of, told, installed):
    installed[package] = version
    if version is None:
        del installed[package]
    code, findings = told()
    assert code == 1
    least = {"torch": "2.10", "tqdm": "4.66"}[package]
    assert findings[f"package {package}"] == ("wrong", told_of, f'run: pip install --upgrade "{package}>={least}"')


def test_an_extra_may_be_missing(told, installed):
    del installed["tokenizers"]
    code, findings = told()
    assert code == 0
    told_of = "counts columns; not installed: tokenizers>=0.20"
    assert findings["extra corpus"] == ("absent", told_of, 'run: pip install "pdl_ext[corpus]"')
    # As a part of this one.
    assert findings["extra chat"][0] == "absent"


def test_an_extra_that_is_too_old(told, installed):
    installed["pyarrow"] = "15.0.2"
    code, findings = told()
    assert code == 1
    told_of = "got pyarrow 15.0.2, expected 16 or later"
    assert findings["extra corpus"] == ("wrong", told_of, "run: pip install --upgrade 'pyarrow>=16'")


def test_of_sources_that_nobody_installed_the_rest_is_checked(told, monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    code, findings = told()
    assert code == 0
    assert findings["package pdl_ext"][0] == "absent"
    assert findings["loss on cpu"][0] == "ok"


def test_each_extra_that_the_library_asks_for_is_looked_at():
    sources = [path.read_text() for path in Path(pdl_ext.__file__).parent.rglob("*.py")]
    asked = {extra for source in sources for extra in re.findall(r"require\(\"[\w.]+\", \"(\w+)\"\)", source)}
    assert asked >= {"corpus", "chat", "ray"}
    assert asked <= doctor.EXTRAS.keys()
    provided = metadata.metadata("pdl_ext").get_all("Provides-Extra")
    assert doctor.EXTRAS.keys() <= set(provided)


def test_requirements_are_read_as_pip_reads_them():
    packaging = pytest.importorskip("packaging.requirements", reason="comes with pytest")
    for extra in (None, *doctor.EXTRAS):
        read = {(each.name, each.least) for each in doctor._requirements(extra)}
        expected, extras = set(), [extra]
        for name in extras:
            for each in map(packaging.Requirement, metadata.requires("pdl_ext")):
                marker = str(each.marker or "")
                if marker != (f'extra == "{name}"' if name else ""):
                    continue
                if each.name == "pdl_ext":
                    extras += each.extras
                else:
                    expected.add((each.name, str(each.specifier).removeprefix(">=")))
        assert read == expected
        assert read


@pytest.mark.parametrize(
    ("version", "least", "is_older"),
    [
        ("2.10.0", "2.10", False),
        ("2.10", "2.10.0", False),
        ("2.9.9", "2.10", True),
        ("2.10.0a0+git1", "2.10", False),
        ("16", "16.1", True),
        ("1!0.1", "3", True),
        ("2025.3.0.post1", "2025.3", False),
        ("0.1", "", False),
    ],
)
def test_versions_compare_by_their_numbers(version, least, is_older):
    assert doctor._is_older(version, least) == is_older


def test_pytorch_that_cannot_be_imported(told, monkeypatch):
    def import_module(name):
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    code, findings = told()
    assert code == 1
    state, text, remedy = findings["PyTorch"]
    assert (state, text) == ("wrong", "cannot be imported: libcudart.so.13: cannot open shared object file")
    assert remedy.startswith("install a PyTorch")
    assert "compiled module" not in findings


def test_a_loss_that_is_another_one(told, monkeypatch):
    real = pdl_ext.functional.pdl_loss
    monkeypatch.setattr(pdl_ext.functional, "pdl_loss", lambda *arguments: 1.001 * real(*arguments))
    code, findings = told()
    assert code == 1
    state, text, remedy = findings["loss on cpu"]
    assert (state, text) == ("wrong", "differs from PyTorch's by 1.0e-03 of it, expected 1e-04 at most")
    assert remedy == "report it with the output of `pdl-ext info`"


def test_a_loss_of_no_number_or_none(told, monkeypatch):
    real = pdl_ext.functional.pdl_loss
    monkeypatch.setattr(pdl_ext.functional, "pdl_loss", lambda *arguments: float("nan") * real(*arguments))
    assert told()[1]["loss on cpu"][0] == "wrong"

    def fails(*_):
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(pdl_ext.functional, "pdl_loss", fails)
    assert told()[1]["loss on cpu"][:2] == ("wrong", "fails: CUDA error: no kernel image is available")


def cards(monkeypatch, *, built, cuda, seen):
    """A build and a PyTorch with or without CUDA, and the compute capabilities of the cards that are seen."""
    module = SimpleNamespace(
        cuda_architectures=lambda: built,
        cuda_status=lambda: "built: nvcc is there" if built else "not built: nvcc was not found (set CUDA_HOME)",
        built_with_torch=ops._C.built_with_torch,
    )
    monkeypatch.setattr(ops, "_C", module)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: seen[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    # No card has to be there.
    real = doctor._distance
    monkeypatch.setattr(doctor, "_distance", lambda torch, device: real(torch, torch.device("cpu")))


BUILT = "750,800,890,900"


@pytest.mark.parametrize(
    ("built", "cuda", "seen", "state", "remedy"),
    [
        ("", None, [], "ok", ""),
        ("", "13.0", [], "absent", "where nvcc of CUDA 13.0 is, run: PDL_EXT_CUDA=1 pip install "),
        ("", "13.0", [(9, 0)], "wrong", "where nvcc of CUDA 13.0 is, run: PDL_EXT_CUDA=1 pip install "),
        (BUILT, None, [], "wrong", "run: pip install "),
        (BUILT, "13.0", [], "ok", ""),
        (BUILT, "13.0", [(9, 0)], "ok", ""),
    ],
)
def test_cuda_kernels(built, cuda, seen, state, remedy, told, monkeypatch):
    cards(monkeypatch, built=built, cuda=cuda, seen=seen)
    code, findings = told()
    assert code == (state == "wrong")
    found, text, run = findings["CUDA kernels"]
    assert found == state
    assert run.startswith(remedy)
    assert bool(run) == bool(remedy)
    assert text.startswith("built: " if built else "not built: ")
    assert ("loss on cuda:0" in findings) == bool(built and seen)


def test_each_card_is_looked_at(told, monkeypatch):
    cards(monkeypatch, built=BUILT, cuda="13.0", seen=[(9, 0), (7, 0)])
    code, findings = told()
    assert code == 1
    assert findings["loss on cuda:0"][0] == "ok"
    state, text, remedy = findings["loss on cuda:1"]
    assert (state, text) == ("wrong", f"a card is sm_70, the kernels are for {BUILT}")
    assert remedy.startswith("run: TORCH_CUDA_ARCH_LIST=7.0 PDL_EXT_CUDA=1 pip install ")


@pytest.mark.parametrize(
    ("capability", "covers"),
    [((7, 5), True), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((12, 0), True), ((7, 0), False), ((6, 1), False)],
)
def test_which_cards_kernels_cover(capability, covers):
    assert doctor._covers(BUILT, *capability) == covers


def test_code_of_another_major_serves_no_card():
    assert not doctor._covers("750,900", 8, 0)
    assert not doctor._covers("890,900", 8, 6)
    assert doctor._covers("unknown", 8, 0)


@pytest.mark.devices("cuda")
def test_a_card_that_is_there(device, told):
    code, findings = told()
    assert code == 0
    assert findings["loss on cuda:0"][0] == "ok"


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ('{"dir_info": {}, "url": "file:///my%20folder"}', "'/my folder'"),
        ('{"archive_info": {}, "url": "file:///a.whl"}', "FOLDER (that of pdl_ext's sources)"),
        (None, "FOLDER (that of pdl_ext's sources)"),
    ],
)
def test_where_an_installed_package_is_built_anew_from(origin, source, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "pdl_ext" / "cli" / "doctor.py"))
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: origin))
    command = doctor._rebuild()
    assert command == f"pip install --no-deps --force-reinstall {source}"
    if origin and "dir_info" in origin:
        assert shlex.split(command)[-1] == "/my folder"
