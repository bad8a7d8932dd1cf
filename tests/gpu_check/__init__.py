"""The check on a card: `python tests/gpu_check --help`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
