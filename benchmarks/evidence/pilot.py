"""Measures what the protocol needs before the first run that counts: seconds, and detectable differences.

    python -m evidence.pilot {runs,seconds}

Three runs on the first task, with seeds that no arm uses and at one learning rate: cross-entropy twice and PDL with
alpha 0.5. Also some steps and texts of every task, for their seconds. docs/evidence-protocol.md quotes the output, and
the report never reads it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import time

import harness
import torch

from evidence.arms import ARMS, CE, GREEDY, PDL, PRIMARY_SEEDS
from evidence.hidden import Halves, hidden_states
from evidence.results import CHRF, RARE_F1, Measure, Results, read
from evidence.run import RESULTS, Bench, execute
from evidence.runs import Run
from evidence.scoring import generate_texts
from evidence.sources import WORK
from evidence.tasks import TASKS
from pdl_ext.cli.demo.data import IGNORE_INDEX, collate, training_batches

FOLDER = RESULTS / "evidence-pilot"
SEED, OTHER_SEED, RATE = 100, 101, 3e-4
TIMED_STEPS = 5
# For one thread, this is the time on a machine without other work.
CLOCK = time.process_time
# For a two-sided test at 5 % with a power of 80 %.
DEVIATES = 1.96 + 0.84


FIRST = next(iter(TASKS))
RUNS = (Run(FIRST, CE, SEED), Run(FIRST, PDL, SEED), Run(FIRST, CE, OTHER_SEED))
# Enough for the seconds of a step, of a text and of a token of the frozen layers.
SAMPLE = {"training": 80, "validation": 8, "test": 64}


def step_seconds(bench: Bench, task: str) -> dict[str, float]:
    """Median seconds of a step without its optimiser, from kept hidden states and by the whole model, in turns."""
    halves, tokenizer, _ = bench.loaded
    examples, hidden, frequency = bench.task(task)
    part, pad_id = examples.part_of["training"], tokenizer.eos_token_id
    lengths = [len(examples.encoded[index].ids) for index in part]
    batches = training_batches(lengths, bench.sizes.batch_size, TIMED_STEPS, SEED)
    make = ARMS[CE].loss
    assert make is not None
    loss = make(frequency, SEED).to(halves.device)
    seconds: dict[str, list[float]] = {"step_kept": [], "step_whole": []}
    for batch in batches:
        indices = [part[index] for index in batch]
        start = CLOCK()
        rows, targets = halves.rows(*hidden.batch(indices, pad_id, halves.device))
        loss.linear(rows, halves.classifier, targets).backward()
        seconds["step_kept"].append(CLOCK() - start)
        ids, labels = collate([examples.encoded[index] for index in indices], pad_id)
        start = CLOCK()
        whole_model_loss(halves, ids.to(halves.device), labels.to(halves.device)).backward()
        seconds["step_whole"].append(CLOCK() - start)
    halves.model.zero_grad(set_to_none=True)
    # The first of each is for warm-up.
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def whole_model_loss(halves: Halves, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of the model's own forward, as in a training loop without kept hidden states."""
    logits = halves.model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


def detectable(results: Results, measure: Measure, seeds: int, items: int) -> float:
    """The smallest difference of PDL and cross-entropy that is detected with a power of 80 %, unadjusted.

    The spread of their difference over clusters is in part that of seeds, which more seeds lower. This part is assumed
    to be that of two seeds of cross-entropy, and so is the spread of the mean over seeds.
    """
    pdl, baseline, other = (
        results.estimate(measure, (arm, GREEDY.name), [seed])
        for arm, seed in ((PDL, SEED), (CE, SEED), (CE, OTHER_SEED))
    )
    of_arms, of_seeds = float((pdl - baseline).draws.var()), float((other - baseline).draws.var())
    share = len(results.runs[CE, GREEDY.name][SEED]["items"]["cluster"]) / items
    over_clusters = share * (max(0.0, of_arms - of_seeds) + of_seeds / seeds)
    return DEVIATES * math.sqrt(over_clusters + (other - baseline).value ** 2 / seeds)


def seconds_of(task: str) -> dict[str, float]:
    """The seconds of a step, kept and whole, of a generated text and of a token of the frozen layers.

    They are measured on a sample of a task.
    """
    work = WORK / "timed"
    shutil.rmtree(work / task, ignore_errors=True)
    known = {task: dataclasses.replace(TASKS[task], sizes=SAMPLE)}
    bench = Bench(work / "results", work=work, known=known, rate=RATE)
    halves, tokenizer, _ = bench.loaded
    examples, hidden, frequency = bench.task(task)
    test = [examples.encoded[index] for index in examples.part_of["test"]]
    start = CLOCK()
    hidden_states(halves, test, work / task / "again.npy", tokenizer.eos_token_id)
    frozen = CLOCK() - start
    prompts = bench.prompts(task)
    start = CLOCK()
    generate_texts(
        halves,
        tokenizer,
        prompts,
        len(test),
        GREEDY,
        frequency,
        limit=examples.task.target_tokens,
        seed=SEED,
        kept=work / task / "texts.json",
    )
    texts = CLOCK() - start
    return step_seconds(bench, task) | {
        "text": texts / len(test),
        "frozen_token": frozen / sum(len(one.ids) for one in test),
        "tokens_an_example": len(hidden.states) / len(examples.items),
    }


def run_pilots() -> dict[str, float]:
    """Makes the three runs that are missing, and returns the differences that can be detected."""
    bench = Bench(FOLDER, work=WORK / "pilot", rate=RATE)
    for run in RUNS:
        if not run.file(FOLDER).exists():
            execute(bench, run)
    (results,) = read(FOLDER)
    seeds, items = len(PRIMARY_SEEDS), TASKS[FIRST].sizes["test"]
    return {measure.name: round(detectable(results, measure, seeds, items), 3) for measure in (RARE_F1, CHRF)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("runs", "seconds"))
    options = parser.parse_args()
    if options.part == "runs":
        print(json.dumps({"detectable": run_pilots()}, indent=1))
        return
    torch.set_num_threads(1)
    found = {"machine": harness.machine(torch.device("cpu")), "seconds": {task: seconds_of(task) for task in TASKS}}
    FOLDER.mkdir(parents=True, exist_ok=True)
    harness.write_whole(FOLDER / "seconds.json", json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
