"""A model's results on the examples: the nll of their targets, and generated texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from torch import Tensor

import pdl_ext
from evidence.arms import Decoding
from evidence.decoding import Prompts, chooser, continuations
from evidence.hidden import BATCH_SIZE, Halves, HiddenStates
from evidence.training import OutOfTime

# The number of texts between two writes of the generated texts.
CHUNK = 64


@dataclass(frozen=True)
class TargetScores:
    """Unweighted nll in nats and the token weight of each target, its token, and the position of its example."""

    nll: Tensor
    weight: Tensor
    token: Tensor
    place: Tensor

    def weighted_mean(self) -> float:
        return float((self.nll * self.weight).sum() / self.weight.sum())

    def by_bucket(
        self, bucket_of_token: Tensor, buckets: int, places: int
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Sums of nll and numbers of targets: a row for each example, a column for each bucket."""
        cell = self.place * buckets + bucket_of_token[self.token]
        sums = torch.bincount(cell, weights=self.nll, minlength=places * buckets).view(places, buckets)
        counts = torch.bincount(cell, minlength=places * buckets).view(places, buckets)
        return [[round(value, 4) for value in row] for row in sums.tolist()], counts.tolist()


@torch.no_grad()
def score(
    halves: Halves, loss: pdl_ext.PDLLoss, hidden: HiddenStates, indices: Sequence[int], pad_id: int
) -> TargetScores:
    """The scores of the targets of some examples; `place` counts from 0 in the order of `indices`."""
    loss.eval()
    order = sorted(range(len(indices)), key=lambda place: len(hidden.encoded[indices[place]].ids))
    parts = []
    for start in range(0, len(order), BATCH_SIZE):
        places = order[start : start + BATCH_SIZE]
        states, labels = hidden.batch([indices[place] for place in places], pad_id, halves.device)
        rows, targets = halves.rows(states, labels)
        _, stats = loss.linear(rows, halves.classifier, targets, return_stats=True)
        of_batch = [hidden.encoded[indices[place]].target_count for place in places]
        place = torch.repeat_interleave(torch.tensor(places), torch.tensor(of_batch))
        parts.append((stats.nll.double().cpu(), stats.weight.double().cpu(), targets.cpu(), place))
    return TargetScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def generate_texts(
    halves: Halves,
    tokenizer: Any,
    prompts: Prompts,
    items: int,
    decoding: Decoding,
    frequency: pdl_ext.TokenFrequency,
    *,
    limit: int,
    seed: int,
    kept: Path,
    go_on: Callable[[], bool] = lambda: True,
) -> list[str]:
    """Texts of at most `limit` tokens after the first `items` prompts, in their order.

    `kept` holds those that exist already, shortest prompt first.

    Raises OutOfTime.
    """
    choose = chooser(decoding, frequency, halves.device)
    # Texts of a chunk have prompts of about one length, so that little is spent on padding.
    order = sorted(range(items), key=lambda place: len(prompts.ids[place]))
    texts: list[str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    while len(texts) < items:
        if not go_on():
            raise OutOfTime
        # Chunks have their own seeds, so that a text does not depend on an interruption.
        torch.manual_seed(seed * 1_000_003 + len(texts))
        places = order[len(texts) : len(texts) + CHUNK]
        tokens = continuations(halves, prompts, places, choose, limit, tokenizer.eos_token_id)
        texts += [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        harness.write_whole(kept, json.dumps(texts, ensure_ascii=False) + "\n")
    return [text for _, text in sorted(zip(order, texts, strict=True))]
