"""Generates texts from prompts of which the frozen layers' part is computed once a task and kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import pdl_ext
from evidence.arms import Decoding
from evidence.hidden import BATCH_SIZE, Halves
from pdl_ext.cli.demo.evaluate import pad_left
from pdl_ext.functional import decoding_offset

Choose = Callable[[Tensor], Tensor]


class Prompts:
    """Prompts, with what the frozen layers make of all their tokens but the last: output, keys and values.

    states: float32 [tokens, H + 2 layers heads D] on disk, one prompt after the other. Prompts have two tokens or more.
    """

    def __init__(self, path: Path, ids: Sequence[list[int]]) -> None:
        self.ids = ids
        self.ends = np.cumsum([len(prompt) - 1 for prompt in ids])
        self.states = np.load(path, mmap_mode="r")

    def batch(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """States [B, T, ...] and mask [B, T] of some prompts without their last tokens, padded at the front."""
        longest = max(len(self.ids[place]) for place in places) - 1
        states = torch.zeros(len(places), longest, self.states.shape[1])
        mask = torch.zeros(len(places), longest, dtype=torch.long)
        for row, place in enumerate(places):
            length = len(self.ids[place]) - 1
            states[row, longest - length :] = torch.from_numpy(
                self.states[self.ends[place] - length : self.ends[place]].copy()
            )
            mask[row, longest - length :] = 1
        return states, mask


@torch.inference_mode()
def prompts_of(halves: Halves, ids: Sequence[list[int]], path: Path, pad_id: int) -> Prompts:
    """Prompts with the states of the file, which is computed and written if it is missing, whole or not at all."""
    if not path.exists():
        ends = np.cumsum([len(prompt) - 1 for prompt in ids])
        partial = path.with_name(f".{path.name}.partial")
        states: np.memmap | None = None
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        for start in tqdm(range(0, len(order), BATCH_SIZE), desc="prompts", unit="batch"):
            places = order[start : start + BATCH_SIZE]
            batch, mask = pad_left([ids[place][:-1] for place in places], pad_id)
            cache = DynamicCache()
            output = halves.frozen(
                input_ids=batch.to(halves.device),
                attention_mask=mask.to(halves.device),
                position_ids=_positions(mask).to(halves.device),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            pairs = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            whole = torch.cat([output, *(part.transpose(1, 2).flatten(2) for part in pairs)], dim=-1).float().cpu()
            if states is None:
                shape = (int(ends[-1]), whole.shape[-1])
                states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
            for row, place in enumerate(places):
                length = len(ids[place]) - 1
                states[ends[place] - length : ends[place]] = whole[row, whole.shape[1] - length :].numpy()
        assert states is not None
        states.flush()
        os.replace(partial, path)
    return Prompts(path, ids)


def chooser(decoding: Decoding, frequency: pdl_ext.TokenFrequency, device: torch.device) -> Choose:
    """Chooses tokens [B] from logits [B, V]: greedily, perhaps with an offset, or by sampling at a temperature."""
    if decoding.temperature:
        return lambda logits: torch.multinomial((logits / decoding.temperature).softmax(-1), 1)[:, 0]
    if decoding.offset:
        offset = decoding_offset(frequency, abs(decoding.offset)).to(device)
        signed = offset if decoding.offset > 0 else -offset
        return lambda logits: (logits + signed).argmax(-1)
    return lambda logits: logits.argmax(-1)


@torch.inference_mode()
def continuations(
    halves: Halves, prompts: Prompts, places: Sequence[int], choose: Choose, limit: int, eos_id: int
) -> list[list[int]]:
    """At most `limit` tokens after each of some prompts, without the end token. Rows that have ended are dropped."""
    states, mask = (part.to(halves.device) for part in prompts.batch(places))
    token = torch.tensor([prompts.ids[place][-1] for place in places], device=halves.device)
    cache = _begun(halves, states, mask)
    texts: list[list[int]] = [[] for _ in places]
    rows = torch.arange(len(places))
    for _ in range(limit):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = halves.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=_positions(mask)[:, -1:],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        token = choose(logits)
        (going,) = (token != eos_id).nonzero(as_tuple=True)
        if len(going) < len(token):
            cache.batch_select_indices(going)
            token, mask, rows = token[going], mask[going], rows[going.cpu()]
        for row, value in zip(rows.tolist(), token.tolist(), strict=True):
            texts[row].append(value)
        if not len(rows):
            break
    return texts


def _begun(halves: Halves, states: Tensor, mask: Tensor) -> DynamicCache:
    """The cache of the whole model after a batch of prompts; of it only the trained layers' part is computed."""
    config = halves.model.config
    output, pairs = states[..., : config.hidden_size], states[..., config.hidden_size :]
    cache = DynamicCache()
    # Layers know their place in the whole model, and write to it.
    halves.trained(
        inputs_embeds=output,
        attention_mask=mask,
        position_ids=_positions(mask),
        past_key_values=cache,
        use_cache=True,
    )
    pairs = pairs.unflatten(-1, (-1, 2, config.num_key_value_heads, config.head_dim)).permute(2, 3, 0, 4, 1, 5)
    for layer, (keys, values) in enumerate(pairs):
        cache.update(keys.contiguous(), values.contiguous(), layer)
    return cache


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)
