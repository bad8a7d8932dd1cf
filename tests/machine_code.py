"""Counts of the kernels' machine code for Hopper: instructions of the inner loops, waits, fences.

A module of cuda_compile.py. It reads nvdisasm's listing of a cubin. The upper bits of an instruction's encoding name
the loads that it waits for. The disassembler comes with the CUDA toolkit and with the package triton.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# An H200: thread instructions a second of all schedulers, and bytes a second of a copy.
ISSUE_RATE = 132 * 128 * 1.755e9
BYTES_PER_SECOND = 4.3e12
# The share of memory's time that issuing instructions may take.
LIMIT = 0.65
VECTOR_BYTES = 16
BARRIERS = 6


@dataclass(frozen=True)
class Instruction:
    """One instruction, its address, and the loads that it begins or waits for, by the number of their barrier."""

    address: int
    text: str
    # "LDG.E.128", without predicate and operands.
    name: str
    sets: int | None
    waits: frozenset[int]

    def is_a(self, *names: str) -> bool:
        return self.name.split(".")[0] in names

    @property
    def is_vector(self) -> bool:
        return ".128" in self.name


@dataclass
class Function:
    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[list[Instruction]]:
        """The bodies of the innermost loops, in order."""
        spans = []
        for instruction in self.instructions:
            target = re.search(r"\bBRA\S* .*`\((\S+)\)", instruction.text)
            if target and self.labels.get(target[1], instruction.address + 1) <= instruction.address:
                spans.append((self.labels[target[1]], instruction.address))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [[x for x in self.instructions if begin <= x.address <= end] for begin, end in sorted(set(inner))]


class Loop(NamedTuple):
    """An inner loop over a row in vectors of 16 bytes, counted by element."""

    elements: int
    instructions: int
    loads: int
    copies: int
    stores: int
    exponentials: int
    conversions: int

    @property
    def kind(self) -> str:
        if self.copies:
            return "copy"
        return "gradient" if self.stores else "statistics"

    def of_element(self, count: int) -> float:
        return count / self.elements


def find_disassembler() -> Path | None:
    program = shutil.which("nvdisasm")
    return Path(program) if program else None


def disassemble(program: Path, cubin: Path) -> str:
    return subprocess.run([program, "-c", "-hex", cubin], capture_output=True, text=True, check=True).stdout


def parse(listing: str) -> list[Function]:
    """The functions in a listing of `nvdisasm -c -hex`."""
    functions: list[Function] = []
    begun: tuple[int, str] | None = None
    waiting: list[str] = []
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\S+):$", line):
            functions.append(Function(match[1]))
        elif (match := re.match(r"(\.L_\S+):$", line)) and functions:
            waiting.append(match[1])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/$", line):
            begun = int(match[1], 16), match[2]
            for label in waiting:
                functions[-1].labels[label] = begun[0]
            waiting = []
        elif begun and (match := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/$", line)):
            functions[-1].instructions.append(_decoded(*begun, int(match[1], 16)))
            begun = None
    return functions


def _decoded(address: int, text: str, upper: int) -> Instruction:
    # Bits 105 to 125 of the encoding: stall, yield, barrier that is set when written, when read, those waited for.
    control = (upper >> 41) & 0x1FFFFF
    sets = (control >> 5) & 7
    mask = (control >> 11) & 0x3F
    name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
    waits = frozenset(bit for bit in range(BARRIERS) if mask >> bit & 1)
    return Instruction(address, text, name, sets if sets < BARRIERS else None, waits)


def _vector_accesses(body: Iterable[Instruction], *names: str) -> int:
    return sum(instruction.is_a(*names) and instruction.is_vector for instruction in body)


def vector_loops(function: Function, element_bytes: int) -> list[Loop]:
    """The loops over a row: for each way of reading it, the loop with the most elements an iteration."""
    best: dict[str, Loop] = {}
    for body in function.loops():
        copies, stores = _vector_accesses(body, "LDGSTS"), _vector_accesses(body, "STG")
        loads = _vector_accesses(body, "LDG", "LDS", "LD")
        vectors = copies or stores or loads
        exponentials = sum(x.name.startswith("MUFU.EX2") for x in body)
        # Filling a row with one number is not a pass over it.
        if vectors == 0 or (stores and not exponentials):
            continue
        conversions = sum(x.is_a("F2F", "F2FP") for x in body)
        elements = vectors * VECTOR_BYTES // element_bytes
        loop = Loop(elements, len(body), loads, copies, stores, exponentials, conversions)
        if loop.kind not in best or best[loop.kind].elements < elements:
            best[loop.kind] = loop
    return list(best.values())


def waits_before_first_read(function: Function) -> list[str]:
    """The loads from memory that are waited for before the first vector is requested."""
    pending: dict[int, str] = {}
    waited = []
    for instruction in function.instructions:
        for barrier in instruction.waits & pending.keys():
            waited.append(pending.pop(barrier))
        if instruction.is_a("LDGSTS") or (instruction.is_a("LDG") and instruction.is_vector):
            return waited
        if instruction.is_a("LDG") and instruction.sets is not None:
            pending[instruction.sets] = instruction.text
    return waited


class Expected(NamedTuple):
    """For a kernel: how often it moves a row between memory and the chip, and which loads may precede the row's."""

    passes: int
    loops: tuple[str, ...]
    # A target has 64 or 32 bits: two loads, one of which is disabled.
    most_before: int | None


