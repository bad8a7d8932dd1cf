"""The documentation's site: it builds strictly, asks no other host for anything, and leaves nothing public out.

Links are checked twice, since pages are read in two places: as Markdown on a code host, and on the site.
"""

from __future__ import annotations

import ast
import html.parser
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fresh_python
import pytest

import pdl_ext

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
# The modules whose names the documentation has; every other one is the package's own affair, and may change.
PUBLIC = [
    "pdl_ext",
    "pdl_ext.corpus",
    "pdl_ext.functional",
    "pdl_ext.integrations.ray",
    "pdl_ext.integrations.transformers",
    "pdl_ext.integrations.trl",
    "pdl_ext.modulation",
    "pdl_ext.reference",
    "pdl_ext.statistics",
    "pdl_ext.weighting",
]
# What makes a browser ask for something, by the elements that do.
LOADING = {"href": {"link"}, "src": {"audio", "embed", "iframe", "img", "input", "script", "source", "track", "video"}}
LOADING |= {"data": {"object"}, "poster": {"video"}, "srcset": {"img", "source"}}


class Page(html.parser.HTMLParser):
    """What a built page links to, loads, and can be linked to at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.loaded, self.anchors, self.classes = [], [], set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "href" and tag == "a" and value:
                self.links.append(value)
            if name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)
            if tag in LOADING.get(name, ()):
                self.loaded.append(value)
            if name == "class":
                self.classes.update((value or "").split())


@pytest.fixture(scope="module")
def site(once):
    """The folder of the site, and its pages by their paths."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(module, reason='needs: pip install "pdl_ext[docs]"')

    def build(folder):
        command = ["mkdocs", "build", "--strict", "--config-file", DOCS / "site" / "mkdocs.yml", "--site-dir", folder]
        fresh_python.run("-m", *command, env={"NO_MKDOCS_2_WARNING": "1"}, check=True)

    folder = once("site", build)
    return folder, {path: Page(path) for path in sorted(folder.rglob("*.html"))}


@pytest.mark.slow
def test_links_of_the_site_lead_somewhere(site):
    folder, pages = site
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # The page for what is not found is served at any address, so its links begin at the site's root.
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            has_anchor = (
                not parts.fragment or unquote(parts.fragment) in pages[target].anchors if target in pages else True
            )
            if not target.is_file() or not has_anchor:
                broken.append(f"{path.relative_to(folder)}: {link}")
    assert broken == []


@pytest.mark.slow
def test_nothing_comes_from_another_host(site):
    folder, pages = site
    foreign = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
    loaded = {f"{path.name}: {url}" for path, page in pages.items() for url in page.loaded if foreign.match(url or "")}
    assert loaded == set()
    for style in folder.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import\s)\s*[\"']?([^\"')\s]+)", style.read_text(encoding="utf-8"))
        assert [url for url in urls if foreign.match(url)] == [], style.name
    # For diagrams and for a repository's stars the theme's script asks other hosts by itself.
    assert not {"mermaid", "md-source"} & set().union(*(page.classes for page in pages.values()))


@pytest.mark.slow
def test_every_page_is_in_the_navigation(site):
    folder, pages = site
    linked = {urlsplit(link).path for link in pages[folder / "index.html"].links}
    names = {path.with_suffix(".html").name for path in DOCS.glob("*.md")} - {"index.html"}
    assert names - linked == set()


def names_of(module):
    """`__all__` of a module, without an import of it."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    (value,) = (
        node.value
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return ast.literal_eval(value)


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    _, pages = site
    entries = set().union(*(page.anchors for path, page in pages.items() if path.name.startswith("api")))
    missing = []
    for module in PUBLIC:
        for name in names_of(module):
            full = f"{module}.{name}"
            # Some are at the top as well.
            is_at_top = name in pdl_ext.__all__ and f"pdl_ext.{name}" in entries
            is_module = full in PUBLIC and any(entry.startswith(f"{full}.") for entry in entries)
            if full not in entries and not is_at_top and not is_module:
                missing.append(full)
    assert missing == []


@pytest.mark.slow
def test_signatures_have_the_options_of_a_loss(site):
    folder, _ = site
    page = (folder / "api-losses.html").read_text(encoding="utf-8")
    assert "LossKeywords" not in page
    # Of PDLLoss and its two calls, of two functions, and of one definition.
    assert len(re.findall(r">label_smoothing_weight</span><span class=\"p\">:", page)) == 6


def test_the_overview_has_the_public_modules():
    overview = (DOCS / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(pdl_ext[\w.]*)` \|", overview, flags=re.MULTILINE)) == PUBLIC


CHECKER = """\
[mypy]
strict = True
cache_dir = cache
[mypy-numpy.*,safetensors.*,torch.*,tqdm.*]
follow_imports = skip
[mypy-pdl_ext.*]
ignore_errors = True
"""


def test_a_type_checker_finds_the_public_modules(tmp_path):
    """After `import pdl_ext` alone, which is enough for Python."""
    pytest.importorskip("mypy", reason="needs mypy")
    modules = [name for name in PUBLIC if name.count(".") == 1]
    (tmp_path / "user.py").write_text(
        "import pdl_ext\n" + "".join(f"{module}.{names_of(module)[0]}\n" for module in modules)
    )
    (tmp_path / "mypy.ini").write_text(CHECKER)
    command = ["mypy", "--config-file", "mypy.ini", "user.py"]
    path = {"MYPYPATH": str(Path(pdl_ext.__file__).parents[1])}
    run = fresh_python.run("-m", *command, env=path, cwd=tmp_path)
    assert (run.stdout, run.returncode) == ("Success: no issues found in 1 source file\n", 0)


def prose(path):
    """A page without its code, in which brackets are no links and a # is no heading."""
    return re.sub(r"^(`{3,})[^\n]*\n.*?^\1", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(path):
    """The anchors that a code host gives the headings of a page, in their order."""
    anchors, seen = [], {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = seen.get(anchor, 0)
        seen[anchor] = number + 1
        anchors.append(f"{anchor}-{number}" if number else anchor)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "code", prose(page))):
        path, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        target = (page.parent / path).resolve() if path else page
        is_there = target.exists() and (not anchor or (target.suffix == ".md" and anchor in headings(target)))
        if not is_there:
            broken.append(link)
    assert broken == []


def test_headings_have_the_anchors_of_a_code_host(tmp_path):
    (tmp_path / "page.md").write_text("# A `b_c`: d, 1.5 - e?\n```\n# no heading\n```\n## [Twice](x.md)\n## Twice\n")
    assert headings(tmp_path / "page.md") == ["a-b_c-d-15---e", "twice", "twice-1"]
