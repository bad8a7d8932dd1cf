"""Learns which tokens of a text are worth a training step: CaMeLS (arXiv 2305.15076) at a size for a CPU.

    pip install "pdl_ext[demo]"
    python examples/camels.py

A small language model of modern English takes one SGD step on verses of the King James Version. Then it is tested on
the same verses in modern English: their nll is the outer loss. A weight model gives each token of the old verses its
weight in that step. It is trained to lower the outer loss.

docs/family.md, "Learned weights", lists the differences from the published code, and the effect of its six consecutive
steps.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import pdl_ext
from pdl_ext.cli.demo import data
from pdl_ext.functional import pdl_loss, token_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["LanguageModel", "Pair", "Trunk", "WeightModel", "experiment", "main", "meta_step", "row_weight_gradient"]

Parameters = Mapping[str, Tensor]
# Token ids [batch, length] to weights of the same shape.
Weights = Callable[[Tensor], Tensor]

VOCABULARY = 2048
LONGEST = 48
WIDTH = 64
BEGIN, PAD = 0, 1
BASE_BATCH = 32
# The paper has this number of consecutive documents between two outer losses; here they share one step.
DOCUMENTS = 6
# softplus of 0 with beta 3.
START = math.log(2) / 3
# The baseline of learned weights: one larger weight for all, with which any step goes further.
BASELINE = "uniform, the best"


class Pair(NamedTuple):
    """Texts to read, and texts to test on afterwards: int64 [documents, length], padded with PAD."""

    document: Tensor
    question: Tensor


class Trunk(nn.Module):
    """A causal transformer: int64 [batch, length] token ids to hidden states [batch, length, WIDTH]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, WIDTH)
        self.position = nn.Embedding(LONGEST, WIDTH)
        # PyTorch's standard deviation of 1 makes logits of tied embeddings too large to train.
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        embedded = self.embedding(ids) + self.position.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=embedded.dtype)
        return self.layers(embedded, mask=mask, is_causal=True)


class LanguageModel(nn.Module):
    """A trunk whose embeddings are its classifier as well: int64 [batch, length] ids to logits [batch, length, V]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.trunk = Trunk(vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.trunk(ids), self.trunk.embedding.weight)


class WeightModel(nn.Module):
    """The weight of each token as a target: int64 [batch, length] ids to positive [batch, length].

    A weight depends on its own token and those before it. All are ln 2 / 3 at first, since the last layer is
    initialised to zeros.
    Source: arXiv 2305.15076.
    """

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.first = nn.Linear(WIDTH, 128)
        self.last = nn.Linear(128, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return F.softplus(self.last(F.gelu(self.first(self.trunk(ids)))), beta=3).squeeze(-1)


def row_weight_gradient(
    row_nll: Callable[[Parameters], Tensor],
    parameters: Parameters,
    outer_gradient: Parameters,
    *,
    factor: float,
    radius: float = 1e-2,
) -> Tensor:
    """Gradient of an outer loss by the row weights of one inner SGD step, from two forward passes.

    The step is theta' = theta - factor sum_i w_i d nll_i / d theta. With v = d outer / d theta' the gradient is d outer
    / d w_i = -factor <v, d nll_i / d theta>. The product is nll_i's derivative along v. Here it is a central
    difference, whose error falls with the square of `radius` until rounding errors dominate.

    For several consecutive steps this is the truncated form, with v the gradient by the last parameters. It ignores how
    a step changes the gradients of later steps. For the whole derivative v is propagated back through each later step,
    as v - factor H v. H is the Hessian of that step's weighted sum, and H v a difference of two gradients.

    Args:
        row_nll: parameters to the unweighted nll of each row, any shape, 0 where a row is ignored.
        parameters: theta by name, float32 or float64.
        outer_gradient: v by name. Parameters without an entry are those that the step does not change.
        factor: the learning rate over the denominator of the inner loss.
        radius: the distance of both passes from theta, as a norm over all parameters.

    Returns the gradient in the shape of the rows; zeros for a v of zeros.
    Raises ValueError for a radius <= 0, and KeyError for a gradient without a parameter.
    Source: the chain rule; arXiv 2305.15076 differentiates through the step instead.
    """
    if not radius > 0:
        raise ValueError(f"radius: got {radius!r}, expected a number > 0")
    size = torch.stack([gradient.norm() for gradient in outer_gradient.values()]).norm()
    e = radius / size.clamp(min=torch.finfo(size.dtype).tiny)

    def nll_at(distance: Tensor) -> Tensor:
        moved = {name: parameters[name] + distance * gradient for name, gradient in outer_gradient.items()}
        return row_nll({**parameters, **moved})

    with torch.no_grad():
        return (nll_at(e) - nll_at(-e)) * (-factor / (2 * e))


def labels_of(ids: Tensor) -> Tensor:
    return ids.masked_fill(ids == PAD, data.IGNORE_INDEX)


def outer_loss(model: nn.Module, parameters: Parameters, ids: Tensor) -> Tensor:
    return pdl_loss(functional_call(model, dict(parameters), (ids,)), labels_of(ids), shift=True)


def inner_step(model: nn.Module, ids: Tensor, row_weight: Tensor, learning_rate: float) -> dict[str, Tensor]:
    """The model's parameters after one SGD step on its weighted nll of `ids`: new leaves of new graphs."""
    loss = pdl_loss(model(ids), labels_of(ids), row_weight=row_weight, reduction="token_mean", shift=True)
    names, values = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, values)
    return {
        name: (value - learning_rate * gradient).detach().requires_grad_()
        for name, value, gradient in zip(names, values, gradients, strict=True)
    }


