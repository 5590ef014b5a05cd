"""``python -m bench audit``: the reading of machine code, the arithmetic of predictions, and what it writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import contract, predict, sass
from bench.audit import tile_bytes, unroll_of
from bench.audit_tables import run
from bench.problems import TOKENS, Problem
from qlinear.format import DENSE
from qlinear.kernels.compile import cuobjdump
from qlinear.kernels.configs import Config
from qlinear.kernels.crossover import LAUNCH, dequantize_seconds
from qlinear.kernels.estimate import LATENCY, vendor_seconds
from qlinear.machines import MACHINES, Machine

# A pipelined loop inside another: 4 warps, 128 rows of int4 by 16 tokens of 16 bits, 2 buffers.
LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;                       /* 0x0000000000007919 */
                                                                            /* 0x000e220000002100 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1+0x800], desc[UR4][R2.64], !P1 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1+0x1000], desc[UR4][R4.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1+0x1800], desc[UR4][R4.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R1+0x2000], desc[UR4][R6.64] ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R1+0x2800], desc[UR4][R6.64] ;
        /*0070*/               @P0 BRA 0x230 ;
        /*0080*/                   DEPBAR.LE SB0, 0x0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   LDG.E R30, desc[UR4][R8.64] ;
        /*00b0*/                   LDG.E.64 R34, desc[UR4][R10.64] ;
        /*00c0*/                   LDSM.16.M88.4 R12, [R20] ;
        /*00d0*/                   LOP3.LUT R24, R12.reuse, 0xf000f, R41, 0xea, !PT ;
        /*00e0*/                   HADD2 R24, R24, -1032, -1032 ;
        /*00f0*/                   UIADD3 UR8, UR8, 0x1, URZ ;
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   HGMMA.64x16x128.F32 R48, R24, gdesc[UR4], R48 ;
        /*0120*/                   HGMMA.64x16x128.F32 R56, R24, gdesc[UR4], R56, gsb0 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/                   FFMA R60, R48, R35, R60 ;
        /*0150*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0160*/                   LDGSTS.E.BYPASS.128 [R1+0x800], desc[UR4][R2.64], !P1 ;
        /*0170*/                   LDGSTS.E.BYPASS.128 [R1+0x1000], desc[UR4][R4.64] ;
        /*0180*/                   LDGSTS.E.BYPASS.128 [R1+0x1800], desc[UR4][R4.64] ;
        /*0190*/                   LDGSTS.E.BYPASS.128 [R1+0x2000], desc[UR4][R6.64] ;
        /*01a0*/                   LDGSTS.E.BYPASS.128 [R1+0x2800], desc[UR4][R6.64] ;
        /*01b0*/                   LDGDEPBAR ;
        /*01c0*/                   PRMT R31, R30, 0x7610, R31 ;
        /*01d0*/               @P2 BRA 0x80 ;
        /*01e0*/                   STG.E [R2.64], R60 ;
        /*01f0*/              @!P3 BRA 0x10 ;
        /*0200*/                   EXIT ;
        /*0210*/                   BRA 0x210;
"""


@pytest.fixture
def loop() -> sass.Loop:
    return sass.hot_loop(sass.parse(LISTING))


def test_the_hot_loop_is_the_innermost_with_matrix_instructions(loop: sass.Loop) -> None:
    assert (loop.body[0].address, loop.body[-1].address) == (0x80, 0x1D0)
    assert len(loop.body) == 22
    assert dict(loop.classes) == {
        "control": 6, "load": 2, "shared": 1, "integer": 2, "float": 2, "uniform": 1, "matrix": 2, "async": 6,
    }  # fmt: skip
    assert loop.matrix_kinds == ["HGMMA.64x16x128.F32"]
    assert loop.waits == 1


