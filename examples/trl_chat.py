"""Finetunes a chat model with Power-Law Decay Loss by TRL, on the assistant's turns.

    pip install "pdl_ext[trl]"
    python examples/trl_chat.py chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

Each line of the file is a conversation: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.
Every tenth of them is held out. Without --model it trains a tiny one from scratch. The chat template has to mark the
assistant's turns by `{% generation %}`; TRL adds the marks to those of well-known models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from trl import SFTConfig

import pdl_ext
from pdl_ext.integrations.trl import PDLSFTTrainer

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trains, and returns the trainer's logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chats", type=Path, help="a JSON object with `messages` a line")
    parser.add_argument("--model", help="name or folder of a pretrained model (default: a tiny one)")
    parser.add_argument("--alpha", type=float, default=0.25, help="0 is cross-entropy (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a conversation (default: %(default)s)")
    parser.add_argument("--output", default="trl-output", help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)

    # One for training, and one that is held out.
    chats = [json.loads(line) for line in tiny.lines_of(args.chats, 2)]
    texts = [message["content"] for chat in chats for message in chat["messages"]]
    model, tokenizer = tiny.model_and_tokenizer(args.model, texts)
    on_accelerator = torch.accelerator.is_available()
    held_out = {number for number in range(len(chats)) if number % 10 == 0}
    trainer = PDLSFTTrainer(
        model,
        SFTConfig(
            output_dir=args.output,
            assistant_only_loss=True,
            max_length=args.max_length,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            use_cpu=not on_accelerator,
            bf16=on_accelerator,
        ),
        train_dataset=Dataset.from_list([chat for number, chat in enumerate(chats) if number not in held_out]),
        eval_dataset=Dataset.from_list([chats[number] for number in sorted(held_out)]),
        processing_class=tokenizer,
        # It learns the frequencies of its training data, over all ranks together.
        pdl_loss=pdl_ext.PDLLoss(alpha=args.alpha, vocab_size=model.get_output_embeddings().out_features, sync_every=1),
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