def meta_step(model: nn.Module, weight_model: nn.Module, pair: Pair, learning_rate: float) -> float:
    """Adds the gradient of the outer loss to that of the weight model, and returns the loss.

    The language model does not change.
    """
    weights = weight_model(pair.document)
    after = inner_step(model, pair.document, weights.detach(), learning_rate)
    outer = outer_loss(model, after, pair.question)
    outer_gradient = dict(zip(after, torch.autograd.grad(outer, list(after.values())), strict=True))
    labels = labels_of(pair.document)

    def row_nll(parameters: Parameters) -> Tensor:
        logits = functional_call(model, dict(parameters), (pair.document,))
        return pdl_loss(logits, labels, reduction="none", shift=True)

    rows = int((labels[:, 1:] != data.IGNORE_INDEX).sum())
    before = dict(model.named_parameters())
    weights.backward(row_weight_gradient(row_nll, before, outer_gradient, factor=learning_rate / rows))
    return outer.item()


def held_out_losses(model: nn.Module, pairs: Sequence[Pair], weights: Weights, learning_rate: float) -> Tensor:
    """The outer loss of each pair after the model's step on it, [pairs]."""
    losses = []
    for pair in pairs:
        with torch.no_grad():
            row_weight = weights(pair.document)
        after = inner_step(model, pair.document, row_weight, learning_rate)
        with torch.no_grad():
            losses.append(outer_loss(model, after, pair.question))
    return torch.stack(losses)


def uniform(value: float) -> Weights:
    return lambda ids: torch.full(ids.shape, value)


def shuffled(weights: Weights, seed: int) -> Weights:
    """The same weights in random order over the tokens of the batch."""
    generator = torch.Generator().manual_seed(seed)

    def of(ids: Tensor) -> Tensor:
        result, tokens = weights(ids), ids > PAD
        values = result[tokens]
        result[tokens] = values[torch.randperm(len(values), generator=generator)]
        return result

    return of


def by_frequency(pairs: Sequence[Pair]) -> Weights:
    """PDL's weights of rare tokens, counted in the documents, with the initial mean of the weight model."""
    frequency = pdl_ext.TokenFrequency(VOCABULARY)
    for pair in pairs:
        frequency.update(labels_of(pair.document)[:, 1:])
    table = START * token_weights(frequency.counts, pdl_ext.PowerLaw(alpha=0.5))
    return lambda ids: table[ids]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<begin>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", BEGIN)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return tokenizer


def ids_of(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])


