"""Paths of a warp through machine code: the instructions that it issues at most.

A module of machine_code.py. Loops are passed once. Branches of which nothing is known may go either way. The number of
the thread is known, and so are comparisons with it: warps other than the first do not compute the row's loss.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from machine_code import Function, Instruction

COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "EQ": int.__eq__,
    "NE": int.__ne__,
    "LT": int.__lt__,
    "LE": int.__le__,
    "GT": int.__gt__,
    "GE": int.__ge__,
}
AND, OR = "0xc0", "0xfc"
Known = Mapping[str, int]


def operands(instruction: Instruction) -> list[str]:
    """The operands, without the marks of reuse."""
    text = re.sub(r"^@!?U?P\w+\s+", "", instruction.text)
    _, _, rest = text.partition(" ")
    return [part.strip().removesuffix(".reuse") for part in rest.split(",")] if rest else []


def guard(instruction: Instruction) -> tuple[str, bool] | None:
    """The predicate on which the instruction depends, and its value with which the instruction is executed."""
    match = re.match(r"@(!?)(U?P\w+)\s", instruction.text)
    return (match[2], not match[1]) if match else None


def _value(known: Known, operand: str) -> int | None:
    if operand in ("RZ", "URZ"):
        return 0
    return int(operand, 16) if re.fullmatch(r"0x[0-9a-f]+", operand) else known.get(operand)


def _result(instruction: Instruction, known: Known, thread: int | None) -> tuple[str, int] | None:
    """The register or predicate that the instruction writes, and its value, if that is known."""
    name, of = instruction.name, operands(instruction)
    values = [_value(known, operand) for operand in of]
    if guard(instruction):
        return None
    if instruction.is_a("S2R", "S2UR") and of[1] == "SR_TID.X" and thread is not None:
        return of[0], thread
    if name == "SHF.R.U32.HI" and values[1:3] == [0, values[2]] and None not in values[2:4]:
        return of[0], int(values[3] or 0) >> int(values[2] or 0)
    if name == "LOP3.LUT" and of[-2:-1] == [AND] and len(of) == 6 and None not in values[1:3]:
        return of[0], int(values[1] or 0) & int(values[2] or 0)
    # A predicate that says whether any bit is set.
    if name == "LOP3.LUT" and of[0].startswith("P") and of[-2:-1] == [OR] and any(values[2:4]):
        return of[0], True
    if instruction.is_a("ISETP") and ".AND" in name and ".EX" not in name and len(of) == 5:
        a, b, also = values[2], values[3], True if of[4] == "PT" else known.get(of[4])
        if a is None or b is None:
            return None
        holds = COMPARISONS[name.split(".")[1]](a, b)
        if not holds or also is not None:
            return of[0], holds and bool(also)
    return None


def _registers(instruction: Instruction) -> int:
    """The number of registers that its result may take."""
    if instruction.is_vector:
        return 4
    return 2 if re.search(r"64|WIDE|^D", instruction.name) else 1


def _after(instruction: Instruction, known: Known, thread: int | None) -> Known:
    """The numbers that are known after an instruction."""
    result = _result(instruction, known, thread)
    written = set()
    for operand in operands(instruction)[:3]:
        if re.fullmatch(r"U?P\d", operand):
            written.add(operand)
    if match := re.fullmatch(r"(U?R)(\d+)", next(iter(operands(instruction)), "")):
        written |= {f"{match[1]}{int(match[2]) + i}" for i in range(_registers(instruction))}
    kept = {name: value for name, value in known.items() if name not in written}
    return {**kept, result[0]: result[1]} if result else kept


class Paths:
    """The ways through a function, by the positions of its instructions."""

    def __init__(self, function: Function) -> None:
        self.code = function.instructions
        self._at = {instruction.address: i for i, instruction in enumerate(self.code)}
        self._labels = function.labels
        self.following = [self._following(i) for i in range(len(self.code))]
        self.back = self._back_edges()
        self._reached_from: dict[int, frozenset[int]] = {}

    def _target(self, instruction: Instruction) -> int | None:
        match = re.search(r"`\((\S+)\)", instruction.text)
        return self._at.get(self._labels[match[1]]) if match and match[1] in self._labels else None

    def _following(self, i: int) -> list[int]:
        """What may come after an instruction: the next one, and the target of a branch."""
        instruction = self.code[i]
        after = [i + 1] if i + 1 < len(self.code) else []
        if instruction.is_a("EXIT", "RET"):
            return after if guard(instruction) else []
        target = self._target(instruction) if instruction.is_a("BRA") else None
        # Warps whose lanes wait for each other do not take BRA.DIV.
        if target is None or ".DIV" in instruction.name:
            return after
        return [*after, target] if guard(instruction) or len(operands(instruction)) > 1 else [target]

    def _back_edges(self) -> set[tuple[int, int]]:
        back, entered, left = set(), {0}, set()
        open_ones = [(0, iter(self.following[0]))]
        while open_ones:
            i, rest = open_ones[-1]
            for j in rest:
                if j in entered - left:
                    back.add((i, j))
                elif j not in entered:
                    entered.add(j)
                    open_ones.append((j, iter(self.following[j])))
                    break
            else:
                left.add(i)
                open_ones.pop()
        return back

    def forward(self, i: int) -> list[int]:
        """What may come after an instruction in the same turns of all loops."""
        return [j for j in self.following[i] if (i, j) not in self.back]

    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """The first instruction and all instructions of each loop, short loops before long ones."""
        before: dict[int, list[int]] = {}
        for i, following in enumerate(self.following):
            for j in following:
                before.setdefault(j, []).append(i)
        found = []
        for last, first in self.back:
            body, new = {first}, [last]
            while new:
                i = new.pop()
                if i not in body:
                    body.add(i)
                    new += before.get(i, [])
            found.append((first, frozenset(body)))
        return sorted(found, key=lambda loop: (len(loop[1]), loop[0]))

    def longest(
        self,
        free: Iterable[int] = (),
        thread: int | None = None,
        within: tuple[int, frozenset[int]] | None = None,
        avoided: Callable[[Instruction], bool] = lambda _: False,
    ) -> int:
        """The largest number of instructions on a path from the beginning to an end.

        `free` are not counted. `within`: a turn of this loop, not the function. `avoided`: where a branch may go either
        way, its side without such an instruction is taken, if that side leads to as many of `free`.
        """
        not_counted = frozenset(free)
        inside = range(len(self.code)) if within is None else within[1]

        @functools.cache
        def rest(i: int, facts: frozenset[tuple[str, int]]) -> int:
            known: Known = dict(facts)
            count = 0
            while True:
                instruction = self.code[i]
                count += i not in not_counted
                known = _after(instruction, known, thread)
                sides = [j for j in self._sides(i, known) if j in inside and (i, j) not in self.back]
                if len(sides) == 2:
                    reached = {j: self._reached(j) & not_counted for j in sides}
                    without = [j for j in sides if not self._meets(j, avoided)]
                    sides = [j for j in without if all(reached[j] >= reached[other] for other in sides)] or sides
                if len(sides) != 1:
                    return count + max((rest(j, frozenset(known.items())) for j in sides), default=0)
                i = sides[0]

        return rest(0 if within is None else within[0], frozenset())

    def _sides(self, i: int, known: Known) -> list[int]:
        """What may come after an instruction if these numbers are known."""
        instruction, following = self.code[i], self.following[i]
        condition = guard(instruction)
        is_simple = not instruction.is_a("BRA") or len(operands(instruction)) == 1
        if condition is None or condition[0] not in known or not is_simple or not instruction.is_a("BRA", "EXIT"):
            return following
        if bool(known[condition[0]]) == condition[1]:
            return following[1:]
        return following[:1]

    def _reached(self, i: int) -> frozenset[int]:
        """Whatever may come after an instruction in the same turns of all loops."""
        if i not in self._reached_from:
            reached, new = set(), [i]
            while new:
                j = new.pop()
                if j not in reached:
                    reached.add(j)
                    new += self.forward(j)
            self._reached_from[i] = frozenset(reached)
        return self._reached_from[i]

    def _meets(self, i: int, avoided: Callable[[Instruction], bool]) -> bool:
        """Whether such an instruction comes before the next branch."""
        while True:
            if avoided(self.code[i]):
                return True
            if len(self.following[i]) != 1 or (i, self.following[i][0]) in self.back:
                return False
            i = self.following[i][0]
