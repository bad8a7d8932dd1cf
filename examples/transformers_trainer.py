"""Finetunes a language model with Power-Law Decay Loss by the Trainer of transformers.

    pip install "pdl_ext[transformers]"
    python examples/transformers_trainer.py text.txt --model HuggingFaceTB/SmolLM2-135M

Each line of the text is an example, and every tenth of them is held out. Without --model it trains a tiny one from
scratch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import pdl_ext
from pdl_ext.integrations.transformers import PDLCallback, apply_pdl_loss

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Trains, and returns the Trainer's logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="an example a line")
    parser.add_argument("--model", help="name or folder of a pretrained model (default: a tiny one)")
    parser.add_argument("--alpha", type=float, default=0.25, help="0 is cross-entropy (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--output", default="trainer-output", help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)

    # One for training, and one that is held out.
    lines = tiny.lines_of(args.text, 2)
    model, tokenizer = tiny.model_and_tokenizer(args.model, lines)
    encoded = tokenizer([line + tokenizer.eos_token for line in lines], truncation=True, max_length=args.max_length)
    examples = [{"input_ids": ids, "labels": list(ids)} for ids in encoded["input_ids"]]
    train = [example for number, example in enumerate(examples) if number % 10]

    # The training data are counted first, so that the weights are right from the first step on.
    frequency = pdl_ext.count_labels(train, model.get_output_embeddings().out_features, shift=True)
    loss_fn = pdl_ext.PDLLoss(frequency, alpha=args.alpha)
    apply_pdl_loss(model, loss_fn)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate,
            eval_strategy="epoch",
            logging_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=train,
        eval_dataset=examples[::10],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[PDLCallback(loss_fn)],
    )
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
