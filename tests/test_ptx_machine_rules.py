"""Every opcode that the PTX machine has a rule for, against tests/ptx_scalar.py, which says it for one thread."""

from __future__ import annotations

import numpy as np
import pytest
from ptx_machine.kinds import KINDS
from ptx_machine.parse import parse
from ptx_machine.translate import RULES, Translator
from ptx_scalar import reference, signed

THREADS = 256
HEADS = sorted({opcode.split(".")[0] for opcode in RULES})
#: Zero, subnormal, smallest, one, largest, infinite, NaN: of float16 and bfloat16; of float32, with ties of the others.
#: The last two are integers beside a tie of bfloat16, which float32 would round to it.
FLOATS_16 = (0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7C01, 0x7E00, 0x3F80, 0x7F7F, 0x7F80, 0x7FFF, 0x80,
             0x3555)  # fmt: skip
FLOATS_32 = (0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F808000, 0x3F801000, 0x477FE000, 0x477FF000, 0x43E00000,
             0x43E80000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x33800000, 0x4EFFFFFF, 0x4F000000,
             0x5F000000, 0x40400001, 0x40BFFFFF)  # fmt: skip


def patterns(width: int, draw: np.random.Generator) -> list[int]:
    """What a register of so many bytes may hold: edges of integers and floats, small numbers, anything."""
    if width == 0:
        return draw.integers(0, 2, THREADS).tolist()
    bits = 8 * width
    edges = [
        0,
        1,
        2,
        (1 << bits) - 1,
        (1 << bits) - 2,
        1 << (bits - 1),
        (1 << (bits - 1)) - 1,
        0x55 % (1 << bits),
        *range(68),
    ]
    if width >= 2:
        halves = [*FLOATS_16, *(x | 0x8000 for x in FLOATS_16)]
        edges += halves if width == 2 else [a | b << 16 for a, b in zip(draw.permutation(halves), halves, strict=True)]
    if width >= 4:
        words = [*FLOATS_32, *(x | 0x80000000 for x in FLOATS_32)]
        edges += (
            words if width == 4 else [int(a) | b << 32 for a, b in zip(draw.permutation(words), words, strict=True)]
        )
    # Floats of about one, whose sums are not trivial.
    near = draw.standard_normal(THREADS).astype("f2" if width == 2 else "f4").view(f"u{min(max(width, 2), 4)}")
    pool = [
        *map(int, edges),
        *draw.integers(0, 1 << bits, THREADS // 2, dtype=np.uint64 if width == 8 else np.int64).tolist(),
    ]
    pool += [int(x) % (1 << bits) for x in near]
    return draw.permutation(np.array(pool, dtype=f"u{width}"))[:THREADS].tolist()


def run(opcode: str, widths: list[int], targets: list[int], sources: list[list[int]], extra: str) -> list[list[int]]:
    """Executes one instruction: ``targets``, ``widths``: bytes of its registers."""
    kinds = [("pred", "b8", "b16", "", "b32", "", "", "", "b64")[width] for width in (*targets, *widths)]
    declared = "".join(f".reg .{kind} r{i};\n" for i, kind in enumerate(kinds))
    destination = "|".join(f"r{i}" for i in range(len(targets)))
    operands = ", ".join([destination, *(f"r{i + len(targets)}" for i in range(len(widths)))])
    text = f".visible .entry f()\n.reqntid {THREADS}\n{{\n{declared}{opcode} {operands}{extra};\nret;\n}}"
    program = parse(text)
    translator = Translator(THREADS, {})
    registers = [None] * len(targets) + [
        np.array(values, f"u{width}" if width else bool) for values, width in zip(sources, widths, strict=True)
    ]
    with np.errstate(all="ignore"):
        exec("\n".join(translator.lines(program.body[0], False)), {**translator.names, "R": registers})
    made = registers[: len(targets)]
    for width, result in zip(targets, made, strict=True):
        assert result.dtype == (f"u{width}" if width else bool) and result.shape == (THREADS,), opcode
    return [result.tolist() for result in made]


def same(opcode: str, got: int, wanted: int) -> bool:
    """Which NaN a float32 is the manual leaves open, but for min and max."""
    head, *rest = opcode.split(".")
    if got == wanted or head in ("min", "max", "setp", "selp") or not {"f32", "f32x2"} & {rest[-1], rest[-2:][0]}:
        return got == wanted
    words = [(got >> s & 0xFFFFFFFF, wanted >> s & 0xFFFFFFFF) for s in ((0, 32) if rest[-1] == "f32x2" else (0,))]
    return all(a == b or (a & 0x7FFFFFFF > 0x7F800000 and b == 0x7FFFFFFF) for a, b in words)


@pytest.mark.parametrize("head", HEADS)
def test_every_opcode_says_what_the_manual_says(head):
    draw = np.random.default_rng(HEADS.index(head))
    for opcode in (opcode for opcode in RULES if opcode.split(".")[0] == head):
        rule = RULES[opcode]
        kinds = [KINDS[kind].size for kind in rule.sources if kind != "number"]
        table = int(draw.integers(0, 256))
        extra = f", {table}" if "number" in rule.sources else ""
        size = KINDS[rule.result].size
        for wider in {0, 1} if rule.extends else {0}:
            widths = [min(2 * w, 8) if wider else w for w in kinds]
            target = min(2 * size, 8) if wider and rule.result[0] in "iu" else size
            if wider and rule.sources[0][0] not in "iu":
                widths = kinds
            sources = [patterns(width, draw) for width in widths]
            made = run(opcode, widths, [target] * (2 if rule.other else 1), sources, extra)
            for i, values in enumerate(zip(*sources, strict=True)):
                cut = [value & (1 << 8 * w) - 1 if w else value for value, w in zip(values, kinds, strict=True)]
                wanted = reference(opcode, cut, table)
                if wanted is None:
                    continue
                if rule.result[0] == "i" and target != size:
                    wanted = [signed(x, 8 * size) & (1 << 8 * target) - 1 for x in wanted]
                for got, want in zip((m[i] for m in made), wanted, strict=False):
                    assert same(opcode, got, want), (opcode, [hex(v) for v in values], hex(got), hex(want))