def test_a_program_without_matrix_instructions_has_no_hot_loop() -> None:
    with pytest.raises(ValueError, match="no loop"):
        sass.hot_loop(sass.parse("/*0000*/ HMMA.16816.F32 R0, R4, R8, R0 ;\n/*0010*/ IADD3 R1, R1, 0x1, RZ ;"))


def test_a_jump_back_into_a_loop_is_no_loop() -> None:
    # The wait spins at 0x60 and returns to 0x20, past which the loop has its only product.
    listing = """
    /*0000*/ IADD3 R1, R1, 0x1, RZ ;
    /*0010*/ @!P6 BRA 0x60 ;
    /*0020*/ HMMA.16816.F32 R0, R4, R8, R0 ;
    /*0030*/ @P0 BRA 0x0 ;
    /*0040*/ EXIT ;
    /*0050*/ NOP ;
    /*0060*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR18], R173 ;
    /*0070*/ @!P6 BRA 0x60 ;
    /*0080*/ BRA 0x20 ;
    """
    program = sass.parse(listing)
    found = [(loop.body[0].address, loop.body[-1].address) for loop in sass.loops(program)]
    assert found == [(0x0, 0x30)]
    assert len(sass.hot_loop(program).body) == 4


def test_bytes_and_products_of_an_iteration(loop: sass.Loop) -> None:
    # 128 rows of 128 nibbles and 16 tokens of 128 halves.
    assert loop.copied_bytes(128) == loop.copied_bytes_before(128) == 128 * 64 + 16 * 256
    assert loop.loaded_bytes(128) == 128 * (4 + 8)
    assert loop.macs(4) == 128 * 16 * 128
    config, fmt = Config(16, 128, 4, 2), DENSE["w4a16"]
    assert tile_bytes(config, fmt, torch.float16) == (8192, 4096)
    assert unroll_of(loop, config, fmt, torch.float16) == 1


def test_a_loop_that_contradicts_itself_is_not_counted(loop: sass.Loop) -> None:
    with pytest.raises(ValueError, match=r"of 2\.0 blocks along K, its copies of 1"):
        unroll_of(loop, Config(8, 128, 4, 2), DENSE["w4a16"], torch.float16)


def test_loads_that_are_used_at_once_are_told_from_those_that_are_carried(loop: sass.Loop) -> None:
    # R30 is only copied for the next iteration; the second register of R34's pair is multiplied with.
    assert [str(i).split(",")[0] for i in loop.loads_consumed()] == ["LDG.E.64 R34"]
    assert loop.shortest_load() == 9


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "matrix"), ("IGMMA.64x16x32.S8.S8", "matrix"), ("UTCHMMA", "matrix"),
        ("UTMALDG.2D", "async"), ("LDGDEPBAR", "control"), ("LDG.E.128", "load"), ("LDTM.x16", "shared"),
        ("HFMA2.BF16_V2", "float"), ("FFMA2", "float"), ("I2FP.F32.S32", "float"), ("IMAD.MOV.U32", "integer"),
        ("VIADD", "integer"), ("R2UR", "uniform"), ("UTCBAR", "control"), ("SYNCS.PHASECHK.TRANS64", "control"),
        ("LDL.LU", "other"), ("S2R", "other"), ("STSM.16.M88", "shared"), ("ULEA", "uniform"), ("NOP", "control"),
    ],
)  # fmt: skip
def test_classes(opcode: str, kind: str) -> None:
    assert sass.Instruction(0, "", opcode, "").kind == kind


def test_products_of_other_generations() -> None:
    program = sass.parse(
        """
        /*0010*/ UMOV UR9, 0x8040010 ;
        /*0020*/ UTCHMMA tmem[UR20], gdesc[UR10], tmem[UR5], tmem[UR8], idesc[UR9], !UPT ;
        /*0030*/ HMMA.16816.F32 R0, R4, R8, R0 ;
        /*0040*/ IMMA.16832.S8.S8.SAT R0, R4.ROW, R8.COL, R0 ;
        /*0050*/ UTCBAR [UR39], URZ ;
        /*0060*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6+0xf000], R110 ;
        /*0070*/ BRA.U UP0, 0x10 ;
        """
    )
    loop = sass.hot_loop(program)
    each = [loop.macs_of(i, 8) for i in loop.body if i.kind == "matrix"]
    assert each == [128 * 16 * 16, 16 * 8 * 16 * 8, 16 * 8 * 32 * 8]
    assert loop.waits == 1


