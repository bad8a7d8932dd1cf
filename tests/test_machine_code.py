"""The counts of machine code, for listings with known counts."""

from __future__ import annotations

import json

import machine_code
import pytest
from machine_code import Count, Loop
from machine_paths import Paths

pytestmark = pytest.mark.slow

# By nvdisasm 13.0 of sm_90: the load sets the second barrier, which the comparison waits for.
REAL = """\
//--------------------- .text._Z1kPK6float4PS_PKii --------------------------
\t.section\t.text._Z1kPK6float4PS_PKii,"ax",@progbits
_Z1kPK6float4PS_PKii:
.text._Z1kPK6float4PS_PKii:
        /*0050*/                   LDG.E R2, desc[UR6][R2.64] ;                   /* 0x0000000602027981 */
                                                                                  /* 0x000ea4000c1e1900 */
.L_x_2:
        /*0060*/                   ISETP.GE.AND P0, PT, R2, RZ, PT ;              /* 0x000000ff0200720c */
                                                                                  /* 0x004fda0003f06270 */
        /*0070*/              @!P0 BRA `(.L_x_2) ;                                /* 0x000000000000894d */
                                                                                  /* 0x000fea0003800000 */
"""


def listing(name: str, *lines: str | tuple[str, int | None, int]) -> str:
    """A function of such instructions: texts, with the barrier they set and a mask of those they wait for; labels."""
    printed = [f".text.{name}:"]
    address = 0
    for line in lines:
        if isinstance(line, str) and line.endswith(":"):
            printed.append(line)
            continue
        text, sets, waits = (line, None, 0) if isinstance(line, str) else line
        upper = (waits << 11 | (7 if sets is None else sets) << 5) << 41
        printed += [f"  /*{address:04x}*/   {text} ;  /* 0x{0:016x} */", f"    /* 0x{upper:016x} */"]
        address += 16
    return "\n".join(printed)


ON_CHIP = "on_chip_kernel<__nv_bfloat16, (Loop)0>"
COPY = (".L_copy:", "LDGSTS.E.BYPASS.128 [R11], desc[UR6][R2.64]", "IADD3 R9, R6, R9, RZ", "@!P0 BRA `(.L_copy)")
STATISTICS = (
    ".L_sum:",
    *["LDS.128 R8, [R0]"] * 2,
    *["MUFU.EX2 R8, R6"] * 16,
    "FADD R1, R1, R8",
    "@P0 BRA `(.L_sum)",
)
GRADIENT = (
    ".L_gradient:",
    "LDS.128 R8, [R0]",
    *["MUFU.EX2 R8, R6"] * 8,
    *["F2FP.BF16.F32.PACK_AB R6, R7, R6"] * 4,
    "STG.E.EF.128 desc[UR6][R2.64], R8",
    "@P0 BRA `(.L_gradient)",
)
# A shorter way round for what is left, and one that fills a row: neither is the pass over it.
REST = (".L_rest:", "LDS.128 R8, [R0]", *["MUFU.EX2 R8, R6"] * 8, "@P0 BRA `(.L_rest)")
FILL = (".L_fill:", "STG.E.EF.128 desc[UR6][R2.64], R8", "@P0 BRA `(.L_fill)")


def counted(*lines: str | tuple[str, int | None, int]) -> Count:
    (function,) = machine_code.parse(listing("k", *lines))
    (count,) = machine_code.counts({ON_CHIP: function})
    return count


def test_listing_is_read():
    (function,) = machine_code.parse(REAL)
    load, compare, branch = function.instructions
    assert function.name == "_Z1kPK6float4PS_PKii"
    assert (load.name, load.sets, load.waits) == ("LDG.E", 2, frozenset())
    assert (compare.name, compare.sets, compare.waits) == ("ISETP.GE.AND", None, {2})
    assert (branch.name, function.labels) == ("BRA", {".L_x_2": 0x60})
    assert Paths(function).loops() == [(1, {1, 2})]


def test_a_thread_takes_the_longest_loops_for_as_many_vectors_as_they_hold():
    others = ("MEMBAR.ALL.GPU", "EXIT", "NOP")
    count = counted(*COPY, *STATISTICS, *REST, *FILL, *GRADIENT, *others)
    assert count.loops == [Loop(8, 3, 0, 1, 0, 0, 0), Loop(16, 20, 2, 0, 0, 16, 0), Loop(8, 15, 1, 0, 1, 8, 4)]
    assert [loop.kind for loop in count.loops] == ["copy", "statistics", "gradient"]
    # A row of 128,256 elements on four blocks of 256 threads: 125.25 elements a thread, in 15 or 16 vectors.
    of_15, of_16 = (3 + 15) * 15 + 20 * 7 + 10, (3 + 15) * 16 + 20 * 8
    assert count.inside == pytest.approx((of_15 + 0.65625 * (of_16 - of_15)) / 125.25)
    # The fence and the end.
    assert count.outside == pytest.approx(2 / 125.25)
    assert count.fences == 1
    assert count.fits


def test_warps_but_the_first_leave_out_what_one_thread_does():
    row = ("ISETP.NE.AND P1, PT, R4, RZ, PT", "@P1 BRA `(.L_all)", *["FADD R1, R1, R1"] * 800, ".L_all:")
    known = counted("S2R R4, SR_TID.X", *COPY, *STATISTICS, *GRADIENT, *row, "EXIT")
    # One of eight warps does it.
    assert known.outside == pytest.approx((3 + 800 / 8 + 1) / 125.25)
    unknown = counted("LDC R4, c[0x0][0x210]", *COPY, *STATISTICS, *GRADIENT, *row, "EXIT")
    assert unknown.outside == pytest.approx((3 + 800 + 1) / 125.25)


