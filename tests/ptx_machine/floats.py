"""Rules of floats.

PTX ISA, 9.7.3 "Floating Point Instructions", 9.7.4 "Half Precision Floating Point Instructions", 9.7.5 "Mixed
Precision Floating Point Instructions" and 9.7.6 "Comparison and Selection Instructions". Subnormal numbers are kept:
there is no .ftz here. What has no rounding in its name rounds to nearest; ptxas may fuse such a product and sum, this
does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptx_machine.integers import compare
from ptx_machine.kinds import Constant, Maker, Rule
from ptx_machine.parse import Operand

#: Kinds by PTX type, and the function that makes an fma.
_FLOATS = {"f16": ("f2", "fma_f2"), "f16x2": ("2f2", "fma_f2"), "bf16": ("bf", "fma_bf"), "bf16x2": ("2bf", "fma_bf"),
           "f32": ("f4", "fma_f4"), "f32x2": ("2f4", "fma_f4")}  # fmt: skip
#: Of the bits: container, the signs, everything but the signs.
_SIGNS = {"f16": ("u2", 0x8000), "bf16": ("u2", 0x8000), "f16x2": ("u4", 0x80008000), "bf16x2": ("u4", 0x80008000),
          "f32": ("u4", 0x80000000)}  # fmt: skip
_EXTREMES = {"min": "smallest({0}, {1})", "max": "largest({0}, {1})", "min.NaN": "smallest_nan({0}, {1})",
             "max.NaN": "largest_nan({0}, {1})"}  # fmt: skip
#: False where one is NaN; with u true where one is NaN.
_COMPARE = {"eq": "({0} == {1})", "ne": "(({0} < {1}) | ({0} > {1}))", "lt": "({0} < {1})", "le": "({0} <= {1})",
            "gt": "({0} > {1})", "ge": "({0} >= {1})", "equ": "(~(({0} < {1}) | ({0} > {1})))", "neu": "({0} != {1})",
            "ltu": "(~({0} >= {1}))", "leu": "(~({0} > {1}))", "gtu": "(~({0} <= {1}))", "geu": "(~({0} < {1}))",
            "num": "(~(np.isnan({0}) | np.isnan({1})))", "nan": "(np.isnan({0}) | np.isnan({1}))"}  # fmt: skip


def _arithmetic() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, (kind, fma) in _FLOATS.items():
        for rounding in ("", ".rn"):
            for head, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
                rules[f"{head}{rounding}.{name}"] = Rule(f"({{0}} {sign} {{1}})", (kind, kind), kind)
        rules[f"fma.rn.{name}"] = Rule(f"{fma}({{0}}, {{1}}, {{2}})", (kind,) * 3, kind)
        if name != "f32x2":
            for head, text in _EXTREMES.items():
                rules[f"{head}.{name}"] = Rule(text, (kind, kind), kind)
    for name, (bits, signs) in _SIGNS.items():
        rules[f"neg.{name}"] = Rule(_with_bits("^", bits, signs), (bits,), bits)
        rules[f"abs.{name}"] = Rule(_with_bits("&", bits, signs ^ (1 << 8 * int(bits[1])) - 1), (bits,), bits)
    # numpy divides and takes roots as IEEE 754 says.
    rules["div.rn.f32"] = Rule("({0} / {1})", ("f4", "f4"), "f4")
    rules["rcp.rn.f32"] = Rule("(f4(1) / {0})", ("f4",), "f4")
    rules["sqrt.rn.f32"] = Rule("np.sqrt({0})", ("f4",), "f4")
    return rules


def _mixed() -> dict[str, Rule]:
    """A half operand that becomes a float32 first, which is exact."""
    rules: dict[str, Rule] = {}
    for name, kind, wide in (("f16", "f2", ".astype(f4)"), ("bf16", "bf", "")):
        for rounding in ("", ".rn"):
            rules[f"add{rounding}.f32.{name}"] = Rule(f"({{0}}{wide} + {{1}})", (kind, "f4"), "f4")
            rules[f"sub{rounding}.f32.{name}"] = Rule(f"({{0}}{wide} - {{1}})", (kind, "f4"), "f4")
        rules[f"fma.rn.f32.{name}"] = Rule("fma_f4({0}, {1}, {2})", (kind, kind, "f4"), "f4")
    return rules


def _with_bits(sign: str, kind: str, bits: int) -> Maker:
    def make(parts: Sequence[str], operands: Sequence[Operand], constant: Constant) -> str:
        return f"({parts[0]} {sign} {constant(bits, kind)})"

    return make


def _comparison() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, kind in (("f16", "f2"), ("bf16", "bf"), ("f32", "f4")):
        for relation, text in _COMPARE.items():
            rules |= compare(relation, name, text, kind)
    return rules


RULES = _arithmetic() | _mixed() | _comparison()
