"""Writes to the registers of a product that may still run: read from PTX, and gone where the kernel waits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import audit_tables, sass, waiting
from bench.cubins import Job
from bench.operands import Waiting, early_writes, early_writes_of_code
from bench.problems import Problem
from bench.workers import ask
from qlinear.format import FORMATS
from qlinear.kernels.configs import Config, shipped_configs

PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, %rd1, %p1, 1, 1, 0;"
DECODE = "\n{ .reg .b32 t; shr.u32 t, %r20, 8; prmt.b32 %r5, t, 0, 0x4240;\n}"


def kernel(*body: str) -> str:
    lines = "\n\t".join(body)
    return (
        f".visible .entry k(\n\t.param .u64 p // of x\n)\n.reqntid 128\n{{\n\t.reg .b32 %r<40>;\n{lines}\n\tret;\n}}\n"
    )


def loop(*body: str) -> str:
    return kernel("$L__BB0_1: // the loop", *body, "\t@%p2 bra \t$L__BB0_1;")


COMMIT = "wgmma.commit_group.sync.aligned;"


def wait(groups: int) -> str:
    return f"wgmma.wait_group.sync.aligned \t{groups};"


@pytest.mark.parametrize(
    ("body", "early"),
    [
        ((DECODE, PRODUCT, COMMIT, wait(0)), False),
        ((wait(0), DECODE, PRODUCT, COMMIT), False),
        ((DECODE, PRODUCT, COMMIT, wait(1)), True),
        ((DECODE, wait(0), PRODUCT, COMMIT), True),
        # One group may be under way, and it is not the one that reads.
        ((PRODUCT, COMMIT, PRODUCT.replace("%r5", "%r15"), COMMIT, wait(1), DECODE, wait(0)), False),
        # Its group was never closed.
        ((PRODUCT, wait(0), DECODE, COMMIT, wait(0)), True),
        # A descriptor: the operand is in shared memory.
        ((DECODE, PRODUCT.replace("{%r5,%r6,%r7,%r8}", "%rd2"), COMMIT, wait(1)), False),
        # A store reads.
        (("st.shared.b32 [%r5], %r6;", PRODUCT, COMMIT, wait(1)), False),
        (("mov.b32 {%rs1, %rs2}, %r5;", "ld.shared.v2.b32 {%r9, %r8}, [%r5];", PRODUCT, COMMIT, wait(1)), True),
    ],
    ids=["waits", "waits-first", "one-group", "late", "two-groups", "open", "descriptor", "store", "vector"],
)
def test_writes_in_a_loop(body: tuple[str, ...], early: bool) -> None:
    found = early_writes(loop(*body))
    assert bool(found) is early and all("%r5" in text or "%r8" in text for text in found)


def test_writes_on_one_path_of_two() -> None:
    branch = ("@%p3 bra $L__BB0_2;", wait(0), "$L__BB0_2:", DECODE)
    assert early_writes(kernel(PRODUCT, COMMIT, *branch)) == ["prmt.b32 %r5, t, 0, 0x4240"]
    # Where the other path ends nothing is written.
    assert early_writes(kernel(PRODUCT, COMMIT, "@%p3 bra $L__BB0_2;", "ret;", "$L__BB0_2:", wait(0), DECODE)) == []
    assert early_writes(kernel(PRODUCT, COMMIT, "bra.uni $L__BB0_2;", DECODE, "$L__BB0_2:", wait(0), DECODE)) == []


def multiply(pending: int) -> sass.Loop:
    listing = f"""
    /*0000*/ HADD2 R24, R50, -1152, -1152 ;
    /*0010*/ HADD2 R30, R50, -1152, -1152 ;
    /*0020*/ HGMMA.64x16x16.F32 R48, R24, gdesc[UR4], R48, gsb0 ;
    /*0030*/ WARPGROUP.DEPBAR.LE gsb0, 0x{pending} ;
    /*0040*/ @P0 BRA 0x0 ;
    """
    return sass.hot_loop(sass.parse(listing))


def test_writes_in_machine_code() -> None:
    assert early_writes_of_code(multiply(0)) == 0
    # R24 of R24 to R27; R30 is nobody's.
    assert early_writes_of_code(multiply(1)) == 1


#: One of each loop that decodes ahead, in the smallest tile that does.
SCHEMES = ("w8a16", "w4a16-g32", "w8a16-block64", "w8a16-unstructured")


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    tiles = [Config(16, 128, 4, 4), Config(16, 128, 4, 4), Config(64, 64, 4, 5), Config(16, 64, 4, 2)]
    return [Job(scheme, "fp16", (9, 0), tile) for scheme, tile in zip(SCHEMES, tiles, strict=True)]


def test_kernels_write_early_unless_they_wait(jobs: list[Job], tmp_path: Path) -> None:
    """All four loops, as they ship and with the switch."""
    both = [*jobs, *(replace(job, waits=True) for job in jobs)]
    answers = ask(["-m", "bench.cubins", str(tmp_path)], [asdict(job) for job in both])
    assert not [answer for answer in answers if "error" in answer]
    early = [answer["early_writes"] for answer in answers]
    assert all(early[: len(jobs)]) and not any(early[len(jobs) :])
    assert not any(answer["spilled"] for answer in answers)


def test_what_waiting_costs() -> None:
    """The machine code waits for all groups of products once an iteration, and takes no instruction more."""
    (config,) = (
        c for c in shipped_configs(FORMATS["w8a16"], torch.float16, (9, 0)) if (c.block_m, c.block_n) == (16, 128)
    )
    problem = Problem("m", "l", 16, 4096, 4096)
    rows = waiting.rows_of({Job("w8a16", "fp16", (9, 0), config): problem})
    (row,) = rows
    assert row["ships"].early_writes > 0 == row["waits"].early_writes
    assert row["ships"].early_writes_of_code > 0 == row["waits"].early_writes_of_code
    assert row["waits"].slots_per_weight <= row["ships"].slots_per_weight * 1.02
    text = waiting.as_table(rows)
    assert "w8a16-fp16-sm_90-16x128" in text and "-> 0" in text
    # All products of an iteration are waited for together.
    assert row["waits"].matrix_per_wait == row["waits"].instructions["matrix"] > row["ships"].matrix_per_wait
    assert audit_tables.early_line([row["ships"], row["waits"]]).startswith(
        "of 2 kernels 1 in PTX and 1 in machine code"
    )
    assert audit_tables.early_line([row["waits"]]) == ""


def test_no_kernel_waits_yet() -> None:
    """Only the build that is compared with does, and only where products read registers."""
    assert not Config(64, 128, 4, 3).waits_for_operands((9, 0))
    waits = Waiting(64, 128, 4, 3, 2)
    assert waits.waits_for_operands((9, 0)) and not waits.waits_for_operands((8, 0)) and waits.split_k == 2
