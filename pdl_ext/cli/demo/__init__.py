"""``pdl-ext demo``: a pretrained language model finetuned with Power-Law Decay Loss beside cross-entropy."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdl_ext.cli.demo.extra import EXTRA_REQUIREMENT

DESCRIPTION = """\
Finetunes SmolLM2-135M-Instruct (dequantised Q4_1 weights) twice: with cross-entropy and with Power-Law Decay Loss, PDL.
Both begin with the same weights and see the same batches. The report compares them on held-out examples: unweighted NLL
by token frequency, recall of rare words, diversity of greedy generations. It also has step time and memory of both. PDL
is computed from the hidden states, without the logits in memory, or with --unfused from the logits. The text is Bible
verses, King James Version to New Heart English Bible, or your own. Writes report.json, report.png and
counts.safetensors into --output.
"""


def _integer_from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {value}")
        return value

    return parse


def _number(text: str, *, zero_allowed: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        raise argparse.ArgumentTypeError(f"expected a number {'>=' if zero_allowed else '>'} 0, got {text}")
    return value


def _non_negative(text: str) -> float:
    return _number(text, zero_allowed=True)


def _positive(text: str) -> float:
    return _number(text, zero_allowed=False)


def add_parser(subparsers: Any) -> None:
    """Register the ``demo`` sub-command on the result of ``ArgumentParser.add_subparsers``.

    The parsed arguments carry ``run``, which takes them and returns the exit code (0, or 1 after an error message).
    """
    parser = subparsers.add_parser(
        "demo",
        help="finetune a small language model with PDL beside cross-entropy and compare them",
        description=DESCRIPTION,
    )
    parser.add_argument(
        "--steps", type=_integer_from(1), default=40, help="optimiser steps of each run (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha",
        type=_non_negative,
        default=0.25,
        help="exponent of the power law; 0 is cross-entropy (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=_integer_from(1), default=8, help="examples in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=_positive, default=1e-4, help="peak learning rate of AdamW (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length",
        type=_integer_from(8),
        default=96,
        help="leave out examples of more tokens, prompt included (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out", type=_integer_from(1), default=96, help="examples kept for evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--generations",
        type=_integer_from(1),
        default=64,
        help="held-out examples to generate for, at most --held-out (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer_from(0),
        default=0,
        help="seed of the split and of the batch order (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes CUDA where PyTorch sees it (default: %(default)s)",
    )
    parser.add_argument(
        "--unfused",
        action="store_true",
        help="train with PDL on the logits, instead of on hidden states and classifier",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="own text instead of the verses: one example a line, or JSON lines with prompt and completion",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="where the report is written (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # Imported here, since PyTorch and transformers take seconds, which `pdl-ext --help` should not.
    try:
        from pdl_ext.cli.demo.command import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        print(f"pdl-ext demo: error: {error}; run: {EXTRA_REQUIREMENT}", file=sys.stderr)
        return 1
    return run(args)
