"""Whether PDLLoss at alpha 0 stays on the loss curve of F.cross_entropy over a long run in bfloat16 with a resume.

    python benchmarks/long_run.py [--steps N] [--seeds N] [--output DIR]

A small transformer under bfloat16's autocast learns Bible verses. A seed draws its weights and its batches. It is
trained by F.cross_entropy, and by a PDLLoss that counts online. At alpha 0 all weights of the latter are 1. In the
middle of the PDLLoss run, model, optimizer and PDLLoss are written to a file, and a new process restores them.

The deviation of seeds is the standard deviation of F.cross_entropy's smoothed curves over the seeds, its median over
the steps. Their spread is twice that. The run fails if the two smoothed curves of one seed differ by more. Rounding in
another order already causes some of this difference. Writes DIR/long-run.json and long-run.png.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from train_step import LanguageModel, Sizes, cross_entropy

from pdl_ext import PDLLoss, PowerLaw

CROSS_ENTROPY, OURS = "F.cross_entropy", "PDLLoss"
SIZES = Sizes(vocab_size=4096, width=96, heads=4, layers=2, sequences=8, length=48)
LEARNING_RATE = 1e-3
# The shares of all steps over which the curves are smoothed, and for warm-up.
WINDOW, WARM_UP = 1 / 40, 1 / 20
# In standard deviations, as is usual.
SPREAD = 2
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training of `steps` steps on a text."""

    loss: str
    seed: int
    steps: int
    ids: torch.Tensor
    sizes: Sizes