EXPECTED = {
    "on_chip_kernel<__nv_bfloat16, (Loop)0>": Expected(2, ("copy", "statistics", "gradient"), 2),
    "statistics_kernel<__nv_bfloat16, (Loop)0>": Expected(1, ("statistics",), 2),
    # It needs the results of statistics_kernel.
    "gradient_kernel<__nv_bfloat16, true>": Expected(2, ("gradient",), None),
}
ELEMENT_BYTES = 2


class Count(NamedTuple):
    """The counts of a kernel."""

    kernel: str
    loops: list[Loop]
    loads_before: int
    fences: int

    @property
    def instructions(self) -> float:
        return sum(loop.of_element(loop.instructions) for loop in self.loops)

    @property
    def share(self) -> float:
        """Issue time of the loops over memory's time."""
        bytes_moved = EXPECTED[self.kernel].passes * ELEMENT_BYTES
        return self.instructions / ISSUE_RATE / (bytes_moved / BYTES_PER_SECOND)

    @property
    def fits(self) -> bool:
        expected = EXPECTED[self.kernel]
        if tuple(loop.kind for loop in self.loops) != expected.loops or self.share > LIMIT:
            return False
        return expected.most_before is None or self.loads_before <= expected.most_before


def counts(functions: Mapping[str, Function]) -> list[Count]:
    """The counts of the checked functions, by their short names."""
    return [
        Count(
            name,
            vector_loops(functions[name], ELEMENT_BYTES),
            len(waits_before_first_read(functions[name])),
            sum(instruction.is_a("MEMBAR") for instruction in functions[name].instructions),
        )
        for name in EXPECTED
        if name in functions
    ]


def table(counts: Iterable[Count]) -> list[str]:
    """Lines to print."""
    headings = ("an element", "instructions", "16-byte accesses", "exponentials", "conversions")
    lines = ["", f"{headings[0]:56}" + "".join(f"  {heading:>16}" for heading in headings[1:])]
    for count in counts:
        for loop in count.loops:
            numbers = (loop.instructions, loop.loads + loop.copies + loop.stores, loop.exponentials, loop.conversions)
            cells = "".join(f"  {loop.of_element(number):16.2f}" for number in numbers)
            lines.append(f"{f'{count.kernel}, {loop.kind}':56}{cells}")
        most_before = EXPECTED[count.kernel].most_before
        lines.append(
            f"{count.kernel}: {count.instructions:.1f} instructions an element, of the loops, are "
            f"{100 * count.share:.0f} % of memory's time (at most {100 * LIMIT:.0f}); "
            f"{count.loads_before} loads waited for before the row's first"
            + ("" if most_before is None else f" (at most {most_before})")
            + f"; {count.fences} fences"
            + ("" if count.fits else ": TOO MUCH")
        )
    return lines


def from_json(values: list[list[Any]] | None) -> list[Count] | None:
    """Counts as json has them: lists."""
    if values is None:
        return None
    return [Count(kernel, [Loop(*loop) for loop in loops], *rest) for kernel, loops, *rest in values]
