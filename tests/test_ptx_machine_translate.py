"""Lines that the PTX machine makes of instructions: guards, moves, numbers in the text, and what it refuses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from ptx_machine import bits
from ptx_machine.parse import parse
from ptx_machine.translate import Translator, Unknown

THREADS = 64
DRAW = np.random.default_rng(17)
WORDS = DRAW.integers(0, 2**32, THREADS, dtype=np.uint32)
OTHERS = DRAW.integers(0, 2**32, THREADS, dtype=np.uint32)
EVERY_SECOND = np.arange(THREADS) % 2 == 0
WIDTHS = {"p": "pred", "b": "b8", "h": "b16", "r": "b32", "d": "b64"}


def execute(text: str, mask: np.ndarray | None = None, symbols: dict[str, int] | None = None, **registers):
    """Runs one instruction on registers named p, h, r or d and a number; returns them all by name."""
    names = sorted({name for name in text.replace(",", " ").replace(";", " ").replace("{", " ").replace("}", " ")
                    .replace("|", " ").replace("!", " ").replace("@", " ").split()
                    if name[0] in WIDTHS and name[1:].isdigit()} | set(registers))  # fmt: skip
    declared = "".join(f".reg .{WIDTHS[name[0]]} {name};\n" for name in names)
    program = parse(f".visible .entry f()\n.reqntid {THREADS}\n{{\n{declared}{text};\n}}")
    translator = Translator(THREADS, symbols or {})
    R = [registers.get(name) for name in program.names]
    lines = translator.lines(program.body[0], mask is not None)
    with np.errstate(all="ignore"):
        exec("\n".join(lines), {**translator.names, "R": R, "mask": mask})
    return dict(zip(program.names, R, strict=True))


# --- guards and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("guard", ["", "@p1 ", "@!p1 "], ids=["plain", "guard", "negated"])
def test_only_threads_that_are_on_write(guard, masked):
    p1, mask = WORDS % 2 == 0, OTHERS % 2 == 0
    on = np.full(THREADS, True) if not guard else ~p1 if "!" in guard else p1
    on = on & mask if masked else on
    old = np.arange(THREADS, dtype=np.uint32)
    made = execute(f"{guard}add.s32 r1, r2, r3", mask if masked else None, p1=p1, r1=old, r2=WORDS, r3=OTHERS)
    np.testing.assert_array_equal(made["r1"], np.where(on, WORDS + OTHERS, old))
    # The old array is left alone: another register may share it.
    np.testing.assert_array_equal(old, np.arange(THREADS))


def test_threads_that_never_wrote_hold_a_pattern():
    made = execute("@p1 mov.b32 r1, 7", p1=EVERY_SECOND)
    assert made["r1"].tolist() == [7, 0xDEADBEEF] * (THREADS // 2)


@pytest.mark.parametrize(
    "text",
    ["add.s32 r1, r2, r3", "setp.eq.b32 p1, r2, r3", "setp.ne.s32 p1, r2, r3", "setp.lt.s32 p1, r2, r3",
     "setp.neu.f32 p1, r2, r3", "selp.b32 r1, r2, r3, p2", "@p3 mov.b32 r1, r2", "@p2 mov.b32 r1, r3",
     "mov.b64 d1, {r2, r3}", "prmt.b32 r1, r2, r3, 0x5410", "lop3.b32 r1, r2, r3, r2, 0x96", "max.s32 r1, r3, r2",
     "fma.rn.f32 r1, r2, r2, r3", "cvt.rn.f16x2.f32 r1, r2, r3", "shl.b32 r1, r2, r3", "bfe.u32 r1, r3, 1, 2"],
)  # fmt: skip
def test_a_register_that_was_never_written_is_an_error(text):
    """r3 and p3; the message has None in it."""
    with pytest.raises((TypeError, AttributeError), match="None"):
        execute(text, r2=WORDS, p2=EVERY_SECOND, r1=WORDS)


# --- mov --------------------------------------------------------------------------------------------------------------


def test_vectors_of_a_move():
    halves = [WORDS.astype(np.uint16), (WORDS >> 16).astype(np.uint16)]
    both = OTHERS.astype(np.uint64) << np.uint64(32) | WORDS
    np.testing.assert_array_equal(execute("mov.b32 r1, {h1, h2}", h1=halves[0], h2=halves[1])["r1"], WORDS)
    np.testing.assert_array_equal(execute("mov.b64 d1, {r1, r2}", r1=WORDS, r2=OTHERS)["d1"], both)
    made = execute("mov.b32 {h1, h2}, r1", r1=WORDS)
    np.testing.assert_array_equal([made["h1"], made["h2"]], halves)
    made = execute("mov.b64 {r1, r2}, d1", d1=both)
    np.testing.assert_array_equal([made["r1"], made["r2"]], [WORDS, OTHERS])
    made = execute("mov.b32 {_, h1}, r1", r1=WORDS)
    np.testing.assert_array_equal(made["h1"], halves[1])
    made = execute("mov.b32 r1, {h1, 0x8000}", h1=halves[0])
    np.testing.assert_array_equal(made["r1"], halves[0] | np.uint32(0x80000000))
    parts = execute("mov.b64 {h1, h2, h3, h4}, d1", d1=both)
    np.testing.assert_array_equal(
        execute("mov.b64 d1, {h1, h2, h3, h4}", **{k: parts[k] for k in ("h1", "h2", "h3", "h4")})["d1"], both
    )


def test_moves_of_constants_and_addresses():
    assert set(execute("mov.b16 h1, -1")["h1"]) == {0xFFFF}
    assert set(execute("mov.u16 h1, 0xffffffffffffff80")["h1"]) == {0xFF80}
    assert set(execute("mov.f32 r1, 0fBF800000")["r1"]) == {0xBF800000}
    assert set(execute("mov.pred p1, -1")["p1"]) == {True}
    assert set(execute("mov.b32 r1, global_smem", symbols={"global_smem": 1024})["r1"]) == {1024}


def test_special_registers_are_registers():
    program = parse(f".visible .entry f()\n.reqntid {THREADS}\n{{\n.reg .b32 r1;\nmov.u32 r1, %tid.x;\n}}")
    (line,) = Translator(THREADS, {}).lines(program.body[0], False)
    assert line == f"R[0] = R[{program.special['%tid.x'].index}]"


# --- numbers in the instruction ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["s", "u"])
def test_fields_and_shifts_by_constants_are_those_by_registers(letter):
    edges = (0, 1, 5, 16, 31, 32, 33, 255)
    for start in edges:
        r3 = np.full(THREADS, start, np.uint32)
        for opcode in (f"shr.{letter}32", "shl.b32"):
            want = execute(f"{opcode} r1, r2, r3", r2=WORDS, r3=r3)["r1"]
            np.testing.assert_array_equal(execute(f"{opcode} r1, r2, {start}", r2=WORDS)["r1"], want)
        for length in edges:
            r4 = np.full(THREADS, length, np.uint32)
            want = execute(f"bfe.{letter}32 r1, r2, r3, r4", r2=WORDS, r3=r3, r4=r4)["r1"]
            got = execute(f"bfe.{letter}32 r1, r2, {start}, {length}", r2=WORDS)["r1"]
            np.testing.assert_array_equal(got, want, err_msg=f"{start}, {length}")


def test_permutations_by_constants_are_those_by_registers():
    """Every pair of nibbles, in both halves of the selector."""
    selectors = [a | b << 4 | a << 8 | b << 12 for a, b in product(range(16), repeat=2)]
    selectors += [0x5410, 0x7632, 0x1010, 0x3340, 0xB391, 0xBBB3, 0x3210, 0x7654, 0x0123, 0x4240, 0xAAA2, 0x12345410]
    for selector in selectors:
        want = bits.permute(WORDS, OTHERS, np.full(THREADS, selector, np.uint32))
        got = execute(f"prmt.b32 r1, r2, r3, {selector}", r2=WORDS, r3=OTHERS)["r1"]
        np.testing.assert_array_equal(got, want, err_msg=hex(selector))
    got = execute("prmt.b32 r1, r2, 0, 0x4140", r2=WORDS)["r1"]
    np.testing.assert_array_equal(got, WORDS & 0xFF | (WORDS & 0xFF00) << 8)


@pytest.mark.parametrize("table", [0x00, 0x0F, 0x80, 0x96, 0xCA, 0xE8, 0xEA, 0xF0, 0xFE, 0xFF])
def test_lop3_of_registers_and_constants(table):
    got = execute(f"lop3.b32 r1, r2, r3, 0x64006400, {table}", r2=WORDS, r3=OTHERS)["r1"]
    index = [4 * (int(a) >> i & 1) + 2 * (int(b) >> i & 1) + (0x64006400 >> i & 1)
             for a, b in zip(WORDS, OTHERS, strict=True) for i in range(32)]  # fmt: skip
    want = np.array([table >> i & 1 for i in index], np.uint32).reshape(-1, 32) << np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(got, want.sum(1))


def test_setp_of_two_destinations_with_a_predicate():
    """PTX ISA, setp: the second destination combines the comparison turned round, not the whole turned round."""
    made = execute("setp.lt.and.s32 p1|p2, r1, r2, !p3", r1=WORDS, r2=OTHERS, p3=EVERY_SECOND)
    less = WORDS.view(np.int32) < OTHERS.view(np.int32)
    np.testing.assert_array_equal(made["p1"], less & ~EVERY_SECOND)
    np.testing.assert_array_equal(made["p2"], ~less & ~EVERY_SECOND)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["frobnicate.b32 r1, r2", "add.sat.s32 r1, r2, r3", "add.ftz.f32 r1, r2, r3", "add.rz.f32 r1, r2, r3",
     "fma.rn.relu.f16x2 r1, r2, r3, r4", "div.full.f32 r1, r2, r3", "div.approx.f32 r1, r2, r3", "mul.s32 r1, r2, r3",
     "sqrt.approx.f32 r1, r2", "ex2.approx.ftz.f32 r1, r2", "cvt.f16.f32 h1, r1", "cvt.rn.relu.f16.f32 h1, r1",
     "cvt.rm.f16.f32 h1, r1", "cvt.s32.f32 r1, r2", "cvt.rn.e4m3x2.f32 h1, r1, r2", "cvt.rn.tf32.f32 r1, r2",
     "cvt.f32.s32 r1, r2", "max.xorsign.abs.f32 r1, r2, r3", "setp.lt.ftz.f32 p1, r1, r2", "setp.lt.b32 p1, r1, r2",
     "prmt.b32.f4e r1, r2, r3, r4", "prmt.f4e.b32 r1, r2, r3, r4", "mov.v2.b32 r1, r2", "addc.u32 r1, r2, r3",
     "tcgen05.wait::ld.sync.aligned", "elect.sync r1|p1, -1"],
)  # fmt: skip
def test_an_opcode_or_a_modifier_that_is_not_known_is_refused_by_name(text):
    with pytest.raises(Unknown, match=text.split()[0].replace(".", r"\.")):
        execute(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("add.s32 d1, d2, d3", "8 bytes"),
        ("add.f32 r1, r2, h3", "2 bytes"),
        ("add.f16 r1, h2, h3", "4 bytes"),
        ("cvt.f32.f16 r1, r2", "4 bytes"),
        ("add.s32 r1, r2", "2 source operands"),
        ("add.s32 r1|r2, r3, r4", "two destinations"),
        ("add.s32 5, r3, r4", "destination"),
        ("add.s16 h1, h2, 65536", "16 bits"),
        ("fma.rn.f16 h1, h2, h3, 0f3F800000", "16 bits"),
        ("lop3.b32 r1, r2, r3, r4, r5", "number of 8 bits"),
        ("lop3.b32 r1, r2, r3, r4, 256", "number of 8 bits"),
        ("mov.b32 r1, elsewhere", "no variable elsewhere"),
        ("mov.b32 {h1, h2, h3}, r1", "parts"),
        ("mov.b32 {r1, r2}, r3", "4 bytes"),
        ("mov.b32 r1, p1", "0 bytes"),
        ("add.s32 r1, [r2], r3", "Address"),
    ],
)
def test_operands_that_do_not_fit_are_refused(text, why):
    with pytest.raises(Unknown, match=why):
        execute(text)


def test_a_refusal_says_where():
    text = ".visible .entry f()\n.reqntid 64\n{\n.reg .b32 r<3>;\n.loc 1 12 3\nadd.ftz.f32 r0, r1, r2;\n}\n"
    text += '.file 1 "/x/tiles.py"'
    with pytest.raises(Unknown, match=r"add\.ftz\.f32 r0, r1, r2 \(tiles\.py:12\)"):
        Translator(64, {}).lines(parse(text).body[0], False)


def test_constants_that_are_written_in_two_ways_are_one():
    """Of 64 bits in hexadecimal, or signed: each name stands for one array, however often it is asked for."""
    translator = Translator(32, {})
    names = [
        translator.constant(value, kind)
        for _ in range(3)
        for value, kind in ((0xFFFFFFFFFFFFFF80, "u2"), (-128, "u2"), (7, "u8"), (5, "u4"))
    ]
    assert len(set(names)) == 3
    values = [(translator.names[name].dtype.itemsize, int(translator.names[name][0])) for name in names[:4]]
    assert values == [(2, 0xFF80), (2, 0xFF80), (8, 7), (4, 5)]
