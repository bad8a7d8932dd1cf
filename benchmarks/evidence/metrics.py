"""Metrics of generated texts beside their references: for each text, and for all texts of a run together."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from pdl_ext.cli.demo.evaluate import RareWords, rare_words, words
from pdl_ext.statistics import zipf_slope

# Distinct-2 falls with the length of a text, so every run is truncated to the same number of words.
DISTINCT_WORDS = 1500
# Self-BLEU compares each of these texts with all others of them.
SELF_BLEU_TEXTS = 100
REPEATED = 4


@dataclass(frozen=True)
class References:
    """The references of generated texts; `common` are the words that are not rare."""

    prompts: Sequence[str]
    completions: Sequence[str]
    common: set[str]


def of_items(texts: Sequence[str], references: References) -> dict[str, list[Any]]:
    """A value for each text, by metric.

    chrF++ and ROUGE-L are from 0 to 100. Rare words are [in reference, in text, in both]. `rare` are all rare words,
    `rare_new` those that the prompt does not have. Each word counts once a text.
    """
    chrf, rouge = CHRF(word_order=2), RougeScorer(["rougeL"])
    pairs = list(zip(texts, references.completions, strict=True))
    rare = [rare_words([reference], [text], references.common) for text, reference in pairs]
    new = [
        rare_words([reference], [text], references.common, [prompt])
        for (text, reference), prompt in zip(pairs, references.prompts, strict=True)
    ]
    return {
        "chrf": [round(chrf.sentence_score(text, [reference]).score, 3) for text, reference in pairs],
        "rouge_l": [round(100 * rouge.score(reference, text)["rougeL"].fmeasure, 3) for text, reference in pairs],
        "rare": [_counts(one) for one in rare],
        "rare_new": [_counts(one) for one in new],
        "words": [len(words(text)) for text in texts],
    }


def _counts(found: RareWords) -> list[int]:
    return [found.reference, found.generated, found.matched]


def of_run(texts: Sequence[str], references: References) -> dict[str, Any]:
    """One value for all texts, by metric; None if there are too few words."""
    bleu, chrf = BLEU(), CHRF(word_order=2)
    found = {
        "bleu": bleu.corpus_score(texts, [references.completions]).score,
        "chrf": chrf.corpus_score(texts, [references.completions]).score,
    }
    split = [words(text) for text in texts]
    counts = torch.tensor(list(Counter(word for text in split for word in text).values()), dtype=torch.int64)
    return found | {
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
        "distinct_2": distinct_2(split),
        "self_bleu": self_bleu(texts),
        "repetition": repetition(split),
        "zipf_slope": zipf_slope(counts),
    }


def distinct_2(split: Sequence[Sequence[str]], number: int = DISTINCT_WORDS) -> float | None:
    """Different pairs of consecutive words over all pairs, in the first `number` words; no pair spans two texts."""
    pairs, left = [], number
    for text in split:
        taken = text[:left]
        pairs += itertools.pairwise(taken)
        left -= len(taken)
        if left == 0:
            return len(set(pairs)) / len(pairs) if pairs else None
    return None


def self_bleu(texts: Sequence[str], number: int = SELF_BLEU_TEXTS) -> float | None:
    """The mean BLEU of each of the first `number` nonempty texts against the others: 100 if all are equal."""
    chosen = [text for text in texts if text.strip()][:number]
    if len(chosen) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, chosen[:i] + chosen[i + 1 :]).score for i, text in enumerate(chosen)]
    return sum(scores) / len(scores)


def repetition(split: Sequence[Sequence[str]], size: int = REPEATED) -> float | None:
    """The mean share of a text's runs of `size` words that occurred before in it, over the texts with such runs."""
    shares = []
    for text in split:
        grams = list(zip(*(text[i:] for i in range(size)), strict=False))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None
