"""Counts of the kernels' machine code for Hopper: instructions of the loops and outside of them, waits, fences.

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

from machine_paths import Paths

# An H200: thread instructions a second of all schedulers, and bytes a second of a copy.
ISSUE_RATE = 132 * 128 * 1.755e9
BYTES_PER_SECOND = 4.3e12
# The share of memory's time that issuing instructions may take.
LIMIT = 0.65
VECTOR_BYTES = 16
BARRIERS = 6
# A block of the counted kernels, and the vocabulary for which a thread's instructions are counted.
THREADS, LANES = 256, 32
VOCAB_SIZE = 128256
KINDS = ("copy", "statistics", "gradient")
# Barriers of blocks and clusters, the wait for the previous kernel, and fences.
WAITING = ("BAR", "UCGABAR_WAIT", "ACQBULK", "SYNCS", "DEPBAR", "LDGDEPBAR", "MEMBAR", "CCTL")


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


class Loop(NamedTuple):
    """A turn of an inner loop over a row in vectors of 16 bytes, with its elements and most instructions."""

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


def row_loops(paths: Paths, element_bytes: int) -> dict[frozenset[int], Loop | None]:
    """The innermost loops over a row, by the positions of their instructions; None for a fill or single stores."""
    found: dict[frozenset[int], Loop | None] = {}
    for first, body in paths.loops():
        code = [paths.code[i] for i in sorted(body)]
        copies, stores = _vector_accesses(code, "LDGSTS"), _vector_accesses(code, "STG")
        loads = _vector_accesses(code, "LDG", "LDS", "LD")
        vectors = copies or stores or loads
        if vectors == 0 or any(other < body for other in found):
            continue
        exponentials = sum(x.name.startswith("MUFU.EX2") for x in code)
        writes_elements = stores == 0 and any(x.is_a("STG") for x in code)
        if writes_elements or (stores and not exponentials):
            found[body] = None
            continue
        conversions = sum(x.is_a("F2F", "F2FP") for x in code)
        elements = vectors * VECTOR_BYTES // element_bytes
        instructions = paths.longest(within=(first, body))
        found[body] = Loop(elements, instructions, loads, copies, stores, exponentials, conversions)
    return found


def vector_loops(loops: Iterable[Loop | None]) -> list[Loop]:
    """For each way of reading a row the loop with the most elements a turn."""
    best: dict[str, Loop] = {}
    for loop in loops:
        if loop and (loop.kind not in best or best[loop.kind].elements < loop.elements):
            best[loop.kind] = loop
    return sorted(best.values(), key=lambda loop: KINDS.index(loop.kind))


def in_loops(loops: Iterable[Loop | None], elements: int) -> int:
    """The instructions of a thread's loops over so many elements: each time the loop with the most that remain."""
    total = 0
    for kind in KINDS:
        rest = elements
        for loop in sorted((x for x in loops if x and x.kind == kind), key=lambda x: x.elements, reverse=True):
            total += rest // loop.elements * loop.instructions
            rest %= loop.elements
    return total


def outside_of_loops(paths: Paths, loops: Iterable[frozenset[int]], turns: int) -> float:
    """The most instructions of a thread outside of these loops, on average over a block's warps.

    The row consists of whole vectors. The loop around these loops has so many turns.
    """
    free = frozenset().union(*loops)
    around = next((loop for loop in paths.loops() if any(inner < loop[1] for inner in loops)), None)

    def of(thread: int | None) -> int:
        once = paths.longest(free, thread, avoided=_is_of_one_element)
        if around is None or turns == 1:
            return once
        return once + (turns - 1) * paths.longest(free, thread, within=around, avoided=_is_of_one_element)

    warps = THREADS // LANES
    # Of the first warp only one thread is known not to be the first.
    return ((warps - 1) * of(THREADS - LANES) + of(None)) / warps


def _is_of_one_element(instruction: Instruction) -> bool:
    return instruction.is_a("LDG", "STG") and "U16" in instruction.name


