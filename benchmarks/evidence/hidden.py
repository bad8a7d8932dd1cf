"""A model in two parts: frozen layers, whose output is computed once and kept on disk, and layers to train."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pdl_ext.cli.demo.data import IGNORE_INDEX, Encoded, collate
from pdl_ext.cli.demo.model import CausalLM

TRAINED_LAYERS = 4
BATCH_SIZE = 16


class Halves:
    """The two parts of a LlamaForCausalLM, which share its weights: training the upper one trains the model.

    Only the last `trained_layers` layers and the final norm get gradients. Embeddings and classifier, which may be one
    matrix, stay as they are.
    """

    def __init__(self, model: CausalLM, trained_layers: int = TRAINED_LAYERS) -> None:
        self.model = model
        layers = model.model.layers
        middle = len(layers) - trained_layers
        self.frozen = _part(model, layers[:middle], nn.Identity())
        self.trained = _part(model, layers[middle:], model.model.norm)
        self.classifier: Tensor = model.lm_head.weight
        model.requires_grad_(False)
        for module in (*self.trained.layers, self.trained.norm):
            module.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        return self.classifier.device

    def weights(self) -> dict[str, Tensor]:
        """The weights that are trained, by name."""
        return {name: value for name, value in self.trained.named_parameters() if value.requires_grad}

    def restore(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.weights().items():
                value.copy_(weights[name])

    def rows(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden states [R, H] that predict a target, and the targets [R].

        hidden: [B, T, H], the output of the frozen part, padded at the end; labels: [B, T]. The other positions skip
        the classifier, which is most of a step's work.
        """
        last = self.trained(inputs_embeds=hidden, use_cache=False).last_hidden_state
        following = labels[:, 1:]
        chosen = following != IGNORE_INDEX
        return last[:, :-1][chosen], following[chosen]


def _part(model: CausalLM, layers: nn.ModuleList, norm: nn.Module) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    # No weights of its own are kept, so that none are initialised.
    with torch.device("meta"):
        part = type(model.model)(config)
    part.embed_tokens, part.layers, part.norm = model.model.embed_tokens, layers, norm
    part.rotary_emb = model.model.rotary_emb
    return part.eval()


class HiddenStates:
    """The frozen part's output for each example: float32 [tokens, H] on disk, one example after the other."""

    def __init__(self, path: Path, encoded: Sequence[Encoded]) -> None:
        self.encoded = encoded
        self.ends = np.cumsum([len(example.ids) for example in encoded])
        self.states = np.load(path, mmap_mode="r")

    def batch(self, indices: Sequence[int], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """hidden [B, T, H], 0 at the padding, and labels [B, T] of some examples."""
        _, labels = collate([self.encoded[index] for index in indices], pad_id)
        hidden = torch.zeros(*labels.shape, self.states.shape[1])
        for row, index in enumerate(indices):
            length = len(self.encoded[index].ids)
            hidden[row, :length] = torch.from_numpy(self.states[self.ends[index] - length : self.ends[index]].copy())
        return hidden.to(device), labels.to(device)


@torch.inference_mode()
def hidden_states(halves: Halves, encoded: Sequence[Encoded], path: Path, pad_id: int) -> HiddenStates:
    """The hidden states in a file. A missing file is computed, and written completely or not at all."""
    if not path.exists():
        ends = np.cumsum([len(example.ids) for example in encoded])
        partial = path.with_name(f".{path.name}.partial")
        shape = (int(ends[-1]), halves.model.config.hidden_size)
        states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
        for start in tqdm(range(0, len(order), BATCH_SIZE), desc="frozen layers", unit="batch"):
            indices = order[start : start + BATCH_SIZE]
            ids, _ = collate([encoded[index] for index in indices], pad_id)
            output = halves.frozen(input_ids=ids.to(halves.device), use_cache=False).last_hidden_state.float().cpu()
            for row, index in enumerate(indices):
                length = len(encoded[index].ids)
                states[ends[index] - length : ends[index]] = output[row, :length].numpy()
        states.flush()
        os.replace(partial, path)
    return HiddenStates(path, encoded)
