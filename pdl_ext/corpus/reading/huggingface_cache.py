"""Hugging Face's caches: which of their folders hold data, and which files there are no data.

The root has hub/, downloaded files, and datasets/, tables made from them. In hub/ a repository is a folder such as
datasets--owner--name, in which snapshots/REVISION has links to the files of blobs/. In datasets/ a table is three or
four folders deep, and downloads/ has its source files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pdl_ext._printable import warn
from pdl_ext.storage.place import Place, RemotePath

__all__ = ["cached_datasets", "is_about_data"]

_REPOSITORY = re.compile(r"(datasets|models|spaces)--.+")
# Files beside the data in a repository.
_ABOUT_DATA = re.compile(r"(README|LICENSE|CITATION)(\..*)?|dataset_infos\.json|.*\.py", re.IGNORECASE)
_SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")


def cached_datasets(folder: Place) -> list[Path] | None:
    """The folders with data of a cache, of its hub or tables, or of a repository in it; None for any other folder.

    Caches are on disk. Warns of repositories that are left out. Raises ValueError that names a repository with several
    revisions or splits.
    """
    if isinstance(folder, RemotePath):
        return None
    hub, tables = folder / "hub", folder / "datasets"
    # Nothing else there is opened: an access token is stored beside them.
    if _is_hub(hub) or (folder.name == "huggingface" and _is_tables(tables)):
        made = _tables(tables) if tables.is_dir() else []
        # Files with tables made from them are the same data a second time.
        return _snapshots(hub, without={path.name.lower(): path for path in made}) + made
    if _is_hub(folder):
        return _snapshots(folder)
    if _is_tables(folder):
        return _tables(folder)
    if _is_repository(folder):
        return _snapshot(folder)
    return None


def is_about_data(path: Place) -> bool:
    """Whether a file in a repository of the hub, or in one of its cache, is its card, licence or code."""
    if _ABOUT_DATA.fullmatch(path.name) is None:
        return False
    if isinstance(path, RemotePath):
        return path.protocol == "hf"
    return any(_is_repository(parent.parent) for parent in path.absolute().parents if parent.name == "snapshots")


def _is_repository(folder: Path) -> bool:
    return _REPOSITORY.fullmatch(folder.name) is not None and (folder / "snapshots").is_dir()


def _is_hub(folder: Path) -> bool:
    return folder.is_dir() and any(_is_repository(path) for path in folder.iterdir())


def _is_tables(folder: Path) -> bool:
    # One of the two exists in every cache; the search over four levels is too expensive for every folder.
    is_likely = (folder / "downloads").is_dir() or any(folder.glob("*.lock"))
    return is_likely and any(any(folder.glob(f"{levels}/dataset_info.json")) for levels in ("*/*/*", "*/*/*/*"))


def _tables(folder: Path) -> list[Path]:
    others = ("downloads", ".", "_")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(others))


def _snapshots(hub: Path, without: Mapping[str, Path] = MappingProxyType({})) -> list[Path]:
    """The data of all repositories. without: by its name each dataset that is counted from another folder."""
    repositories = sorted(filter(_is_repository, hub.iterdir())) if hub.is_dir() else []
    others = [path for path in repositories if not path.name.startswith("datasets--")]
    if others:
        more = f" and {len(others) - 1} other repositories" if len(others) > 1 else ""
        warn(f"{others[0]}{more}: not a dataset, so left out of those in {hub}")
    found: list[Path] = []
    twice: list[tuple[Path, Path]] = []
    for path in repositories:
        name = path.name.removeprefix("datasets--").replace("--", "___").lower()
        if path in others:
            continue
        if name in without:
            twice.append((path, without[name]))
        else:
            found += _snapshot(path)
    if twice:
        path, table = twice[0]
        more = f", and {len(twice) - 1} other repositories likewise" if len(twice) > 1 else ""
        warn(
            f"{path}: is left out{more}: its dataset is counted from the tables in {table}; to count the repository's "
            "files instead, name its folder"
        )
    return found


def _snapshot(repository: Path) -> list[Path]:
    """The only revision, or that of `main`."""
    revisions = sorted(path for path in (repository / "snapshots").iterdir() if path.is_dir())
    if len(revisions) > 1:
        main = repository / "refs" / "main"
        name = main.read_text().strip() if main.is_file() else ""
        chosen = [path for path in revisions if path.name == name]
        if not chosen:
            raise ValueError(
                f"{repository}: holds the revisions {', '.join(path.name for path in revisions)}, expected one: name "
                f"its folder, as {revisions[0]}"
            )
        warn(
            f"{repository}: holds {len(revisions)} revisions, of which {name} is counted, that of refs/main: name "
            "the folder of another one to count that"
        )
        revisions = chosen
    for revision in revisions:
        _check_splits(revision)
    return revisions


def _check_splits(revision: Path) -> None:
    splits: dict[str, Path] = {}
    for path in sorted(revision.rglob("*")):
        split = re.split(r"[-._]", path.name.lower())[0]
        if split in _SPLITS and path.is_file():
            splits.setdefault(split, path)
    if len(splits) > 1:
        first = splits.get("train") or next(iter(splits.values()))
        pattern = f"{first.parent}/{re.split(r'[-._]', first.name)[0]}*"
        raise ValueError(
            f"{revision}: holds the splits {', '.join(splits)}, expected one: name the files of the one that is "
            f"trained on, as {pattern}"
        )