def multiply(pending: int) -> sass.Loop:
    """Six instructions, two of them products of 16 clocks each at 1024 multiply-adds a clock."""
    listing = f"""
    /*0000*/ IADD3 R1, R1, 0x1, RZ ;
    /*0010*/ IADD3 R2, R2, 0x1, RZ ;
    /*0020*/ HGMMA.64x16x16.F32 R48, R24, gdesc[UR4], R48 ;
    /*0030*/ HGMMA.64x16x16.F32 R48, R28, gdesc[UR4], R48, gsb0 ;
    /*0040*/ WARPGROUP.DEPBAR.LE gsb0, 0x{pending} ;
    /*0050*/ BRA 0x0 ;
    """
    return sass.hot_loop(sass.parse(listing))


def test_products_that_are_waited_for_are_charged_after_what_comes_before() -> None:
    # Three instructions until the first product is issued, two products, one instruction after the wait.
    assert predict.step(multiply(0), 4, 1024) == predict.Step(issue=6, tensor=32, alone=36)
    # With one group outstanding the next iteration's instructions run beside it.
    assert predict.step(multiply(1), 4, 1024) == predict.Step(issue=6, tensor=32, alone=32)
    # Eight warps issue and multiply twice as much.
    assert predict.step(multiply(0), 8, 1024) == predict.Step(issue=12, tensor=64, alone=72)


MACHINE = Machine("one", (9, 0), 10, 1e9, 1e12, 20e12, 40e12, 1 << 20, None, 228 << 10, 2048, 32)


@pytest.mark.parametrize(
    ("use", "blocks"),
    [
        (predict.Resources(128, 128, 1000), 4),  # 65536 registers / (128 * 128)
        (predict.Resources(128, 129, 1000), 3),  # a warp's 4128 registers are 4352
        (predict.Resources(128, 32, 1000), 16),  # 2048 threads
        (predict.Resources(128, 64, 56 << 10), 4),  # 228 KB / 57 KB
        (predict.Resources(32, 16, 0), 32),
        (predict.Resources(128, 64, 1000, tensor_columns=256), 2),
    ],
)
def test_blocks_per_sm(use: predict.Resources, blocks: int) -> None:
    assert predict.blocks_per_sm(use, MACHINE) == blocks


