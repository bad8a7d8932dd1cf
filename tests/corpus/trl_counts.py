"""The targets of TRL's SFTTrainer in files of rows, by its own dataloader, in a separate process for its many imports.

    python trl_counts.py CASES.json COUNTS.npz

A case has a name, a file of JSON lines, the folder of a tokenizer, and options of SFTConfig.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import datasets
import numpy as np
import transformers
import trl

from pdl_ext import count_labels


def learned(case: dict[str, Any], vocab_size: int, folder: str) -> np.ndarray:
    """The counts of a case's labels, [vocab_size]."""
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    trainer = trl.SFTTrainer(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, **config)),
        args=trl.SFTConfig(output_dir=folder, **settings, **case["options"]),
        train_dataset=datasets.load_dataset("json", data_files=case["file"], split="train", cache_dir=folder),
        processing_class=transformers.AutoTokenizer.from_pretrained(case["tokenizer"]),
    )
    return count_labels(trainer, vocab_size, shift=True).counts.numpy()


def main(cases: str, output: str) -> None:
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    with open(cases) as file:
        content = json.load(file)
    with tempfile.TemporaryDirectory() as folder:
        counts = {case["name"]: learned(case, content["vocab_size"], folder) for case in content["cases"]}
    np.savez(output, **counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
