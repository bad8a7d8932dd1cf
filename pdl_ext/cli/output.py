"""What a sub-command may write to."""

from __future__ import annotations

from pathlib import Path

__all__ = ["check_counts_output"]


def check_counts_output(path: Path) -> None:
    """Raises ValueError unless a file of counts may be written: to replace another one, or where no file is."""
    if not path.parent.is_dir():
        raise ValueError(f"output: got {path}, expected a file in a folder that exists")
    if path.is_dir():
        raise ValueError(f"output: got {path}, a folder, expected a file")
    if path.exists() and not _holds_counts(path):
        raise ValueError(f"output: got {path}, a file that holds no counts, expected a new one, or counts to replace")


def _holds_counts(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "").startswith("pdl_ext.TokenFrequency")
    except (SafetensorError, OSError):
        return False
