"""setuptools as the build backend, with PyTorch as a build requirement only where there is none and one is needed."""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks are setuptools' own

TORCH = ["torch>=2.10", "numpy"]


def find_torch() -> bool:
    """Makes the environment's PyTorch importable, also from inside pip's isolated build; False if there is none."""
    if importlib.util.find_spec("torch") is not None:
        return True
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if _sees_system_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
        folders.append(site.getusersitepackages())
    for folder in dict.fromkeys(folders):
        if os.path.isdir(os.path.join(folder, "torch")):
            sys.path.append(folder)
            return True
    return False


def _sees_system_packages() -> bool:
    if sys.prefix == sys.base_prefix:
        return True
    try:
        with open(os.path.join(sys.prefix, "pyvenv.cfg")) as lines:
            return any(line.replace(" ", "").strip() == "include-system-site-packages=true" for line in lines)
    except FileNotFoundError:
        return False


def _demand_torch() -> None:
    if not find_torch():
        raise SystemExit(
            "pdl_ext: no PyTorch to build against: install one first (pip install torch), "
            "or build without --no-build-isolation"
        )


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    _demand_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: Any = None) -> str:
    _demand_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [] if find_torch() else TORCH


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [] if find_torch() else TORCH


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []
