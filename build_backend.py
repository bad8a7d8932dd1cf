"""setuptools as the build backend; PyTorch is a build requirement only if it is needed and not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks are setuptools' own

TORCH = ["torch>=2.10", "numpy"]


# The environment's own import path, read past the paths that an isolated build has set.
_LOOK_FOR_TORCH = """
import importlib.util, json, os, sys
spec = importlib.util.find_spec("torch")
own = [] if spec is None or spec.origin is None else [os.path.dirname(os.path.dirname(spec.origin))]
print("\\n" + json.dumps(own and [*filter(None, sys.path), *own]))
"""


def find_torch() -> bool:
    """Makes the environment's PyTorch importable, also inside pip's isolated build; False if there is none."""
    spec = importlib.util.find_spec("torch")
    # The remains of an uninstall are a folder without __init__.py.
    if spec is not None and spec.origin is not None:
        return True
    found = subprocess.run([sys.executable, "-E", "-c", _LOOK_FOR_TORCH], cwd=os.sep, capture_output=True, text=True)
    # Other code that Python runs at its start may have printed something.
    folders = json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else []
    sys.path += [folder for folder in dict.fromkeys(folders) if folder not in sys.path]
    return bool(folders)


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