def test_elements_outside_of_vectors_are_left_out():
    single = ("@P1 BRA `(.L_all)", "LDG.E.U16 R2, desc[UR6][R4.64]", *["FADD R1, R1, R1"] * 30, ".L_all:")
    count = counted(*COPY, *STATISTICS, *GRADIENT, *single, "EXIT")
    assert count.outside == pytest.approx(2 / 125.25)


def test_a_way_without_single_elements_must_not_skip_the_row():
    begin = ("@P1 BRA `(.L_end)", "LDG.E.U16 R2, desc[UR6][R4.64]", *["FADD R1, R1, R1"] * 30)
    count = counted(*begin, *COPY, *STATISTICS, *GRADIENT, ".L_end:", "EXIT")
    assert count.outside == pytest.approx(33 / 125.25)


def test_each_part_of_a_row_takes_the_loop_around_it():
    kernel = "statistics_kernel<__nv_bfloat16, (Loop)0>"
    body = [line.replace("LDS", "LDG.E") for line in STATISTICS]
    parts = (".L_part:", "MOV R1, R2", *body, *["FADD R1, R1, R1"] * 4, "@P3 BRA `(.L_part)")
    (function,) = machine_code.parse(listing("k", "MOV R2, R3", *parts, "EXIT"))
    (count,) = machine_code.counts({kernel: function})
    # 501 elements a thread in four parts, each with six instructions outside of the inner loop.
    assert count.outside == pytest.approx((2 + 4 * 6) / 501)
    assert count.inside == pytest.approx(4 * (7 + 0.65625) * 20 / 501)


def test_only_inner_loops_count():
    count = counted(".L_rows:", *COPY, *STATISTICS, *GRADIENT, "@P1 BRA `(.L_rows)")
    assert [loop.kind for loop in count.loops] == ["copy", "statistics", "gradient"]


@pytest.mark.parametrize(
    ("before", "waits"),
    [
        # The target's number alone; its weight, which nobody waits for; its logit, and that of another one, too.
        ([("LDG.E R2, x", 0, 0), ("ISETP P0, R2", None, 1)], 1),
        ([("LDG.E R2, x", 0, 0), ("ISETP P0, R2", None, 1), ("LDG.E R3, w", 1, 0)], 1),
        ([("LDG.E R2, x", 0, 0), ("LDG.E.U16 R3, w", 1, 1), ("SHL R3, R3", None, 2)], 2),
        ([("LDG.E R2, x", 0, 0), ("LDG.E R3, w", 1, 1), ("LDG.E R4, w", 2, 2), ("SHL R4, R4", None, 4)], 3),
        # Waiting for a constant or for shared memory is no wait for memory.
        ([("LDC R2, c[0x0][0x28]", 0, 0), ("ISETP P0, R2", None, 1)], 0),
        # A load of which the compiler does not know the memory, barriers, the kernel before, and a fence.
        ([("LD.E R2, x", 0, 0), ("ISETP P0, R2", None, 1)], 1),
        (["BAR.SYNC.DEFER_BLOCKING 0x0", "UCGABAR_WAIT", "ACQBULK"], 3),
        (["MEMBAR.ALL.GPU"], 1),
        # On a way that does not lead to the row, or that has passed it.
        (["@P0 BRA `(.L_copy)", "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT"], 0),
        ([".L_rows:", *COPY, "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA `(.L_rows)"], 0),
    ],
)
def test_waits_before_the_row(before, waits):
    copy = [] if COPY[0] in before else COPY
    count = counted(*before, *copy, ("SHL R3, R3", None, 63), *STATISTICS, *GRADIENT)
    assert len(count.waits) == waits
    assert count.fits == (waits <= 2)
    assert all(wait in machine_code.table([count])[-1] for wait in count.waits) == (waits != 0 and not count.fits) or (
        not waits
    )


@pytest.mark.parametrize("inside", [True, False])
def test_too_many_instructions_are_refused(inside):
    # 65 % of the instructions that an H200's schedulers issue while it moves 4 bytes, for a thread's elements.
    most = 0.65 * 4 / 4.3e12 * 132 * 128 * 1.755e9 * 125.25
    loops = [*COPY, *STATISTICS, *GRADIENT]
    count = counted(*loops)
    spare = int((most - 125.25 * (count.inside + count.outside)) / (15.65625 if inside else 1))
    for more, fits in ((spare, True), (spare + 1, False)):
        added = ["FADD R1, R1, R8"] * more
        count = counted(*([*loops[:-1], *added, loops[-1]] if inside else [*loops, *added]))
        assert count.fits == fits
        assert ("TOO MUCH" in machine_code.table([count])[-1]) != fits


def test_a_kernel_without_its_loops_is_refused():
    assert counted(*COPY, *STATISTICS, *GRADIENT).fits
    for loops in ([], COPY + STATISTICS, COPY + GRADIENT, STATISTICS + GRADIENT):
        assert not counted(*loops, "EXIT").fits


def test_counts_survive_json():
    count = counted(*COPY, *STATISTICS, *GRADIENT)
    assert machine_code.from_json(json.loads(json.dumps([count]))) == [count]
    assert machine_code.from_json(None) is None