def test_traffic() -> None:
    problem, fmt = Problem("m", "l", 16, 4096, 4096), DENSE["w4a16"]
    moved = predict.traffic(problem, fmt, Config(16, 256, 4, 4, split_k=8))
    weight = 4096 * 4096 // 2 + 4096 * 32 * 2
    x = y = 16 * 4096 * 2
    partials = 8 * 16 * 4096 * 4
    assert (moved.weight, moved.memory, moved.partials) == (weight, weight + x + y, partials)
    # 16 tiles of 256 rows read x; 1 + 4 M / BLOCK_N of the codes alone.
    assert moved.l2 == weight + 16 * x + 2 * partials + y
    assert 16 * x / (4096 * 4096 // 2) == 4 * 16 / 256
    # 33 tokens are three tiles, which read the weight three times.
    moved = predict.traffic(problem._replace(m=33), fmt, Config(16, 256, 4, 4))
    assert moved.l2 == 3 * weight + 33 * 4096 * 2 * (16 + 1)
    assert predict.weight_bytes(DENSE["w4a16-asym"], 100, 200) == 128 * 256 // 2 + 128 * 2 * 4
    assert predict.weight_bytes(DENSE["w8a8"], 64, 128) == 64 * 128 + 64 * 2


def test_predicted_time() -> None:
    fmt = DENSE["w4a16-channel"]
    problem, config = Problem("m", "l", 16, 2560, 1280), Config(16, 256, 4, 4, split_k=2)
    floor = (2560 * 1280 // 2 + 2560 * 2) / 0.9e12
    # 20 programs on 10 multiprocessors: two each, of 5 blocks of 128; 10 steps of 1000 clocks and more at 1 GHz. The
    # last of a tile reads two parts of 16 x 256 sums, 64 bytes a clock, where its share of the L2 cache's are 512.
    added = 2 * 16 * 256 * 4 / 64e9
    slow = predict.predict(problem, fmt, config, predict.Step(1000, 50, 1200), 1, 2, MACHINE)
    assert (slow.bound, slow.seconds, slow.programs_per_sm) == ("issue", pytest.approx(10e-6 + added), 2)
    # A block that waits leaves its multiprocessor to the other, if there is one.
    waits = predict.predict(problem, fmt, config, predict.Step(1000, 900, 1900), 1, 1, MACHINE)
    # Alone, the second of them starts when the first has ended.
    assert (waits.bound, waits.seconds) == ("wait", pytest.approx(19e-6 + added + LATENCY))
    both = predict.predict(problem, fmt, config, predict.Step(1000, 900, 1900), 1, 2, MACHINE)
    assert (both.bound, both.seconds) == ("issue", pytest.approx(10e-6 + added))
    fast = predict.predict(problem, fmt, config, predict.Step(10, 20, 30), 5, 2, MACHINE)
    moved = 2560 * 1280 // 2 + 2560 * 2 + 2 * 16 * (1280 + 2560)
    assert (fast.bound, fast.seconds) == ("memory", pytest.approx(moved / 0.9e12 + added))
    assert fast.share_of_floor == pytest.approx(floor / fast.seconds)
    # Ten tiles of rows read x again, from an L2 cache of 10 bytes a clock.
    small = replace(MACHINE, l2_bytes_per_clock=10)
    cached = predict.predict(problem, fmt, config, predict.Step(10, 20, 30), 5, 2, small)
    partials = 2 * 2 * 16 * 2560 * 4
    l2 = 2560 * 1280 // 2 + 2560 * 2 + 10 * 16 * 1280 * 2 + partials + 16 * 2560 * 2
    assert (cached.bound, cached.seconds) == ("l2", pytest.approx(l2 / 10e9 + 2 * 16 * 256 * 4 / 1e9))
    # One token has one row of sums.
    one = predict.predict(problem._replace(m=1), fmt, config, predict.Step(1000, 50, 1200), 1, 2, MACHINE)
    assert one.seconds == pytest.approx(10e-6 + added / 16)
    # In 16 bit, 16 tokens are bound by the weight, 64 by products at 80 % of 20 TFLOP/s: 20 tiles of 64 x 128.
    dense = 2 * (2560 * 1280 + 16 * (1280 + 2560)) / 0.9e12
    assert vendor_seconds(*problem[2:], MACHINE) == pytest.approx(dense)
    assert vendor_seconds(64, *problem[3:], MACHINE) == pytest.approx(2 * 64 * 2560 * 1280 / 16e12)
    dequantized = dequantize_seconds(*problem[2:], fmt, MACHINE)
    written = 2 * 2560 * 1280 / 0.9e12
    assert dequantized == pytest.approx(floor + written + vendor_seconds(*problem[2:], MACHINE) + 3 * LAUNCH)


def test_rates_of_the_h200() -> None:
    h200 = MACHINES["H200"]
    assert h200.stream_bytes_per_s == pytest.approx(4.32e12)
    assert h200.slots_per_s == pytest.approx(29.65e12, rel=1e-3)
    assert predict.macs_per_clock(DENSE["w4a16"], h200) == pytest.approx(2135 * 0.8 * 0.87, rel=1e-3)
    assert predict.macs_per_clock(DENSE["w8a8"], h200) == pytest.approx(4271 * 0.8 * 0.87, rel=1e-3)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], Path, str]:
    """An audit of one scheme and small layers, as JSON."""
    folder = tmp_path_factory.mktemp("cubins")
    text, data = run(["sm_90"], ["SmolLM2-135M"], ["w4a16-channel"], folder)
    return json.loads(json.dumps(data)), folder, text


