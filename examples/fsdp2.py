"""Finetunes a language model with Power-Law Decay Loss in a plain loop, fully sharded over ranks by FSDP2.

    pip install "pdl_ext[transformers]"
    torchrun --nproc-per-node 2 examples/fsdp2.py text.txt --model HuggingFaceTB/SmolLM2-135M

Each line of the text is an example. Without --model it trains a tiny one from scratch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import tiny
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorForSeq2Seq

import pdl_ext
from pdl_ext.integrations.transformers import apply_pdl_loss

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, and prints each epoch's loss on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="an example a line")
    parser.add_argument("--model", help="name or folder of a pretrained model (default: a tiny one)")
    parser.add_argument("--alpha", type=float, default=0.25, help="0 is cross-entropy (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="on all ranks together (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the trained model (default: it is not written)")
    args = parser.parse_args(arguments)

    dist.init_process_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    if device.type != "cpu":
        device = torch.device(device.type, rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device.index)
    if args.batch_size % ranks:
        parser.error(f"--batch-size: got {args.batch_size}, expected a multiple of {ranks}, the number of ranks")

    lines = tiny.lines_of(args.text, args.batch_size)
    model, tokenizer = tiny.model_and_tokenizer(args.model, lines)
    encoded = tokenizer([line + tokenizer.eos_token for line in lines], truncation=True, max_length=args.max_length)
    examples = [{"input_ids": ids, "labels": list(ids)} for ids in encoded["input_ids"]]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    # This rank's rows of each batch; an incomplete last batch is left out.
    starts = range(0, len(examples) - args.batch_size + 1, args.batch_size)
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = [collate([examples[i] for i in order[s + rank : s + args.batch_size : ranks]]) for s in starts]

    frequency = pdl_ext.count_labels(batches, model.get_output_embeddings().out_features, shift=True)
    frequency.all_reduce()
    apply_pdl_loss(model, pdl_ext.PDLLoss(frequency.to(device), alpha=args.alpha))
    model.to(device).train()
    for layer in model.model.layers:
        fully_shard(layer)
    # The head belongs to the root unit: its weight is gathered when the loss uses it.
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    for epoch in range(args.epochs):
        total = torch.zeros((), device=device)
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            items = (inputs["labels"][:, 1:] != -100).sum()
            dist.all_reduce(items)
            # Gradients are averaged over the ranks, so the number of items is that of one rank.
            loss = model(**inputs, num_items_in_batch=items / ranks).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() / ranks
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {total.item() / len(batches):.5f}", flush=True)

    if args.output is not None:
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(args.output, state_dict=weights)
            tokenizer.save_pretrained(args.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
