"""The pages of the reference say what the sources do: options with their defaults, errors, variables and formats."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pdl_ext
from pdl_ext import cli, functional, modulation, weighting
from pdl_ext.corpus import TargetPolicy, count_corpus
from pdl_ext.corpus.discover import FORMATS
from pdl_ext.options import LossOptions
from pdl_ext.weighting import Weighting

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*(ROOT / "pdl_ext").rglob("*.py"), ROOT / "setup.py"]


def rows(page, section):
    """The rows of the tables below a heading of a page, each a list of its cells."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (body,) = re.findall(rf"^#+ {re.escape(section)}\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", body, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for table in tables for line in table.splitlines()]


def defaults(callable_, without=()):
    signature = inspect.signature(callable_).parameters.values()
    return {parameter.name: parameter.default for parameter in signature if parameter.name not in without}


def told(table, name=0, default=2):
    """The defaults in a table, by option."""
    named = {row[name].strip("`"): row[default].strip("`") for row in table}
    empty = inspect.Parameter.empty
    return {key: empty if value == "required" else ast.literal_eval(value) for key, value in named.items()}


OF_WEIGHTINGS = defaults(Weighting)


def defaults_of_integration(module, name):
    """Those of a function whose module needs a framework to be imported."""
    tree = ast.parse((ROOT / "pdl_ext" / "integrations" / f"{module}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    given = function.args
    assert not given.defaults
    required = dict.fromkeys((argument.arg for argument in given.args), inspect.Parameter.empty)
    optional = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return required | {argument.arg: ast.literal_eval(default) for argument, default in optional}


@pytest.mark.parametrize(
    ("section", "callable_", "without"),
    [
        ("PowerLaw", pdl_ext.PowerLaw, OF_WEIGHTINGS),
        ("LossOptions", LossOptions, ()),
        ("PDLLoss", pdl_ext.PDLLoss, defaults(LossOptions)),
        ("TargetPolicy", TargetPolicy, ()),
        ("count_corpus", count_corpus, ()),
        ("count_labels", pdl_ext.count_labels, ()),
    ],
)
def test_options_have_their_defaults(section, callable_, without):
    of_command = section in ("TargetPolicy", "count_corpus")
    assert told(rows("options.md", section), default=3 if of_command else 2) == defaults(callable_, without)


@pytest.mark.parametrize(
    ("section", "module", "name"),
    [
        ("apply_pdl_loss", "transformers", "apply_pdl_loss"),
        ("Ray's count_dataset", "ray", "count_dataset"),
    ],
)
def test_options_of_integrations_have_their_defaults(section, module, name):
    assert told(rows("options.md", section)) == defaults_of_integration(module, name)


def test_options_of_every_weighting_have_their_defaults():
    table = told(rows("options.md", "Every weighting"))
    # A mapping is made anew for each.
    assert table == {**OF_WEIGHTINGS, "fixed": {}}


@pytest.mark.parametrize(
    ("section", "module", "base"),
    [("Other weightings", weighting, Weighting), ("Modulations", modulation, modulation.Modulation)],
)
def test_options_of_a_family_have_their_defaults(section, module, base):
    table = rows("options.md", section)
    for name in module.__all__:
        kind = getattr(module, name)
        if not inspect.isclass(kind) or kind in (base, pdl_ext.PowerLaw):
            continue
        of_kind = [row for row in table if row[0] == f"`{name}`"]
        without = OF_WEIGHTINGS if base is Weighting else ()
        assert told(of_kind, name=1, default=3) == defaults(kind, without), name


def test_arguments_of_a_call_have_their_defaults():
    tensors = {"logits", "targets", "hidden", "weight"}
    expected = {}
    for function in (functional.pdl_loss, functional.linear_pdl_loss):
        expected |= defaults(function, {*defaults(LossOptions), *tensors})
    assert told(rows("options.md", "A call")) == expected


def test_environment_variables_are_told():
    texts = [path.read_text() for path in [*SOURCES, *(ROOT / "csrc").rglob("*.cpp")]]
    read = {name for text in texts for name in re.findall(r"(?:environ\.get|getenv)\(\"(PDL_EXT_\w+)\"", text)}
    assert len(read) == 2
    page = {row[0].strip("`") for row in rows("options.md", "Environment variables")}
    assert {name for name in page if name.startswith("PDL_EXT_")} == read


def test_commands_are_told():
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    names = {module.name for module in pkgutil.iter_modules(cli.__path__)} - {"__main__"}
    for module in (importlib.import_module(f"pdl_ext.cli.{name}") for name in names):
        if hasattr(module, "add_parser"):
            module.add_parser(subparsers)
    table = {row[0].strip("`").removeprefix("pdl-ext "): row[1] for row in rows("options.md", "Commands")}
    assert table.keys() == subparsers.choices.keys()
    of_count = "".join(row[1] for name in ("count_corpus", "TargetPolicy") for row in rows("options.md", name))
    table["count"] += of_count
    for name in subparsers.choices.keys() - {"demo"}:
        options = {option for action in subparsers.choices[name]._actions for option in action.option_strings}
        long = {option for option in options if option.startswith("--")} - {"--help", "--output"}
        assert set(re.findall(r"--[a-z-]+", table[name])) == long, name


def test_formats_are_told():
    assert {row[0].strip("`") for row in rows("formats.md", "Formats read")} == FORMATS.keys()


def messages():
    """What the sources may say: each string of them, with a null where a value is put in."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    for path in (ROOT / "csrc").rglob("*.cpp"):
        found += re.findall(r'"([^"\n]+)"', path.read_text(encoding="utf-8"))
    return found


def begins_like(quoted, message):
    """Whether a message begins as it is quoted. `...` and a null stand for any value."""
    values = re.escape(quoted).replace(re.escape("..."), ".+?")
    return re.match(values, message, flags=re.DOTALL) is not None


def quoted_messages():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)


def test_quoted_errors_are_in_the_sources():
    of_sources, quoted = messages(), quoted_messages()
    assert len(quoted) >= 80
    assert [text for text in quoted if not any(begins_like(text, message) for message in of_sources)] == []
    assert not any(begins_like("logits: got ... that nobody says", message) for message in of_sources)