def test_what_is_written_as_json(dumped) -> None:
    data, folder, text = dumped
    fields = {"name", "scheme", "dtype", "M", "N", "K", "arch", "threads", "weights_per_iteration", "slots_per_weight"}
    fields |= {"registers", "spills", "cubin", "bytes_in_flight_per_sm", "matrix_kinds", "blocks_per_sm"}
    assert data["kernels"]
    for kernel in data["kernels"]:
        assert fields <= set(kernel)
        assert kernel["scheme"] == "w4a16-channel" and kernel["dtype"] in ("fp16", "bf16") and kernel["arch"] == "sm_90"
        assert kernel["cubin"] in {path.name for path in folder.iterdir()}
        assert kernel["name"] in text
    rows = data["predictions"]
    assert {row["machine"] for row in rows} == {"H200", "H100"}
    assert {row["M"] for row in rows} == {*TOKENS, *contract.TOKENS}
    assert len(rows) == 2 * 4 * 10 * 2
    assert all(0 < row["share_of_floor"] <= 1 and row["us"] > 0 for row in rows)
    # The path of many tokens is the vendor's product, and says so; that of few is the kernel.
    assert "dequantize" in {row["bound"] for row in rows if row["M"] == 4096}
    assert "dequantize" not in {row["bound"] for row in rows if row["M"] <= 128}


@pytest.mark.parametrize("kept", [True, False], ids=["dump", "no-dump"])
def test_every_kernel_names_its_cubin_where_that_is_kept(kept: bool, tmp_path: Path) -> None:
    """Also those that are counted apart: on sparse tensor cores, and of unstructured weights."""
    schemes = ["w16a16-2:4", "w16a16-unstructured"]
    _, data = run(["sm_90"], ["SmolLM2-135M"], schemes, tmp_path / "cubins" if kept else None)
    kinds = [data["kernels"], data["sparse"]["kernels"], data["unstructured"]]
    assert all(kinds)
    named = [kernel["cubin"] for kernels in kinds for kernel in kernels]
    if kept:
        assert sorted(named) == sorted(path.name for path in (tmp_path / "cubins").iterdir())
    else:
        assert set(named) == {None}


def recounted(cubin: bytes, threads: int, weights: int) -> float:
    """Slots per weight by other means: another tool's listing, line by line, and the shortest stretch that a backward
    branch closes around most matrix instructions."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +((?:@\S+ +)?[A-Z].*?);", cuobjdump(cubin, "-sass"))
    addresses = [int(address, 16) for address, _ in lines]
    stretches = []
    for end, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < int(address, 16):
            begin = addresses.index(int(target[1], 16))
            products = sum("MMA." in text for _, text in lines[begin : end + 1])
            stretches.append((-products, end + 1 - begin))
    products, length = min(stretches)
    assert products < 0
    return length * threads / weights


def test_slots_agree_with_a_recount(dumped) -> None:
    data, folder, _ = dumped
    for kernel in data["kernels"][:4]:
        cubin = (folder / kernel["cubin"]).read_bytes()
        slots = recounted(cubin, kernel["threads"], kernel["weights_per_iteration"])
        assert slots == pytest.approx(kernel["slots_per_weight"], rel=0.01), kernel["name"]
        # The tile's name and its one block of 128 along K.
        assert kernel["weights_per_iteration"] == 128 * int(re.search(r"x(\d+)-w", kernel["name"])[1])
