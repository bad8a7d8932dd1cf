"""Imports are acyclic, and go neither to a higher layer nor to another module's private names.

Read from the sources, so that an import counts at any place: at the top, in a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import fresh_python
import pytest

import pdl_ext

# From the top down. A module may import from its own room and from lower layers. Rooms of one layer are independent.
# `.*`: a package with its contents.
LAYERS = (
    (("pdl_ext.cli.*",),),
    (("pdl_ext.integrations.*",),),
    (("pdl_ext",),),
    (
        ("pdl_ext.loss", "pdl_ext._token_weights"),
        ("pdl_ext.corpus.*",),
        ("pdl_ext.labels",),
        ("pdl_ext.statistics",),
        ("pdl_ext.reference",),
    ),
    (("pdl_ext.functional",),),
    (("pdl_ext.weighting.*",),),
    (("pdl_ext.frequency",),),
    (("pdl_ext.counts",), ("pdl_ext.provenance",)),
    (("pdl_ext.engine.*",),),
    (
        ("pdl_ext.options",),
        ("pdl_ext.storage.*",),
        ("pdl_ext._array",),
        ("pdl_ext._lock",),
        ("pdl_ext._outside_graphs",),
        ("pdl_ext._version",),
    ),
    (("pdl_ext.modulation",),),
    (("pdl_ext._checks",), ("pdl_ext._optional",), ("pdl_ext._printable",), ("pdl_ext._C",)),
)

# The non-public names that an integration may use: checks of arguments, and errors of missing packages.
PLUMBING = {"pdl_ext._checks", "pdl_ext._optional"}
# Packages that only the library itself uses.
INTERNAL = {"engine", "storage"}

# Names with an underscore that other libraries have, whatever they are asked of.
OTHERS_NAMES = {
    # Public by the documentation of named tuples and of argparse.
    "_asdict",
    "_fields",
    "_replace",
    "_SubParsersAction",
    # Of a tensor: what it is a view of, and how often it was written to. PyTorch tells them nowhere else.
    "_base",
    "_version",
    # Of a datasets.Dataset: what tells it from others.
    "_fingerprint",
    # Of torch.autograd.forward_ad: how deep forward-mode differentiation is nested. There is no public name.
    "_current_level",
}
# Modules without a public name for some of what the library needs of them.
OTHERS_MODULES = ("torch._C", "torch.distributed.distributed_c10d", "torch.Tensor._make_wrapper_subclass")


class Import(NamedTuple):
    """An import of a module, or of a name in it, with its line."""

    line: int
    module: str
    name: str | None


def sources() -> dict[str, str]:
    """The text of each module of pdl_ext."""
    root = Path(pdl_ext.__file__).parent
    found = {"pdl_ext._C": ""}
    for path in root.rglob("*.py"):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


def imports(module: str, text: str, modules: dict[str, str]) -> Iterator[Import]:
    """The imports of `modules` in a module, at any place."""
    is_package = any(other.startswith(f"{module}.") for other in modules)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, None) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                if f"{base}.{alias.name}" in modules:
                    yield Import(node.lineno, f"{base}.{alias.name}", None)
                elif base in modules:
                    yield Import(node.lineno, base, alias.name)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__", "require"):
            named = (argument.value for argument in node.args if isinstance(argument, ast.Constant))
            yield from (Import(node.lineno, name, None) for name in named if name in modules)


def name_of(node: ast.expr) -> str:
    """The last name of a dotted expression."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def circle(modules: dict[str, str]) -> list[str]:
    """Modules of which each imports the next, and the last is the first; empty if there are none."""
    graph = {name: {line.module for line in imports(name, text, modules)} for name, text in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # Which has them from the imported to the importer.
        return error.args[1][::-1]
    return []


def rooms_of(module: str) -> list[tuple[int, int]]:
    """The layer and room of a module, as numbers."""
    return [
        (layer, room)
        for layer, rooms in enumerate(LAYERS)
        for room, entries in enumerate(rooms)
        for entry in entries
        if holds(entry, module)
    ]


def holds(entry: str, module: str) -> bool:
    return module == entry or (entry.endswith(".*") and f"{module}.".startswith(entry[:-1]))


def upward(modules: dict[str, str]) -> list[str]:
    """Imports from outside the module's own room and the lower layers."""
    found = []
    for name, text in modules.items():
        for line, target, _ in imports(name, text, modules):
            ((layer, room),), ((below, other),) = rooms_of(name), rooms_of(target)
            if below < layer or (below == layer and other != room):
                found.append(f"{name}:{line} imports {target}")
    return found


def public_names(text: str) -> set[str]:
    """A module's __all__."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and [name_of(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return set()


def reached_into(name: str, text: str, modules: dict[str, str]) -> list[str]:
    """Uses of another module's names with an underscore."""
    found = [
        f"{name}:{line} imports {target}.{imported}"
        for line, target, imported in imports(name, text, modules)
        if imported is not None and is_private(imported) and imported not in public_names(modules[target])
    ]
    tree = ast.parse(text)
    own, called = own_names(tree), names_of_modules(tree)
    for line, owner, attribute in attributes(tree):
        if not is_private(attribute) or attribute in own | OTHERS_NAMES:
            continue
        used = full_name(f"{owner}.{attribute}", called)
        if owner not in ("self", "cls", "super()") and not used.startswith(OTHERS_MODULES):
            found.append(f"{name}:{line} uses {used}")
    return found


def attributes(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, owner and name of each attribute, also of those that are named in a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and name_of(node.func) in ("getattr", "setattr", "delattr", "hasattr"):
            owner, *others = node.args
            yield from ((node.lineno, ast.unparse(owner), name) for name in strings(others[:1]))
        elif isinstance(node, ast.Call) and name_of(node.func) == "attrgetter":
            dotted = (part for path in strings(node.args) for part in path.split("."))
            yield from ((node.lineno, "attrgetter", name) for name in dotted)


def strings(nodes: list[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def full_name(dotted: str, called: dict[str, str]) -> str:
    """A dotted name, with the module's own name in front."""
    first, *rest = dotted.split(".")
    return ".".join([called.get(first, first), *rest])


def not_public(name: str, text: str, modules: dict[str, str]) -> list[str]:
    """Uses by an integration of names that are neither public nor plumbing."""
    found = [
        f"{name}:{line} imports {module}{'' if imported is None else f'.{imported}'}"
        for line, module, imported in imports(name, text, modules)
        if module not in PLUMBING
        if is_internal(module) or (imported is not None and imported not in public_names(modules[module]))
    ]
    tree = ast.parse(text)
    called = names_of_modules(tree)
    for line, owner, attribute in attributes(tree):
        used = full_name(f"{owner}.{attribute}", called)
        if used in modules and used not in PLUMBING and is_internal(used):
            found.append(f"{name}:{line} uses {used}")
    return found


def is_internal(module: str) -> bool:
    return any(part.startswith("_") or part in INTERNAL for part in module.split("."))


def laid_out_by_hand(text: str) -> list[int]:
    """Lines that hard-code the layout of a table: `+ 3`, `zeros(3)`, `[-3]`, `[:-3]`, `[-3:]`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            known = "3" in (ast.unparse(node.left), ast.unparse(node.right))
        elif isinstance(node, ast.Call):
            known = ast.unparse(node.func).endswith("zeros") and [ast.unparse(a) for a in node.args[:1]] == ["3"]
        elif isinstance(node, ast.Subscript):
            index = node.slice
            parts = (index.lower, index.upper) if isinstance(index, ast.Slice) else (index,)
            known = any(part is not None and ast.unparse(part) == "-3" for part in parts)
        else:
            continue
        if known:
            found.append(node.lineno)
    return found


def names_of_modules(tree: ast.Module) -> dict[str, str]:
    """By which names a module has imported others."""
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {alias.asname: alias.name for alias in aliases if alias.asname is not None}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """The names with an underscore that a module gives to anything of its own: a method, a field, an attribute."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and name_of(node.value) == "self":
            own.add(node.attr)
    return own


def test_no_module_comes_back_to_itself():
    assert circle(sources()) == []


def test_imports_go_down():
    assert upward(sources()) == []


def test_each_module_is_in_one_room():
    wrong = {name: rooms for name in sources() if len(rooms := rooms_of(name)) != 1}
    assert wrong == {}


def test_each_entry_is_a_module():
    modules = sources()
    missing = {
        entry
        for rooms in LAYERS
        for entries in rooms
        for entry in entries
        if not any(holds(entry, module) for module in modules)
    }
    assert missing == set()


def test_integrations_use_public_names():
    modules = sources()
    integrations = [name for name in modules if name.startswith("pdl_ext.integrations.")]
    assert [place for name in integrations for place in not_public(name, modules[name], modules)] == []


def test_nobody_reaches_into_another_module():
    modules = sources()
    assert [place for name, text in modules.items() for place in reached_into(name, text, modules)] == []


def test_only_one_module_knows_how_a_packed_table_lies():
    knowing = [name for name, text in sources().items() if laid_out_by_hand(text)]
    assert knowing == ["pdl_ext.counts"]


# 72 MiB and a second, which only who compiles has to have.
NO_COMPILER = """
import sys, torch, pdl_ext.corpus, pdl_ext.cli.main
frequency = pdl_ext.TokenFrequency(5)
for loss in (pdl_ext.PDLLoss(), pdl_ext.PDLLoss(frequency)):
    loss(torch.zeros(2, 5), torch.arange(2))
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_a_loss_imports_no_compiler():
    assert fresh_python.run("-c", NO_COMPILER, check=True).stdout == "False\n"


CIRCLES = {
    "at the top": {"p.a": "from p import b", "p.b": "from p.a import x"},
    "in a function": {"p.a": "import p.b as b", "p.b": "def f():\n    from p.a import x"},
    "for a type": {"p.a": "from p.b import X", "p.b": "if TYPE_CHECKING:\n    from p.a import Y"},
    "by the package": {"p": "from p.a import x", "p.a": "import p"},
    "by the package of a package": {"p.q": "def f():\n    from p.q import a", "p.q.a": "from p.q import NAME"},
    "of three": {"p.a": "from p import b", "p.b": "from p import c", "p.c": "from p import a"},
    "relative": {"p.a": "from . import b", "p.b": "from .a import x"},
    "by a name": {"p.a": "from p import b", "p.b": "importlib.import_module('p.a')"},
    "with itself": {"p.a": "from p.a import x"},
}


@pytest.mark.parametrize("name", CIRCLES)
def test_a_circle_is_found(name):
    modules = {"p": "", **CIRCLES[name]}
    found = circle(modules)
    assert found[0] == found[-1]
    assert set(found) == set(CIRCLES[name])


@pytest.mark.parametrize("added", ["import pdl_ext", "def f():\n    from pdl_ext.frequency import TokenFrequency"])
def test_a_circle_of_the_library_is_found(added):
    modules = sources()
    modules["pdl_ext.counts"] += f"\n{added}\n"
    assert "pdl_ext.counts" in circle(modules)


def test_modules_under_one_package_are_no_circle():
    assert circle({"p": "from p import a, b", "p.a": "from p.b import x", "p.b": "import q, torch.p.a"}) == []


@pytest.mark.parametrize(
    ("module", "line", "is_upward"),
    [
        ("pdl_ext.counts", "from pdl_ext import loss", True),
        ("pdl_ext.corpus.table", "from pdl_ext.loss import PDLLoss", True),
        ("pdl_ext.corpus.table", "import pdl_ext", True),
        ("pdl_ext.corpus.table", "from pdl_ext.corpus import state", False),
        ("pdl_ext.loss", "from pdl_ext import counts", False),
    ],
)
def test_an_import_of_what_is_above_is_found(module, line, is_upward):
    modules = dict.fromkeys(sources(), "")
    modules[module] = line
    assert bool(upward(modules)) == is_upward


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("from p.b import _x", True),
        ("from p.b import _told", False),
        ("def f(other):\n    other._x", True),
        ("def f(self):\n    self.other._x", True),
        ("class C:\n    def f(self):\n        self._x", False),
        ("class C:\n    _x: int\n    def f(self, other: C):\n        other._x", False),
        ("class C:\n    def f(self, other: C):\n        self._x = other._x", False),
        ("from p import _b\n_b.x", False),
        ("import torch\ntorch._C._x", False),
        ("import torch\ntorch._x", True),
        ("import torch.distributed as dist\ndist.distributed_c10d._x", False),
        ("x.__doc__", False),
        ("getattr(x, '_x')", True),
        ("getattr(x, '_x', None)", True),
        ("getattr(x, 'x', '_x')", False),
        ("class C:\n    def f(self):\n        getattr(self, '_x')", False),
        ("attrgetter('_x')", True),
        ("operator.attrgetter('x', 'x._x')", True),
        ("operator.attrgetter('x')", False),
    ],
)
def test_reaching_into_another_module_is_found(text, is_found):
    modules = {"p": "", "p.a": text, "p.b": "__all__ = ['_told']", "p._b": ""}
    assert bool(reached_into("p.a", text, modules)) == is_found


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("from pdl_ext.engine import ops", True),
        ("from pdl_ext import engine", True),
        ("import pdl_ext\npdl_ext.engine.ops.f()", True),
        ("import pdl_ext as p\np.engine.ops", True),
        ("import pdl_ext\ngetattr(pdl_ext, 'engine')", True),
        ("import pdl_ext\npdl_ext.counts.CountTable", False),
        ("import pdl_ext\npdl_ext._checks.f()", False),
        ("import other\nother.engine.ops", False),
    ],
)
def test_an_integration_that_uses_what_is_internal_is_found(text, is_found):
    modules = sources()
    assert bool(not_public("pdl_ext.integrations.new", text, modules)) == is_found


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("n = vocab_size + 3", True),
        ("n = 3 + vocab_size", True),
        ("packed[:-3]", True),
        ("packed[-3:]", True),
        ("packed[-3]", True),
        ("torch.zeros(3, dtype=torch.int64)", True),
        ("torch.zeros(4)", False),
        ("packed[:-2]", False),
        ("n = vocab_size - 3", False),
        ("n = vocab_size + 30", False),
    ],
)
def test_a_table_that_is_laid_out_by_hand_is_found(text, is_found):
    assert bool(laid_out_by_hand(text)) == is_found
