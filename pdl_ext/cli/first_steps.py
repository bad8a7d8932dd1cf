"""`pdl-ext` alone: the three things that one does first."""

from __future__ import annotations

import argparse

from pdl_ext.cli.streams import write

__all__ = ["run"]

_TEXT = """\
Power-Law Decay Loss for PyTorch. Three things to do first:

1. Count the tokens that you train on, here lines of text:
     pdl-ext count train.txt --tokenizer tokenizer.json --vocab-size 50257 -o counts.safetensors
2. See what a weighting makes of them, and choose alpha:
     pdl-ext explore counts.safetensors -o report.html
3. Train with the loss, in Python:
     loss_fn = pdl_ext.PDLLoss("counts.safetensors", alpha=0.25, shift=True)
     loss = loss_fn(logits, labels)

`pdl-ext --help` lists all commands. `pdl-ext doctor` checks the installation."""


def run(_: argparse.Namespace) -> int:
    """Prints them; returns 0."""
    write(*_TEXT.split("\n"))
    return 0
