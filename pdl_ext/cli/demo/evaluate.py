"""Measurements on held-out examples, and their arithmetic."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import pdl_ext
from pdl_ext.cli.demo.data import IGNORE_INDEX, Encoded, Example, collate, pad_left
from pdl_ext.cli.demo.model import CausalLM
from pdl_ext.cli.progress import steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16
# The share of a text without a prompt that is given to generation; the rest is the reference.
GIVEN_SHARE = 1 / 3
COMMON_WORD_SHARE = 0.95

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


@dataclass(frozen=True)
class TokenScores:
    """Unweighted NLL in nats of every target token, its id, and the number of the example that it belongs to."""

    nll: np.ndarray
    token: np.ndarray
    example: np.ndarray


@torch.inference_mode()
def score(model: CausalLM, examples: Sequence[Encoded], *, pad_id: int, name: str) -> TokenScores:
    """Return the scores of all target tokens of ``examples``, in order of length."""
    loss_fn = pdl_ext.PDLLoss(
        pdl_ext.TokenFrequency(model.config.vocab_size), alpha=0.0, ignore_index=IGNORE_INDEX, shift=True
    ).to(model.device)
    loss_fn.eval()
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    nll, token, example = [], [], []
    for start in steps(range(0, len(order), BATCH_SIZE), f"score, {name}", "batch"):
        indices = order[start : start + BATCH_SIZE]
        ids, labels = collate([examples[index] for index in indices], pad_id)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        _, stats = loss_fn(logits, labels.to(model.device), return_stats=True)
        rows, columns = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
        nll.append(stats.nll.cpu()[rows, columns].double().numpy())
        token.append(labels[rows, columns].numpy())
        example.append(np.asarray(indices)[rows.numpy()])
    return TokenScores(np.concatenate(nll), np.concatenate(token), np.concatenate(example))


def bucket_means(scores: TokenScores, bucket_of_token: np.ndarray, buckets: int) -> list[float | None]:
    """Mean NLL over all target tokens, then over those of each bucket; None for a bucket without tokens."""
    bucket = bucket_of_token[scores.token]
    groups = [scores.nll, *(scores.nll[bucket == index] for index in range(buckets))]
    return [float(group.mean()) if len(group) else None for group in groups]


def difference_interval(
    scores: TokenScores, baseline: TokenScores, chosen: np.ndarray, resamples: int = 2000
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean of ``scores.nll - baseline.nll`` over the tokens that ``chosen`` marks.

    Whole examples are resampled, since tokens of one example are not independent. None with fewer than two examples.
    """
    difference = (scores.nll - baseline.nll)[chosen]
    _, example = np.unique(scores.example[chosen], return_inverse=True)
    if not len(example) or example.max() == 0:
        return None
    sums, counts = np.bincount(example, weights=difference), np.bincount(example)
    drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Task:
    """The input of a generation, as ids and as text, and the reference for its result."""

    given: list[int]
    prompt: str
    reference: str
    reference_tokens: int


def generation_task(example: Example, encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Return prompt and completion of an example; without a prompt, its first third of tokens and the rest."""
    if example.prompt:
        given = encoded.ids[: encoded.context]
        return Task(given, example.prompt, example.completion, encoded.target_count)
    middle = encoded.context + int(encoded.target_count * GIVEN_SHARE)
    return Task(
        encoded.ids[:middle],
        str(tokenizer.decode(encoded.ids[encoded.context : middle])).strip(),
        str(tokenizer.decode(encoded.ids[middle:-1])).strip(),
        len(encoded.ids) - middle,
    )


@torch.inference_mode()
def generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    limit: int,
    *,
    name: str,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> list[str]:
    """Return continuations of ``prompts`` (token ids), in order, each of at most ``limit`` tokens.

    They are greedy, unless ``options`` of the model's own ``generate`` say otherwise.
    """
    pad_id = tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in steps(range(0, len(order), batch_size), f"generate, {name}", "batch"):
        indices = order[start : start + batch_size]
        ids, mask = pad_left([prompts[index] for index in indices], pad_id)
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limit,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad_id,
            **{"do_sample": False, **options},
        )
        decoded = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(indices, decoded, strict=True):
            texts[index] = text.strip()
    return texts


def words(text: str) -> list[str]:
    """Split a text into its words, lower case: runs of letters, with apostrophes inside."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def common_words(texts: Iterable[str], share: float = COMMON_WORD_SHARE) -> set[str]:
    """Return the most frequent words of ``texts`` that together cover ``share`` of all its word occurrences."""
    counts = Counter(word for text in texts for word in words(text))
    total, covered, common = counts.total(), 0, set()
    for word, count in counts.most_common():
        if covered >= share * total:
            break
        covered += count
        common.add(word)
    return common


@dataclass(frozen=True)
class RareWords:
    """Rare words of the references and of the generations, distinct in each text, and how many are in both."""

    reference: int
    generated: int
    matched: int

    @property
    def recall(self) -> float | None:
        return self.matched / self.reference if self.reference else None

    @property
    def precision(self) -> float | None:
        return self.matched / self.generated if self.generated else None


def rare_words(
    references: Sequence[str], generations: Sequence[str], common: set[str], excluded: Sequence[str] | None = None
) -> RareWords:
    """Compare the words that are not in ``common`` between each reference and its generation.

    ``excluded`` holds one text for each reference, such as the prompt, whose words are not counted.
    """
    reference = generated = matched = 0
    for index, (expected, actual) in enumerate(zip(references, generations, strict=True)):
        skipped = common | set(words(excluded[index])) if excluded is not None else common
        rare_expected, rare_actual = set(words(expected)) - skipped, set(words(actual)) - skipped
        reference += len(rare_expected)
        generated += len(rare_actual)
        matched += len(rare_expected & rare_actual)
    return RareWords(reference, generated, matched)


def distinct(texts: Iterable[str], n: int) -> float | None:
    """Distinct-n: different word n-grams over all word n-grams of ``texts``; None if there are none."""
    grams = [gram for text in texts for gram in zip(*(words(text)[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else None
