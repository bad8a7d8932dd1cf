"""The choices of a build, and the errors of an import without a build."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
BUILD_FLAGS = json.loads((ROOT / "build_flags.json").read_text())


# What passes flags of build_flags.json to a compiler.
READERS = (
    "setup.py",
    "CMakeLists.txt",
    "tests/cuda_compile.py",
    "tests/cuda_emulator/__init__.py",
    "tests/test_build.py",
)


def run_python(code, **environment):
    """Runs code from outside the source folder, with only what `environment` adds."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_source_folder_without_a_build_says_what_to_run(tmp_path):
    shutil.copytree(ROOT / "pdl_ext", tmp_path / "pdl_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable install's finder would lend the copy the module that it lacks.
    forget_editable = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    result = run_python(forget_editable + "from pdl_ext import PDLLoss", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "ImportError: pdl_ext's compiled module cannot be imported: it is not built" in result.stderr
    assert "pip install -e ." in result.stderr


def test_a_module_of_another_pytorch_says_how_to_build_it_anew(tmp_path):
    shutil.copytree(ROOT / "pdl_ext", tmp_path / "pdl_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "pdl_ext" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not for this system")
    result = run_python("from pdl_ext import PDLLoss", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert f"was built with another PyTorch than {torch.__version__}" in result.stderr
    assert "pip install --no-deps --force-reinstall" in result.stderr


@pytest.mark.parametrize("is_there", [False, True])
def test_the_doctor_comes_without_a_compiled_module_that_can_be_imported(tmp_path, is_there):
    folder = tmp_path / "the sources"
    shutil.copytree(ROOT / "pdl_ext", folder / "pdl_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "build_backend.py", folder)
    if is_there:
        (folder / "pdl_ext" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"not for this system")
    forget_editable = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    run = "from pdl_ext.cli.main import main; sys.exit(main(['doctor']))"
    result = run_python(forget_editable + run, PYTHONPATH=str(folder))
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    (wrong,) = (number for number, line in enumerate(lines) if line.startswith("wrong "))
    assert lines[wrong].split()[1:3] == ["compiled", "module"]
    assert ("was built with another PyTorch than" if is_there else "is not built") in lines[wrong]
    command = "pip install --no-deps --force-reinstall -e"
    assert lines[wrong + 1].strip() == f"run: {command} '{folder}'"
    assert any(line.startswith(("ok      extra", "absent  extra")) for line in lines)
    assert lines[-1] == "1 wrong"


@pytest.mark.parametrize("through", ["site-packages", "a path file"])
def test_an_isolated_build_takes_the_pytorch_of_the_environment(tmp_path, through):
    """As pip runs a build: the environment's Python with a path of its own, from which site-packages are removed."""
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    home = packages if through == "site-packages" else tmp_path / "elsewhere"
    (home / "torch").mkdir(parents=True)
    (home / "torch" / "__init__.py").write_text("__version__ = 'of the environment'")
    (home / "needed_by_torch.py").touch()
    if home != packages:
        (packages / "elsewhere.pth").write_text(str(home))
    overlay = tmp_path / "overlay"
    (overlay / "setuptools").mkdir(parents=True)
    (overlay / "setuptools" / "build_meta.py").touch()
    hidden = [str(packages), str(home)]
    (overlay / "sitecustomize.py").write_text(f"import sys; sys.path[:] = [p for p in sys.path if p not in {hidden}]")
    code = f"""import sys; sys.path.append({str(ROOT)!r})
import build_backend as backend
print(backend.get_requires_for_build_wheel())
import torch, needed_by_torch; print(torch.__version__)"""
    result = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(overlay)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines() == ["[]", "of the environment"], result.stderr


@pytest.mark.parametrize(
    ("hook", "with_torch", "required"),
    [
        ("wheel", True, []),
        ("editable", True, []),
        ("sdist", True, []),
        ("wheel", False, ["torch>=2.10", "numpy"]),
        ("editable", False, ["torch>=2.10", "numpy"]),
        ("sdist", False, []),
    ],
)
def test_pytorch_is_required_only_where_there_is_none(hook, with_torch, required):
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    hide = "" if with_torch else "backend.find_torch = lambda: False; "
    result = run_python(
        f"import build_backend as backend; {hide}print(backend.get_requires_for_build_{hook}())", PYTHONPATH=str(ROOT)
    )
    assert result.stdout.strip() == str(required), result.stderr


@pytest.mark.parametrize(
    ("wish", "said"),
    [("1", "PDL_EXT_CUDA=1 asks for the CUDA kernels, but "), ("yes", "PDL_EXT_CUDA is 'yes', expected 0 or 1")],
)
def test_a_wish_for_cuda_that_cannot_be_met_is_refused(wish, said):
    pytest.importorskip("setuptools", reason="the build is setuptools'")
    if wish == "1" and torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA, so the wish may be met")
    result = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "PDL_EXT_CUDA": wish},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert said in result.stderr


ARCHITECTURES = BUILD_FLAGS["architectures"]


@pytest.mark.parametrize(
    ("wish", "cards", "known", "chosen"),
    [
        (None, 0, ARCHITECTURES, f"{';'.join(ARCHITECTURES)}+PTX"),
        ("", 0, ARCHITECTURES, f"{';'.join(ARCHITECTURES)}+PTX"),
        ("native", 0, ["5.0", "8.0", "9.0"], "8.0;9.0+PTX"),  # an older compiler
        ("8.6", 0, ARCHITECTURES, "8.6"),
        (None, 1, ARCHITECTURES, ""),  # PyTorch asks the cards
    ],
)
def test_architectures_are_named_where_no_card_is_seen(tmp_path, wish, cards, known, chosen):
    pytest.importorskip("setuptools", reason="the build is setuptools'")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho " + " ".join(f"compute_{each.replace('.', '')}" for each in known))
    nvcc.chmod(0o755)
    code = f"""import os, torch
from torch.utils.cpp_extension import _get_cuda_arch_flags
torch.cuda.device_count = lambda: {cards}
import setup
setup.choose_architectures({str(tmp_path)!r}, {ARCHITECTURES})
print(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
if not {cards}: _get_cuda_arch_flags()"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    if wish is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = wish
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == chosen


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_a_build_without_pytorch_is_refused(hook, tmp_path):
    pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    result = run_python(
        f"import build_backend as backend; backend.find_torch = lambda: False; backend.{hook}({str(tmp_path)!r})",
        PYTHONPATH=str(ROOT),
    )
    assert result.returncode != 0
    assert "no PyTorch to build against" in result.stderr
    assert not list(tmp_path.iterdir())


def test_flags_and_macros_stand_in_one_file():
    flags = [flag for name, some in BUILD_FLAGS.items() for flag in some if name != "architectures"]
    assert len(set(flags)) == len(flags)
    # Of a macro its name, however it is passed on.
    names = [re.sub(r"^-D|=0x.*", "", flag) for flag in flags]
    for reader in READERS:
        text = (ROOT / reader).read_text()
        assert "build_flags.json" in text
        assert [name for name in names if re.search(rf"(?<![\w-])(-D)?{re.escape(name)}(?![\w-])", text)] == [], reader
    # What compiles for users takes no other flag than these.
    for reader in ("setup.py", "tests/cuda_compile.py"):
        assert re.findall(r"""["'](-(?:std=|f|O\d|D|W).*?)["']""", (ROOT / reader).read_text()) == [], reader


def test_sdist_holds_every_source(tmp_path):
    setuptools = pytest.importorskip("setuptools", reason="the build backend is setuptools'")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = f"import os; os.chdir({str(source)!r}); import build_backend as b; print(b.build_sdist({str(tmp_path)!r}))"
    result = run_python(code, PYTHONPATH=str(source))
    assert result.returncode == 0, result.stderr
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [*source.glob("csrc/**/*.*"), *source.glob("pdl_ext/cli/explore/*.*")]
    wanted = {str(path.relative_to(source)) for path in sources}
    wanted |= {
        "setup.py",
        "build_backend.py",
        "build_flags.json",
        "pyproject.toml",
        "CMakeLists.txt",
        "LICENSE",
        "README.md",
    }
    assert wanted - held == set()


AARCH64_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(AARCH64_COMPILER is None, reason="no aarch64-linux-gnu-g++ on this machine")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_cpu_sources_compile_for_aarch64(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = [*BUILD_FLAGS["common"], *BUILD_FLAGS["cxx"], "-O0", "-Wno-attributes", "-Werror"]
    command = [AARCH64_COMPILER, *flags, *includes, "-c", source, "-o", tmp_path / "object.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
