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
from transformers import LogitsProcessor

import pdl_ext
from evidence.arms import Decoding
from evidence.hidden import BATCH_SIZE, Halves, HiddenStates
from evidence.training import OutOfTime
from pdl_ext.cli.demo.evaluate import generate
from pdl_ext.functional import decoding_offset

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


class _Offset(LogitsProcessor):
    def __init__(self, offset: Tensor) -> None:
        self.offset = offset

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.offset


def generate_texts(
    halves: Halves,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    frequency: pdl_ext.TokenFrequency,
    *,
    limit: int,
    seed: int,
    kept: Path,
    go_on: Callable[[], bool] = lambda: True,
) -> list[str]:
    """Texts of at most `limit` tokens, in the order of `prompts`; `kept` holds those that exist already.

    Raises OutOfTime.
    """
    options: dict[str, Any] = {}
    if decoding.temperature:
        options = {"do_sample": True, "temperature": decoding.temperature, "top_k": 0, "top_p": 1.0}
    if decoding.offset:
        offset = decoding_offset(frequency, abs(decoding.offset)).to(halves.device)
        options = {"logits_processor": [_Offset(offset if decoding.offset > 0 else -offset)]}
    texts: list[str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []
    while len(texts) < len(prompts):
        if not go_on():
            raise OutOfTime
        # Chunks have their own seeds, so that a text does not depend on an interruption.
        torch.manual_seed(seed * 1_000_003 + len(texts))
        chunk = prompts[len(texts) : len(texts) + CHUNK]
        texts += generate(halves.model, tokenizer, chunk, limit, name=decoding.name, batch_size=CHUNK, **options)
        harness.write_whole(kept, json.dumps(texts, ensure_ascii=False) + "\n")
    return texts
