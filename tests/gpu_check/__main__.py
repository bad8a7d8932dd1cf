"""Checks and measures the kernels on this machine's card, and writes one folder of results.

    python tests/gpu_check first [--built DIR] [--output DIR]
    python tests/gpu_check second [--built DIR] [--variant NAME] [--output DIR]

Two commands of at most six minutes each on 16 cores (gpu_check/plan.py). They need no network: everything is run by the
Python that runs this. With --built it starts from objects that `make gpu-variants` has made on another machine. Results
are written after every part, so that an interrupted run keeps its results. A part is ended before it uses the minimum
time of later ones. With --dry the same plan runs on the CPU: the emulated kernels, tiny sizes, and stand-ins for the
card's programs. Exit status: 0 if every part passed, 1 if not, 2 if this machine cannot run the check at all.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Of a folder that is run, Python has only the folder itself on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_check import devices, machine, plan, stand_ins, variants
from gpu_check.check import Check, Setting

BUDGET = 340.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=plan.COMMANDS)
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/DEVICE-torchVERSION")
    parser.add_argument("--built", type=Path, metavar="DIR", help="what `make gpu-variants` made; default: build here")
    parser.add_argument("--variant", choices=variants.NAMES, default=variants.RELEASE, help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="WORDS", help="parts whose name contains one of these, by commas")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--dry", action="store_true", help="on the CPU, to see that every step can be taken")
    options = parser.parse_args(arguments)
    if options.variant != variants.RELEASE and options.built is None and not options.dry:
        parser.error(f"--variant: got {options.variant}, expected --built with it: other variants are built ahead")
    start = time.monotonic()
    found = machine.probe_in_a_process(options.dry)
    if found["missing"]:
        print(f"{machine.NEEDS}; missing here: {'; '.join(found['missing'])}", file=sys.stderr)
        return 2
    # Being ended must end what runs, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = options.output or machine.default_folder(found)
    built = options.built.resolve() if options.built else None
    programs = stand_ins.write((folder / "stand-ins").resolve()) if options.dry else None
    device = devices.EMULATED if options.dry else devices.CARD
    setting = Setting(device=device, built=built, variant=options.variant, programs=programs)
    parts = plan.COMMANDS[options.command](setting)
    words = list(filter(None, options.only.split(",")))
    # All need the build, which comes first.
    parts = [part for part in parts if part is parts[0] or not words or any(word in part.name for word in words)]
    name = options.command if options.variant == variants.RELEASE else f"{options.command}-{options.variant}"
    check = Check(folder, found, options.budget - (time.monotonic() - start), parts, setting, name)
    print(f"{found['device']}, PyTorch {found['torch']}, results in {check.folder}", flush=True)
    return 0 if check.run() else 1


if __name__ == "__main__":
    sys.exit(main())