def train_base(tokenizer: Tokenizer, texts: Sequence[str], steps: int) -> LanguageModel:
    model = LanguageModel(VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step in tqdm(range(steps), desc="language model", unit="step"):
        ids = ids_of(tokenizer, texts[step * BASE_BATCH : (step + 1) * BASE_BATCH])
        optimizer.zero_grad()
        outer_loss(model, dict(model.named_parameters()), ids).backward()
        optimizer.step()
        schedule.step()
    return model


def train_weights(model: LanguageModel, pairs: Sequence[Pair], learning_rate: float) -> WeightModel:
    weight_model = WeightModel(copy.deepcopy(model.trunk))
    optimizer = torch.optim.Adam(weight_model.parameters(), lr=1e-3)
    for pair in tqdm(pairs, desc="weight model", unit="step"):
        optimizer.zero_grad()
        meta_step(model, weight_model, pair, learning_rate)
        optimizer.step()
    return weight_model


def experiment(args: argparse.Namespace) -> dict[str, Tensor]:
    """Train both models and return the held-out outer losses by the weights of the step, each [batches].

    args: as `main` parses them. Prints the tokens of the smallest and of the largest weights.
    Raises data.DemoError if the verses are missing or too few.
    """
    torch.manual_seed(args.seed)
    verses = [(e.prompt.removeprefix(data.INSTRUCTION), e.completion) for e in data.verses().values()]
    held_out, base, meta = (args.held_out * DOCUMENTS, args.base_steps * BASE_BATCH, args.steps * DOCUMENTS)
    if held_out + base + meta > len(verses):
        raise data.DemoError(
            f"--base-steps {args.base_steps}, --steps {args.steps} and --held-out {args.held_out} take "
            f"{held_out + base + meta:,} verses, of which there are {len(verses):,}: lower one of them"
        )
    training, testing = ([verses[i] for i in part] for part in data.split(len(verses), held_out, args.seed))
    training = training[: base + meta]
    tokenizer = train_tokenizer([text for verse in training for text in verse])

    def pairs_of(part: Sequence[tuple[str, str]]) -> list[Pair]:
        parts = [part[start : start + DOCUMENTS] for start in range(0, len(part), DOCUMENTS)]
        return [Pair(*(ids_of(tokenizer, texts) for texts in zip(*verses, strict=True))) for verses in parts]

    model = train_base(tokenizer, [modern for _, modern in training[:base]], args.base_steps)
    meta_pairs, test_pairs = pairs_of(training[base:]), pairs_of(testing)

    def losses(weights: Weights, pairs: Sequence[Pair] = test_pairs) -> Tensor:
        return held_out_losses(model, pairs, weights, args.inner_lr)

    constants = [START * 2.0**power for power in range(-2, 3)]
    best = min(constants, key=lambda value: float(losses(uniform(value), meta_pairs[:20]).mean()))
    weight_model = train_weights(model, meta_pairs, args.inner_lr)
    print(f"uniform weights: {START:.3f} at the start, {best:.3f} is the best of {len(constants)} on training pairs")
    print_extremes(tokenizer, weight_model, test_pairs)
    return {
        "no step": losses(uniform(0.0)),
        "uniform, the start": losses(uniform(START)),
        BASELINE: losses(uniform(best)),
        "PowerLaw(0.5)": losses(by_frequency(meta_pairs)),
        "learned": losses(weight_model),
        "learned, shuffled": losses(shuffled(weight_model, args.seed)),
    }


def print_extremes(tokenizer: Tokenizer, weights: Weights, pairs: Sequence[Pair]) -> None:
    """Prints the smallest and largest mean weights of tokens that occur in several documents."""
    sums, counts = torch.zeros(VOCABULARY), torch.zeros(VOCABULARY)
    with torch.no_grad():
        for pair in pairs:
            sums.put_(pair.document, weights(pair.document), accumulate=True)
            counts.put_(pair.document, torch.ones(pair.document.shape), accumulate=True)
    counts[[BEGIN, PAD]] = 0
    frequent = (counts >= len(pairs) / 5).nonzero().squeeze(1)
    mean = sums[frequent] / counts[frequent]
    order = mean.argsort()
    for name, places in (("smallest", order[:10]), ("largest", order.flip(0)[:10])):
        words = (f"{tokenizer.decode([int(frequent[i])]).strip()} {mean[i]:.3f}" for i in places)
        print(f"{name} weights: {', '.join(words)}")


def table(losses: Mapping[str, Tensor]) -> str:
    """Means of the losses, and of their differences from the baseline's on the same pairs."""
    lines = [f"{'weights of the inner step':<28} outer loss   beside '{BASELINE}' (standard error)"]
    for name, values in losses.items():
        difference = values - losses[BASELINE]
        error = difference.std() / math.sqrt(len(difference))
        lines.append(f"{name:<28} {values.mean():10.4f}   {difference.mean():+.4f} ({error:.4f})")
    return "\n".join(lines)


def integer_from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {minimum}")
        return int(text)

    return parse


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number > 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment and print its table. Returns 0, or 1 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default, text in (
        ("--steps", integer_from(1), 300, "steps of the weight model"),
        ("--base-steps", integer_from(1), 250, "steps of the language model before that"),
        ("--held-out", integer_from(2), 50, f"batches of {DOCUMENTS} verses that the table is of"),
        ("--inner-lr", positive, 1.0, "learning rate of the inner step"),
        ("--seed", integer_from(0), 0, "seed of the split and of both models"),
    ):
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: %(default)s)")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        losses = experiment(args)
    except data.DemoError as error:
        print(f"camels.py: error: {error}", file=sys.stderr)
        return 1
    print(table(losses))
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