class _ProductsInFloat32(TorchDispatchMode):
    """Products as with bfloat16 instructions: rounded operands, a float32 sum, and a rounded result.

    A CPU without them would use PyTorch's loops, which are far slower.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        in_bfloat16 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16 for arg in args)
        if not in_bfloat16 or not name.startswith((*PRODUCTS, ATTENTION)):
            return func(*args, **(kwargs or {}))
        wide = tree_map_only(torch.Tensor, torch.Tensor.float, args)
        results = func(*wide, **(kwargs or {}))
        if name == ATTENTION:  # the second one is float32 in any case
            return results[0].bfloat16(), *results[1:]
        return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, results)


def verses(vocab_size: int) -> torch.Tensor:
    """The ids of a modern translation, by a BPE that is trained on it. Raises DemoError if a package is missing."""
    from pdl_ext.cli.demo.data import verses

    lines = [f"{example.completion}\n" for example in verses().values()]
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    return torch.tensor([token for line in tokenizer.encode_batch(lines) for token in line.ids])


def train(run: Run, first: int, last: int, file: Path) -> tuple[list[float], int]:
    """The losses of the steps from `first` to before `last`, and the number of tokens that PDLLoss has counted.

    A part that does not begin the run restores everything from the file of the previous part.
    """
    torch.manual_seed(run.seed)
    model = LanguageModel(run.sizes)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    pdl_loss = PDLLoss(vocab_size=run.sizes.vocab_size, weighting=PowerLaw(alpha=0.0))
    parts = (model, optimizer, pdl_loss)
    if first:
        for part, state in zip(parts, torch.load(file), strict=True):
            part.load_state_dict(state)
    generator = torch.Generator().manual_seed(run.seed)
    starts = torch.randint(len(run.ids) - run.sizes.length, (run.steps, run.sizes.sequences, 1), generator=generator)
    products = contextlib.nullcontext() if harness.has_bfloat16_products() else _ProductsInFloat32()
    losses = []
    for step in range(first, last):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / (WARM_UP * run.steps), 1 - step / run.steps)
        tokens = run.ids[starts[step] + torch.arange(run.sizes.length + 1)]
        optimizer.zero_grad()
        with products:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(tokens[:, :-1])
            # F.cross_entropy as transformers calls it: in float32. PDLLoss always computes in float32.
            of_step = pdl_loss if run.loss == OURS else lambda x, y: cross_entropy(x.float(), y)
            loss = of_step(logits, tokens[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    if last < run.steps:
        torch.save([part.state_dict() for part in parts], file)
    return losses, int(pdl_loss.frequency.seen)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def smoothed(losses: list[float]) -> np.ndarray:
    """Means over a moving window."""
    window = max(1, int(WINDOW * len(losses)))
    return np.convolve(losses, np.full(window, 1 / window), "valid")


def compared(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """The comparison of the curves: for each loss a list of losses for each seed."""
    theirs, ours = (np.stack([smoothed(of_seed) for of_seed in losses[name]]) for name in (CROSS_ENTROPY, OURS))
    deviation = float(np.median(theirs.std(0, ddof=1)))
    distances = np.abs(ours - theirs).max(1)
    return {
        "deviation_of_seeds": deviation,
        "largest_distance_by_seed": distances.tolist(),
        "largest_distance": float(distances.max()),
        "largest_distance_in_deviations": float(distances.max()) / deviation,
        # NaN counts as a difference.
        "stays": bool((distances <= SPREAD * deviation).all()),
        "smoothed": {CROSS_ENTROPY: theirs.round(5).tolist(), OURS: ours.round(5).tolist()},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of the curves, and of their distance beside the spread of seeds."""
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, also where there is no display
    from matplotlib import pyplot

    figure, (curves, distance) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    theirs, ours = (np.array(result["smoothed"][name]) for name in (CROSS_ENTROPY, OURS))
    steps = np.arange(theirs.shape[1]) + result["steps"] - theirs.shape[1]
    for seed, (of_theirs, of_ours) in enumerate(zip(theirs, ours, strict=True)):
        curves.plot(steps, of_theirs, color="#90b4d8", linewidth=3, label=CROSS_ENTROPY if seed == 0 else None)
        curves.plot(steps, of_ours, color="#d9730d", linewidth=1, label=f"{OURS}, alpha 0" if seed == 0 else None)
        distance.plot(steps, of_ours - of_theirs, linewidth=1, label=f"seed {seed}")
    spread = SPREAD * result["deviation_of_seeds"]
    distance.axhspan(-spread, spread, color="#90b4d8", alpha=0.3, label="spread of seeds")
    curves.set_title(f"loss, mean of {result['steps'] - theirs.shape[1] + 1} steps")
    distance.set_title(f"{OURS} less {CROSS_ENTROPY}, same seed")
    for panel in (curves, distance):
        panel.axvline(result["resumed_at"], color="black", linewidth=1, linestyle="--", label=f"{OURS} resumed")
        panel.set_xlabel("step")
        panel.grid(True, alpha=0.25)
        panel.legend()
    about = result["about"]
    figure.suptitle(f"bfloat16, {about['device']}, PyTorch {about['torch']}, {about['date'][:10]}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def measure(steps: int, seeds: int, ids: torch.Tensor, sizes: Sizes) -> dict[str, Any]:
    """All runs, one after the other, each part in a process of its own."""
    start = time.perf_counter()
    middle = steps // 2
    losses: dict[str, list[list[float]]] = {CROSS_ENTROPY: [], OURS: []}
    counted = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        for seed in range(seeds):
            for name, of_loss in losses.items():
                run = Run(name, seed, steps, ids, sizes)
                before, _ = in_new_process(train, run, 0, middle if name == OURS else steps, file)
                after, tokens = in_new_process(train, run, middle, steps, file) if name == OURS else ([], 0)
                of_loss.append(before + after)
                counted += [tokens] if name == OURS else []
                print(
                    f"{name}, seed {seed}: {smoothed(of_loss[-1])[-1]:.4f}; {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    result = compared(losses)
    expected = steps * sizes.sequences * sizes.length
    products = "by instructions" if harness.has_bfloat16_products() else "in float32, of rounded operands"
    return {
        "about": harness.machine(torch.device("cpu")) | {"bfloat16_products": products},
        "text_tokens": len(ids),
        "sizes": dataclasses.asdict(sizes),
        "steps": steps,
        "resumed_at": middle,
        "tokens_counted": counted,
        "seconds": round(time.perf_counter() - start, 1),
        **result,
        # A resume that forgets counts is a failure as well.
        "stays": result["stays"] and counted == [expected] * seeds,
        "losses": {name: [[round(loss, 5) for loss in of_seed] for of_seed in by] for name, by in losses.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of each run; default: 2000")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="at least 2; default: 3")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/long-run-DEVICE-DATE")
    options = parser.parse_args()
    if options.seeds < 2 or options.steps < 2:
        parser.error("two seeds or more have a spread, and two steps or more a middle")
    try:
        import matplotlib  # noqa: F401  (before the runs, and not at their end)

        from pdl_ext.cli.demo.data import DemoError

        ids = verses(SIZES.vocab_size)
    except (ModuleNotFoundError, DemoError) as error:
        print(f'long_run.py: error: {error}; run: pip install "pdl_ext[demo]"', file=sys.stderr)
        return 1
    result = measure(options.steps, options.seeds, ids, SIZES)
    folder = options.output or harness.results_folder("long-run", result["about"])
    folder.mkdir(parents=True, exist_ok=True)
    harness.write_whole(folder / "long-run.json", json.dumps(result) + "\n")
    draw(result, folder / "long-run.png")
    print(
        f"{'stays on' if result['stays'] else 'leaves'} the curve: largest distance {result['largest_distance']:.4f}, "
        f"{result['largest_distance_in_deviations']:.2f} standard deviations of seeds; written to {folder}"
    )
    return 0 if result["stays"] else 1


if __name__ == "__main__":
    sys.exit(main())
