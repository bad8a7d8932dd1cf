"""CONTRIBUTING.md is true: its files and commits are there, and its names and commands are the real ones."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
WALKS = ("Add a modulation", "Add a corpus format")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    return found


def files_in(text: str) -> list[str]:
    """The files that a text names with their folders."""
    return re.findall(r"`((?:pdl_ext|csrc|tests|docs|benchmarks)/[\w./-]+)`", text)


def steps(walk: str) -> list[str]:
    """The points of a walk, each with what stands below it."""
    found = re.split(r"^\d+\. ", section(walk).partition("Then run:")[0], flags=re.MULTILINE)[1:]
    assert len(found) > 5
    return found


def git(*arguments: str) -> str | None:
    """What git prints; None where there is no history, or not the commit that is asked for."""
    if not (ROOT / ".git").exists():
        return None
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def test_files_are_there():
    named = files_in(TEXT)
    assert len(named) > 20
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("walk", WALKS)
def test_a_commit_took_the_walk(walk):
    """It has the title, and changed the files, that the walk names: those that a step begins with."""
    (commit,) = set(re.findall(r"`([0-9a-f]{7,40})`", section(walk)))
    title, changed = git("show", "--no-patch", "--format=%s", commit), git("diff", "--name-only", f"{commit}^", commit)
    if title is None or changed is None:
        pytest.skip("this copy of the sources has not all of the history")
    assert f'Its title is "{title.strip()}".' in " ".join(section(walk).split())
    first = [files_in(step)[0] for step in steps(walk)]
    without_pages = [name for name in first if not name.startswith("docs/") or name in changed.split()]
    assert set(without_pages) - set(changed.split()) == set()
    assert len(without_pages) > 5


@pytest.mark.parametrize("walk", WALKS)
def test_what_a_step_tells_one_to_look_for_is_in_its_file(walk):
    """Names of lists, functions and tests that a line is added to."""
    for step in steps(walk):
        files = [ROOT / name for name in files_in(step)]
        text = "\n".join(path.read_text() for path in files if path.is_file())
        for name in re.findall(
            r"`(_?[A-Z][A-Z_]+|test_\w+|modulation_of|needs_entropy|write_files|stated_tokens)`", step
        ):
            assert re.search(rf"\b{name}\b", text), f"{name} is in none of {files_in(step)}"


def test_commands_are_those_of_make():
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE), ".venv/dev.stamp"}
    used = {word for line in re.findall(r"\bmake ((?:[\w./-]+ ?)+)[`\n]", TEXT) for word in line.split()}
    assert used >= {"test-fast", "test", "lint", "test-cpp"}
    assert used <= targets


def test_the_emulator_takes_ten_lines():
    lines = section("The emulator").strip().splitlines()
    assert [line.partition(". ")[0] for line in lines] == [str(number) for number in range(1, 11)]


def names_of(module: str) -> set[str]:
    """Its `__all__`, read from the source: some modules need packages that are not there."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def promised() -> dict[str, tuple[set[str], set[str]]]:
    """The names of each public module that are stable, and those that are provisional."""
    rows = re.findall(r"^\| `(pdl_ext[\w.]*)` \|(.*?)\|(.*?)\|$", TEXT, flags=re.MULTILINE)
    return {
        module: (set(re.findall(r"`(\w+)`", stable)), set(re.findall(r"`(\w+)`", new))) for module, stable, new in rows
    }


@pytest.mark.parametrize("module", promised())
def test_each_public_name_is_stable_or_provisional(module):
    stable, provisional = promised()[module]
    assert stable | provisional == names_of(module)
    assert stable & provisional == set()


def test_pages_use_no_other_names():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    used = [
        (page.name, module, name)
        for page in pages
        for module, names in re.findall(
            r"^ *from (pdl_ext[\w.]*) import ([\w, ]+)$", page.read_text(), flags=re.MULTILINE
        )
        for name in re.split(r", *", names.strip())
    ]
    public = {(module, name) for module, names in promised().items() for name in set.union(*names)}
    assert len(used) > 10
    assert [line for line in used if line[1:] not in public] == []


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_forms_are_such(form):
    """As GitHub reads them: it shows none of one that is wrong."""
    yaml = pytest.importorskip("yaml", reason="comes with transformers")
    content = yaml.safe_load(form.read_text())
    if form.name == "config.yml":
        assert content == {"blank_issues_enabled": True}
        return
    assert content.keys() == {"name", "description", "labels", "body"}
    ids = [item["id"] for item in content["body"]]
    assert len(set(ids)) == len(ids)
    for item in content["body"]:
        assert item.keys() == {"type", "id", "attributes", "validations"}
        assert item["type"] in ("textarea", "input")
        assert item["attributes"]["label"]
        assert item["attributes"].keys() <= {"label", "description", "render", "placeholder"}
        assert item["validations"].keys() == {"required"}


def test_forms_ask_for_what_the_command_tells():
    asked = {form.name: set(re.findall(r"`pdl-ext (\w+)`", form.read_text())) for form in FORMS}
    assert asked["bug.yml"] == {"info", "doctor"}
    assert asked["install.yml"] == {"doctor"}
    assert asked["request.yml"] == {"info"}
