"""Pages of the files that the documentation links to elsewhere in the repository, which mkdocs would call missing.

On a code host such a link leads to the file. The site has no such host, so it brings those files along.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
# Pages that the navigation has a place for before they are written.
EXPECTED = {"evidence.md", "releasing.md"}
# The target of a link or a picture, without its anchor, unless it has a scheme.
TARGET = re.compile(r"(?<=\]\()[^)\s#:]+(?=[#)])")
# The folder of what is brought along.
BROUGHT = "repository"
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", **dict.fromkeys((".h", ".cpp", ".cu", ".cuh"), "cpp")}
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_config(config: Any) -> Any:
    """Leaves out what is expected and not there yet."""
    config.nav = _existing(config.nav)
    return config


def _existing(entry: Any) -> Any:
    """An entry of the navigation without pages that are still to come; None where nothing is left."""
    if isinstance(entry, str):
        return None if entry in EXPECTED and not (DOCS / entry).exists() else entry
    if isinstance(entry, dict):
        return {title: kept for title, of_title in entry.items() if (kept := _existing(of_title))} or None
    return [kept for part in entry if (kept := _existing(part))]


def on_files(files: Files, config: Any) -> Files:
    """Adds what is linked to outside of docs/."""
    for file in list(files.documentation_pages()):
        _bring_targets(DOCS / file.src_uri, files, config)
    return files


def _bring_targets(page: Path, files: Files, config: Any) -> None:
    for target in TARGET.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        if path.exists() and not path.is_relative_to(DOCS):
            _bring(path, files, config)


def _bring(path: Path, files: Files, config: Any) -> None:
    if files.get_file_from_path(_uri(path)) is not None:
        return
    text = _text(path)
    given = {"abs_src_path": str(path)} if text is None else {"content": NOT_SEARCHED + text}
    files.append(File.generated(config, _uri(path), inclusion=InclusionLevel.NOT_IN_NAV, **given))
    if path.is_dir():
        for listed in _listed(path):
            _bring(listed, files, config)
    elif path.suffix == ".md":
        _bring_targets(path, files, config)


def _uri(path: Path) -> str:
    """Where a file of the repository is among the site's sources. What becomes a page ends in .md."""
    if path.is_relative_to(DOCS):
        return "index.md" if path == DOCS else path.relative_to(DOCS).as_posix()
    uri = f"{BROUGHT}/{path.relative_to(ROOT).as_posix()}"
    return uri if path.is_file() and _text(path) is None else f"{uri}.md"


def _text(path: Path) -> str | None:
    """The Markdown of a page of a file or a folder; None for what is copied as it is."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = (listed.relative_to(path).as_posix() for listed in _listed(path))
        return f"# {name}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.suffix in LANGUAGES:
        return f"# {name}\n\n````{LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8')}````\n"
    return None


def _listed(folder: Path) -> list[Path]:
    """The reports anywhere in a folder, and the sources in it."""
    return sorted([*folder.rglob("*.md"), *(path for path in folder.iterdir() if path.suffix in LANGUAGES)])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lets links lead to the pages of what was brought along."""
    uri = page.file.src_uri
    folder = DOCS
    if uri.startswith(f"{BROUGHT}/"):
        path = ROOT / uri.removeprefix(f"{BROUGHT}/").removesuffix(".md")
        folder = path if path.is_dir() else path.parent

    def linked(match: re.Match[str]) -> str:
        path = (folder / match[0]).resolve()
        return posixpath.relpath(_uri(path), posixpath.dirname(uri)) if path.exists() else match[0]

    return TARGET.sub(linked, markdown)
