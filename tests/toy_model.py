"""A language model that trains in a second, and sentences for it."""

from __future__ import annotations

import torch

COLOURS = ["red", "green", "blue", "white", "black", "grey"]
ANIMALS = ["horse", "fox", "owl", "bear", "wolf", "crane", "hare", "otter"]


def toy_model(*, tied: bool = False, layers: int = 2):
    """A Llama of random weights that trains in a second, and a tokenizer with one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>", "user", "assistant", "the", "saw", "a", *COLOURS, *ANIMALS]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config), tokenizer


def sentences() -> list[tuple[str, str]]:
    return [(f"the {animal}", f"a {colour} {animal}") for animal in ANIMALS for colour in COLOURS]
