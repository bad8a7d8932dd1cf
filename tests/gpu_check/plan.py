"""The two commands of the check: which parts, in which order, and how long each may take.

The first command checks whether the kernels are right, and times each of their variants. The second one measures the
variant that was chosen after reading the first. Each part is one or several processes with a time limit; its result is
on disk when it ends.
"""

from __future__ import annotations

import math

from gpu_check import ROOT, parts
from gpu_check.check import Part, Setting
from gpu_check.devices import EMULATED
from gpu_check.variants import RELEASE

# What one-call kernels are compared in the first command, and where rows lie in the second. How rows are summed says
# nothing of their gradients.
EXCHANGES = (RELEASE, "messages")
TIMED = (*EXCHANGES, "last_block")
RESIDENCY = ("cluster_8", "cluster_8_resident_5")
COUNTING = "batches_2"
# By importance: whoever is cut off has the first ones.
FIRST_TESTS = ("test_cuda", "test_loss_and_gradient", "test_memory")
THEN = ("test_edges", "test_layouts", "test_frequency")
# What has nothing to do with a card, or runs kernels elsewhere.
NO_TESTS_OF_A_CARD = ("test_build", "test_cuda_emulator", "test_cuda_compile", "test_gpu_check")
ON_A_CARD = "cuda and not emulated"
# Of each variant that is linked: two processes that import PyTorch, and once the compilation of one source.
SECONDS_TO_LINK, SECONDS_BEFORE = 20, 25
BUILT_HERE, EMULATED_ON_FEW_CORES = 150, 900


def other_tests() -> list[str]:
    """Files of tests besides the first ones, in their order."""
    names = sorted(path.stem for path in (ROOT / "tests").glob("test_*.py"))
    before = (*FIRST_TESTS, *THEN)
    return [*THEN, *(name for name in names if name not in (*before, *NO_TESTS_OF_A_CARD))]


def _variants(setting: Setting, names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of them that there are: a build made here is the release."""
    there = setting.built is not None or setting.device == EMULATED
    return tuple(name for name in dict.fromkeys(names) if there or name == RELEASE)


def _with_build(setting: Setting, planned: list[Part]) -> list[Part]:
    """The parts, behind that which makes what they import."""
    most = EMULATED_ON_FEW_CORES if setting.device == EMULATED else BUILT_HERE
    if setting.built and setting.device != EMULATED:
        most = SECONDS_BEFORE + SECONDS_TO_LINK * len({part.variant for part in planned})
    return [Part("build", most, min(most, 60), parts.build), *planned]


def first(setting: Setting) -> list[Part]:
    """Right or not, then the times of the variants, then one profile."""
    dry = setting.device == EMULATED
    names = _variants(setting, EXCHANGES)
    kernels, others = ("emulated and few_rows", "emulated and empty") if dry else (ON_A_CARD,) * 2
    planned = [
        Part("launches", 30, 12, parts.script("launches")),
        *(Part(f"equal bits, {name}", 45, 15, parts.script("equal_bits"), name) for name in names),
        Part("tests of the kernels", 60, 25, parts.run_tests(kernels, *FIRST_TESTS)),
        Part("other tests", 60, 20, parts.run_tests(others, *(["test_edges"] if dry else other_tests()))),
        *(Part(f"times, {name}", 35, 14, parts.script("step_times"), name) for name in _variants(setting, TIMED)),
        Part("counters", 30, 12, parts.counters(128256)),
    ]
    return _with_build(setting, planned)


def second(setting: Setting) -> list[Part]:
    """The variant that was chosen: right, beside its neighbours and its peers, and clean."""
    ours = setting.variant
    # The first command runs them for the release only.
    sums, seconds = ON_A_CARD, 19
    if setting.device == EMULATED:
        sums, seconds = "emulated and one_call and token_mean and side_by_side", 60
    long_rows = ("--vocab-size", "128256", "256000")
    cut = parts.script("step_times", *long_rows)
    count = parts.script("step_times", "--dtype", "float32", "--count", *long_rows)
    # The release counts like every other variant but one.
    beside = RELEASE if ours == COUNTING else COUNTING
    planned = [
        Part("equal bits", 45, 15, parts.script("equal_bits"), ours),
        Part("tests of the sums", seconds, 10, parts.run_tests(sums, "test_reduced_rows"), ours),
        *(Part(f"long rows, {name}", 25, 10, cut, name) for name in _variants(setting, (ours, *RESIDENCY))),
        *(Part(f"float32 and counting, {name}", 40, 15, count, name) for name in _variants(setting, (ours, beside))),
        Part("sanitizer: synccheck", 40, 20, parts.sanitizer("synccheck"), ours),
        Part("sanitizer: memcheck", 45, 20, parts.sanitizer("memcheck"), ours),
        # The last one, which has use for all that is left.
        Part("bench", math.inf, parts.BENCH_OVERRUN + 20, parts.bench("--compile-groups", "1"), ours),
    ]
    return _with_build(setting, planned)


COMMANDS = {"first": first, "second": second}