def waits_before_first_read(paths: Paths) -> list[str]:
    """Whatever waits before the first vector of the row is requested: loads that are used, barriers, fences."""
    reads = {i for i, x in enumerate(paths.code) if x.is_a("LDGSTS") or (x.is_a("LDG") and x.is_vector)}
    before, new = set(), [0]
    while new:
        i = new.pop()
        if i not in before:
            before.add(i)
            new += [] if i in reads else paths.forward(i)
    leads_to_read = set(reads)
    for i in sorted(before, reverse=True):
        if any(j in leads_to_read for j in paths.forward(i)):
            leads_to_read.add(i)
    pending: dict[int, str] = {}
    waited = []
    for i in sorted(before & leads_to_read):
        instruction = paths.code[i]
        waited += [pending.pop(barrier) for barrier in sorted(instruction.waits & pending.keys())]
        if instruction.is_a(*WAITING):
            waited.append(instruction.text)
        if instruction.is_a("LDG", "LD", "ATOM", "ATOMG") and instruction.sets is not None and i not in reads:
            pending[instruction.sets] = instruction.text
    return waited


class Expected(NamedTuple):
    """For a kernel: how often it moves a row between memory and the chip, and how it does so."""

    passes: int
    loops: tuple[str, ...]
    # The loads and other waits that may come before the row's first vector.
    most_before: int | None
    # The blocks of a row, and the parts of it that each of them takes one after the other, on an H200.
    blocks: int = 1
    turns: int = 1


EXPECTED = {
    # A target has 64 or 32 bits: two loads, one of which is disabled.
    "on_chip_kernel<__nv_bfloat16, (Loop)0>": Expected(2, KINDS, 2, blocks=4),
    "statistics_kernel<__nv_bfloat16, (Loop)0>": Expected(1, ("statistics",), 2, turns=4),
    # It needs the results of statistics_kernel.
    "gradient_kernel<__nv_bfloat16, true>": Expected(2, ("gradient",), None),
}
ELEMENT_BYTES = 2


class Count(NamedTuple):
    """The counts of a kernel. `inside` and `outside` of loops: instructions an element."""

    kernel: str
    loops: list[Loop]
    inside: float
    outside: float
    waits: list[str]
    fences: int

    @property
    def share(self) -> float:
        """Issue time over memory's time."""
        bytes_moved = EXPECTED[self.kernel].passes * ELEMENT_BYTES
        return (self.inside + self.outside) / ISSUE_RATE / (bytes_moved / BYTES_PER_SECOND)

    @property
    def fits(self) -> bool:
        expected = EXPECTED[self.kernel]
        if tuple(loop.kind for loop in self.loops) != expected.loops or self.share > LIMIT:
            return False
        return expected.most_before is None or len(self.waits) <= expected.most_before


def count(kernel: str, function: Function) -> Count:
    """The counts of one of the checked functions, by its short name."""
    expected, paths = EXPECTED[kernel], Paths(function)
    loops = row_loops(paths, ELEMENT_BYTES)
    of_vector = VECTOR_BYTES // ELEMENT_BYTES
    # Some threads have one vector more than others.
    vectors, more = divmod(VOCAB_SIZE // of_vector / (expected.blocks * expected.turns * THREADS), 1)
    fewest, most = (in_loops(loops.values(), int(vectors + more) * of_vector) for more in (0, 1))
    elements = VOCAB_SIZE / (expected.blocks * THREADS)
    return Count(
        kernel,
        vector_loops(loops.values()),
        expected.turns * (fewest + more * (most - fewest)) / elements,
        outside_of_loops(paths, loops, expected.turns) / elements,
        waits_before_first_read(paths),
        sum(instruction.is_a("MEMBAR") for instruction in function.instructions),
    )


def counts(functions: Mapping[str, Function]) -> list[Count]:
    """The counts of the checked functions, by their short names."""
    return [count(name, functions[name]) for name in EXPECTED if name in functions]


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
            f"{count.kernel} at V = {VOCAB_SIZE}: {count.inside:.1f} instructions an element in loops and "
            f"{count.outside:.1f} outside are {100 * count.share:.0f} % of memory's time (at most {100 * LIMIT:.0f}); "
            f"{len(count.waits)} waits before the row's first vector"
            + ("" if most_before is None else f" (at most {most_before})")
            + f"; {count.fences} fences"
            + ("" if count.fits else f": TOO MUCH; waits: {'; '.join(count.waits) or 'none'}")
        )
    return lines


def from_json(values: list[list[Any]] | None) -> list[Count] | None:
    """Counts as json has them: lists."""
    if values is None:
        return None
    return [Count(kernel, [Loop(*loop) for loop in loops], *rest) for kernel, loops, *rest in values]
