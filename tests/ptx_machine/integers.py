"""Rules of integers, bits and predicates.

PTX ISA, 9.7.1 "Integer Arithmetic Instructions", 9.7.6 "Comparison and Selection Instructions", 9.7.8 "Logic and Shift
Instructions", and prmt of 9.7.9 "Data Movement and Conversion Instructions".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from ptx_machine.kinds import TYPES, Constant, Maker, Rule
from ptx_machine.parse import Immediate, Operand

_INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
_BITS = {"b16": "u2", "b32": "u4", "b64": "u8"}
#: setp's comparisons of integers; of bits, eq and ne alone.
_COMPARE = {"lt": "({0} < {1})", "le": "({0} <= {1})", "gt": "({0} > {1})", "ge": "({0} >= {1})",
            "eq": "equal({0}, {1})", "ne": "(~equal({0}, {1}))"}  # fmt: skip
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _arithmetic() -> dict[str, Rule]:
    """Where the sign changes nothing, numbers are taken without it: a register is read as it is."""
    rules: dict[str, Rule] = {}
    for name in _INTEGERS:
        kind, raw = TYPES[name], f"u{TYPES[name][1]}"
        rules |= {
            f"add.{name}": Rule("({0} + {1})", (raw, raw), raw),
            f"sub.{name}": Rule("({0} - {1})", (raw, raw), raw),
            f"mul.lo.{name}": Rule("({0} * {1})", (raw, raw), raw),
            f"mul.hi.{name}": Rule("multiply_high({0}, {1})", (kind, kind), kind),
            f"mad.lo.{name}": Rule("({0} * {1} + {2})", (raw, raw, raw), raw),
            f"min.{name}": Rule("np.minimum({0}, {1})", (kind, kind), kind),
            f"max.{name}": Rule("np.maximum({0}, {1})", (kind, kind), kind),
            f"div.{name}": Rule("divide({0}, {1})", (kind, kind), kind),
            f"rem.{name}": Rule("remainder({0}, {1})", (kind, kind), kind),
        }
        if name[0] == "s":
            rules[f"abs.{name}"] = Rule("np.abs({0})", (kind,), kind)
            rules[f"neg.{name}"] = Rule("(-{0})", (raw,), raw)
        if name[1:] != "64":
            wide = f"{kind[0]}{2 * int(kind[1])}"
            product_ = f"{{0}}.astype({wide}) * {{1}}.astype({wide})"
            rules[f"mul.wide.{name}"] = Rule(f"({product_})", (kind, kind), wide)
            rules[f"mad.wide.{name}"] = Rule(f"({product_} + {{2}})", (kind, kind, wide), wide)
    for name, kind in (("s16x2", "2i2"), ("u16x2", "2u2")):
        rules |= {
            f"add.{name}": Rule("({0} + {1})", ("2u2", "2u2"), "2u2"),
            f"min.{name}": Rule("np.minimum({0}, {1})", (kind, kind), kind),
            f"max.{name}": Rule("np.maximum({0}, {1})", (kind, kind), kind),
        }
    return rules


def _bits() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, kind in {"pred": "bool", **_BITS}.items():
        rules |= {
            f"and.{name}": Rule("({0} & {1})", (kind, kind), kind),
            f"or.{name}": Rule("({0} | {1})", (kind, kind), kind),
            f"xor.{name}": Rule("({0} ^ {1})", (kind, kind), kind),
            f"not.{name}": Rule("(~{0})", (kind,), kind),
        }
    for name, kind in _BITS.items():
        rules[f"shl.{name}"] = Rule(_shift("shl", "<<", kind), (kind, "u4"), kind)
    for letter, size in product("bus", (2, 4, 8)):
        kind = f"{'i' if letter == 's' else 'u'}{size}"
        rules[f"shr.{letter}{8 * size}"] = Rule(_shift("shr", ">>", kind), (kind, "u4"), kind)
    for size in (4, 8):
        raw = f"u{size}"
        rules |= {
            f"popc.b{8 * size}": Rule("popcount({0})", (raw,), "u4"),
            f"clz.b{8 * size}": Rule("leading_zeros({0})", (raw,), "u4"),
            f"brev.b{8 * size}": Rule("reverse({0})", (raw,), raw),
            f"bfi.b{8 * size}": Rule("insert({0}, {1}, {2}, {3})", (raw, raw, "u4", "u4"), raw),
        }
        for letter in "us":
            kind = f"{'i' if letter == 's' else 'u'}{size}"
            rules[f"bfe.{letter}{8 * size}"] = Rule(_field(kind), (kind, "u4", "u4"), kind)
    for side, mode in product(("left", "right"), ("wrap", "clamp")):
        amount = "({2} & u4(31))" if mode == "wrap" else "np.minimum({2}, u4(32))"
        text = f"funnel_{side}({{0}}, {{1}}, {amount})"
        rules[f"shf.{side[0]}.{mode}.b32"] = Rule(text, ("u4", "u4", "u4"), "u4")
    rules["lop3.b32"] = Rule(_lop3, ("u4", "u4", "u4", "number"), "u4")
    rules["prmt.b32"] = Rule(_permute, ("u4", "u4", "u4"), "u4")
    return rules


def _comparison() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for name, kind in [(name, TYPES[name]) for name in _INTEGERS] + list(_BITS.items()):
        texts = {relation: _COMPARE[relation] for relation in (("eq", "ne") if name[0] == "b" else _COMPARE)}
        if name[0] == "u":
            texts |= {alias: _COMPARE[relation] for alias, relation in _UNSIGNED_NAMES.items()}
        # The sign changes nothing for eq and ne.
        for relation, text in texts.items():
            read = f"u{kind[1]}" if relation in ("eq", "ne") else kind
            rules |= compare(relation, name, text, read)
    for name in (*_BITS, *_INTEGERS, "f32"):
        raw = f"u{int(name[1:]) // 8}"
        rules[f"selp.{name}"] = Rule("select({2}, {0}, {1})", (raw, raw, "bool"), raw)
    return rules


def compare(relation: str, name: str, text: str, kind: str) -> dict[str, Rule]:
    """PTX ISA, setp: alone, or combined with a predicate; the second destination has the comparison turned round."""
    rules = {f"setp.{relation}.{name}": Rule(text, (kind, kind), "bool", other=f"(~{text})")}
    for word, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        rules[f"setp.{relation}.{word}.{name}"] = Rule(
            f"({text} {sign} {{2}})", (kind, kind, "bool"), "bool", other=f"(~{text} {sign} {{2}})"
        )
    return rules


# --- expressions that depend on a number in the instruction -----------------------------------------------------------


def _shift(function: str, sign: str, kind: str) -> Maker:
    """PTX ISA, shl and shr: the general form only where the amount is a register or beyond the width."""
    width = 8 * int(kind[1])

    def make(parts: Sequence[str], operands: Sequence[Operand], constant: Constant) -> str:
        amount = operands[1]
        if isinstance(amount, Immediate) and 0 <= amount.value < width:
            return f"({parts[0]} {sign} {constant(amount.value, kind)})"
        return f"{function}({parts[0]}, {parts[1]})"

    return make


def _field(kind: str) -> Maker:
    """PTX ISA, bfe: two shifts, where both numbers are in the instruction and the field is inside the register."""
    width = 8 * int(kind[1])

    def make(parts: Sequence[str], operands: Sequence[Operand], constant: Constant) -> str:
        position, length = operands[1:3]
        if not (isinstance(position, Immediate) and isinstance(length, Immediate)):
            return f"bit_field({', '.join(parts)})"
        start, spare = position.value, width - length.value - position.value
        if start < 0 or spare < 0 or length.value <= 0:
            return f"bit_field({', '.join(parts)})"
        text = parts[0]
        if spare:
            text = f"({text} << {constant(spare, kind)})"
        return f"({text} >> {constant(start + spare, kind)})" if start + spare else text

    return make


#: Functions of b and c by their table.
_TWO = {0: "ZERO", 15: "ONES", 0b1100: "b", 0b1010: "c", 0b0011: "~b", 0b0101: "~c", 0b1000: "(b & c)",
        0b1110: "(b | c)", 0b0110: "(b ^ c)", 0b1001: "~(b ^ c)", 0b0111: "~(b & c)", 0b0001: "~(b | c)",
        0b0100: "(b & ~c)", 0b0010: "(~b & c)", 0b1101: "(b | ~c)", 0b1011: "(~b | c)"}  # fmt: skip


def lop3_text(table: int) -> str:
    """An expression of a, b, c (and ZERO, ONES) whose bit is bit ``4 * a + 2 * b + c`` of the table."""
    upper, lower = table >> 4, table & 15
    if upper == lower:
        return f"({_TWO[upper]})"
    if upper == 15 ^ lower:
        return f"(a ^ {_TWO[lower]})" if lower else "a"
    terms = [
        name if other == 15 else f"({name} & {_TWO[other]})" for name, other in (("a", upper), ("~a", lower)) if other
    ]
    return f"({' | '.join(terms)})"


def _lop3(parts: Sequence[str], operands: Sequence[Operand], constant: Constant) -> str:
    """PTX ISA, lop3: any function of three bits."""
    names = {"a": parts[0], "b": parts[1], "c": parts[2]}
    names |= {"ZERO": constant(0, "u4"), "ONES": constant(0xFFFFFFFF, "u4")}
    return re.sub(r"[a-c]|ZERO|ONES", lambda found: names[found[0]], lop3_text(int(parts[3])))


def _permute(parts: Sequence[str], operands: Sequence[Operand], constant: Constant) -> str:
    """PTX ISA, prmt: where the selector is in the instruction, bytes that move by the same way move together."""
    selector = operands[2]
    if not isinstance(selector, Immediate):
        return f"permute({', '.join(parts)})"
    #: The bytes of the result, by (source, how many bytes to the left, whether it is the sign).
    moves: dict[tuple[int, int, bool], int] = {}
    for target in range(4):
        nibble = selector.value >> 4 * target & 15
        move = (nibble >> 2 & 1, target - (nibble & 3), nibble > 7)
        moves[move] = moves.get(move, 0) | 0xFF << 8 * target
    terms = []
    for (source, left, sign), mask in moves.items():
        text = parts[source]
        if left:
            text = f"({text} {'<<' if left > 0 else '>>'} {constant(8 * abs(left), 'u4')})"
        if sign:
            # 0 or 1 in every byte, times 255.
            text = f"(({text} >> {constant(7, 'u4')} & {constant(mask & 0x01010101, 'u4')}) * {constant(255, 'u4')})"
        elif mask != (0xFFFFFFFF << 8 * max(left, 0) & 0xFFFFFFFF) >> 8 * max(-left, 0):
            # A shift leaves the other bytes in place, if it does not push them out.
            text = f"({text} & {constant(mask, 'u4')})"
        terms.append(text)
    return f"({' | '.join(terms)})"


RULES = _arithmetic() | _bits() | _comparison()
