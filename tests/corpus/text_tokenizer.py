"""A small tokenizer for tests, and its own tokens of texts: the expected counts of readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

tokenizers = pytest.importorskip("tokenizers")

# All of UTF-8's lengths, and words often enough to be merged.
TRAINED_ON = [
    "the quick brown fox jumps over the lazy dog",
    "the lazy dog sleeps",
    "Größe, naïve café",
    "日本語 🙂 the fox",
]


def save_tokenizer(path: Path, *, special_tokens: bool = False, cuts_and_pads: bool = False) -> Path:
    """Trains a byte-level BPE; with a BOS and an EOS around a text; with truncation and padding to 4 tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINED_ON * 3, trainer)
    if special_tokens:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    if cuts_and_pads:
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return path


def counts_of(path: Path, texts: list[str], vocab_size: int = 320, *, special_tokens: bool = True) -> np.ndarray:
    """The counts of texts, each encoded on its own."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=special_tokens).ids]
    return np.bincount(np.array(ids, np.int64), minlength=vocab_size)
