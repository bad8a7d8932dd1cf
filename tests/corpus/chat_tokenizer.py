"""A small transformers tokenizer for tests, with a chat template, saved into a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers", reason="needs pdl_ext[chat]")

# Few merges, so that a sentence is some tokens.
VOCAB = 290
SPECIAL = ["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"]
SAID = "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
TEMPLATE = """\
{{- bos_token }}
{%- if tools %}{{ '<|start|>tools ' + tools | tojson + '<|end|>' }}{% endif %}
{%- if greeting %}{{ greeting }}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'critic' %}{{ raise_exception('critics are not heard') }}{% endif %}
{{- '<|start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}{% generation %}SAID{{ '<|end|>' }}{% endgeneration %}
{%- else %}SAID{{ '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}""".replace("SAID", SAID)
TRAINED_ON = ["the quick brown fox jumps over the lazy dog", "why does the dog sleep, and the fox not?", "Größe 🙂"]


def save_chat_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A byte-level BPE whose merges cross words, with <s> before a text and an EOS that it does not add."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TRAINED_ON * 3, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # What training leaves behind, and counting must not see.
    inner.enable_truncation(5)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=template, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder
