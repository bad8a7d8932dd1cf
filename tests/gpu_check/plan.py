"""The two commands of the check: which parts, in which order, and how long each may take.

The first command says whether the kernels are right, and what each variant of them takes. The second one measures the
variant that was chosen after reading the first. Each part is a process, or some, with a limit; its result is on disk
when it ends.
"""

from __future__ import annotations

import math

from gpu_check import parts
from gpu_check.check import Part, Setting
from gpu_check.devices import EMULATED
from gpu_check.variants import RELEASE

# What one-call kernels are compared in the first command, and where rows lie in the second.
EXCHANGES = (RELEASE, "messages")
RESIDENCY = ("cluster_8", "cluster_8_resident_5")
COUNTING = (RELEASE, "batches_2")
# By importance: whoever is cut off has the first ones.
FIRST_TESTS = ("test_cuda", "test_loss_and_gradient", "test_memory")
LINKED, BUILT_HERE, EMULATED_ON_FEW_CORES = (50, 20), (150, 60), (900, 60)


def _build(setting: Setting, names: tuple[str, ...]) -> Part:
    limits = LINKED if setting.built else BUILT_HERE
    return Part("build", *(EMULATED_ON_FEW_CORES if setting.device == EMULATED else limits), parts.build(names))


def first(setting: Setting) -> list[Part]:
    """Right or not, then the times of the variants, then one profile."""
    dry = setting.device == EMULATED
    chosen = "emulated and test_few_rows" if dry else "cuda and not emulated"
    variants = EXCHANGES if setting.built or dry else (RELEASE,)
    rest = ("test_edges",) if dry else ()
    return [
        _build(setting, variants),
        Part("equal bits", 60, 15, parts.script("equal_bits")),
        *(
            Part(f"equal bits, {name}", 40, 15, parts.script("equal_bits", variant=name))
            for name in variants
            if name != RELEASE
        ),
        Part("tests of the kernels", 75, 30, parts.run_tests(chosen, *FIRST_TESTS)),
        Part("other tests", 75, 20, parts.run_tests(chosen.replace("few_rows", "empty"), *rest, but=FIRST_TESTS)),
        *(Part(f"times, {name}", 40, 15, parts.script("step_times", variant=name, folder=True)) for name in variants),
        Part("launches", 30, 15, parts.script("launches")),
        Part("counters", 40, 15, parts.counters(128256)),
    ]


def second(setting: Setting) -> list[Part]:
    """The variant that was chosen: right, beside its neighbours and its peers, and clean."""
    ours = setting.variant
    dry = setting.device == EMULATED
    others = (*RESIDENCY, *COUNTING) if setting.built or dry else (RELEASE,)
    names = tuple(dict.fromkeys((ours, *others)))
    sizes = ("--vocab-size", "128256", "256000")
    return [
        _build(setting, names),
        Part("equal bits", 45, 15, parts.script("equal_bits", variant=ours)),
        *(
            Part(f"residency, {name}", 25, 10, parts.script("step_times", *sizes, variant=name, folder=True))
            for name in dict.fromkeys((ours, *(name for name in RESIDENCY if name in names)))
        ),
        *(
            Part(
                f"float32 and counting, {name}",
                40,
                15,
                parts.script("step_times", "--dtype", "float32", "--count", *sizes, variant=name, folder=True),
            )
            for name in COUNTING
            if name in names
        ),
        Part("sanitizer: synccheck", 40, 20, parts.sanitizer("synccheck")),
        Part("sanitizer: memcheck", 45, 20, parts.sanitizer("memcheck")),
        # The last one, which has use for all that is left.
        Part("bench", math.inf, parts.BENCH_OVERRUN + 20, parts.bench("--compile-groups", "1")),
    ]


COMMANDS = {"first": first, "second": second}
