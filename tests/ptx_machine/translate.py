"""Elementwise instructions as lines of Python on arrays of one number a thread.

``R`` is the list of registers: arrays of bool, uint16, uint32 or uint64, or None where nothing has been written. A
line is ``R[7] = (R[3].view(i4) + R[4].view(i4)).view(u4)``; where some threads are off, or the instruction has a guard,
it is ``R[7] = keep(mask, R[7], ...)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx_machine import arithmetic as nb
from ptx_machine.parse import Immediate, Instruction, Register, Symbol

#: numpy's name of a PTX type, in generated lines; bf16 is handled by its bits.
TYPES = {"s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4",
         "b32": "u4", "s64": "i8", "u64": "u8", "b64": "u8", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2",
         "bf16x2": "u2", "f16x2": "f2", "s16x2": "i2", "pred": "bool"}  # fmt: skip
STORED = {0: "bool", 1: "u1", 2: "u2", 4: "u4", 8: "u8"}
SIZES = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8, "bool": 0}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
           "hs": ">="}  # fmt: skip
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
#: Modifiers that change nothing here: the default rounding, or a promise.
IGNORED = {"rn", "lo", "wrap"}


class Unknown(NotImplementedError):
    """An instruction that this machine does not know."""


class Translator:
    def __init__(self, threads: int, symbols: dict[str, int]) -> None:
        self.threads, self.symbols = threads, symbols
        self.names: dict[str, Any] = {name: getattr(nb, name) for name in dir(nb) if not name.startswith("_")}
        self.names |= {"np": np, "where": np.where, "keep": keep}
        self.constants: dict[tuple[int, str], str] = {}

    def constant(self, value: int, kind: str) -> str:
        if (value, kind) not in self.constants:
            size = max(1, SIZES[kind])
            bits = np.full(self.threads, value & ((1 << 8 * size) - 1), getattr(np, f"uint{8 * size}"))
            name = f"c{len(self.constants)}"
            self.names[name] = bits.astype(bool) if kind == "bool" else bits.view(self.names[kind])
            self.constants[value, kind] = name
        return self.constants[value, kind]

    def read(self, operand: object, kind: str) -> str:
        """An operand as an array of ``kind``; a register that is wider is cut, as a cvt does."""
        if isinstance(operand, tuple) and operand[0] == "!":
            return f"(~{self.read(operand[1], kind)})"
        if isinstance(operand, Immediate):
            return self.constant(operand.value, kind)
        if isinstance(operand, Symbol):
            return self.constant(self.symbols[operand.name], kind)
        assert isinstance(operand, Register), operand
        stored = STORED[operand.width]
        if stored == kind:
            return f"R[{operand.index}]"
        if SIZES[kind] < operand.width and not kind.startswith("f"):
            return f"R[{operand.index}].astype({kind})"
        return f"R[{operand.index}].view({kind})"

    def write(self, target: Register, expression: str, kind: str) -> str:
        """The expression as the register stores it: wider registers take the sign along."""
        stored = STORED[target.width]
        if kind == stored:
            return expression
        if SIZES[kind] == target.width:
            return f"{expression}.view({stored})"
        assert SIZES[kind] <= target.width, (kind, target)
        signed = f"i{target.width}"
        return f"{expression}.astype({signed}).view({stored})" if kind[0] == "i" else f"{expression}.astype({stored})"

    # --- one instruction -------------------------------------------------------------------------------------------

    def lines(self, ins: Instruction, masked: bool) -> list[str]:
        """Raises Unknown where the instruction is not elementwise or not known."""
        results = self.results(ins)
        mask = "mask" if masked else None
        if ins.guard is not None:
            guard = f"{'~' if ins.negated else ''}R[{ins.guard.index}]"
            mask = f"({guard} & mask)" if masked else guard
        lines = []
        for target, expression in results:
            if target == Symbol("_"):
                continue
            assert isinstance(target, Register), ins.text
            if mask:
                expression = f"keep({mask}, R[{target.index}], {expression})"
            lines.append(f"R[{target.index}] = {expression}")
        return lines

    def results(self, ins: Instruction) -> list[tuple[Any, str]]:
        head, *modifiers = ins.parts
        modifiers = [m for m in modifiers if m not in IGNORED or (head in ("cvt", "mul", "mad"))]
        if head == "mov":
            return self.mov(ins)
        if head == "cvt":
            return [(ins.operands[0], self.write(ins.operands[0], *self.cvt(ins, modifiers)))]
        if head == "setp":
            return self.setp(ins, modifiers)
        expression, kind = self.value(head, modifiers, ins.operands[1:], ins)
        return [(ins.operands[0], self.write(ins.operands[0], expression, kind))]

    def mov(self, ins: Instruction) -> list[tuple[Any, str]]:
        target, source = ins.operands
        if isinstance(source, list):
            size = target.width // len(source)
            kind = STORED[size]
            parts = ", ".join(self.read(part, kind) for part in source)
            return [(target, f"np.stack(({parts}), 1).reshape(-1).view({STORED[target.width]})")]
        if isinstance(target, list):
            size = source.width // len(target)
            text = f"{self.read(source, STORED[source.width])}.view({STORED[size]})"
            return [(part, f"{text}[{i}::{len(target)}].copy()") for i, part in enumerate(target)]
        return [(target, self.read(source, STORED[target.width]))]

    def setp(self, ins: Instruction, modifiers: list[str]) -> list[tuple[Any, str]]:
        kind = TYPES[modifiers[-1]]
        a, b = (self.read(operand, kind) for operand in ins.operands[1:3])
        relation = modifiers[0]
        if relation == "num":
            text = f"~(np.isnan({a}) | np.isnan({b}))"
        elif relation == "nan":
            text = f"(np.isnan({a}) | np.isnan({b}))"
        elif kind[0] == "f" and relation.endswith("u"):
            text = f"(({a} {COMPARE[relation[:-1]]} {b}) | np.isnan({a}) | np.isnan({b}))"
        elif kind[0] == "f" and relation == "ne":
            # Ordered: false where one is NaN.
            text = f"(({a} < {b}) | ({a} > {b}))"
        else:
            text = f"({a} {COMPARE[relation]} {b})"
        if len(modifiers) == 3:
            text = f"({text} {INFIX[modifiers[1]]} {self.read(ins.operands[3], 'bool')})"
        target = ins.operands[0]
        if isinstance(target, tuple):
            return [(target[0], text), (target[1], f"~{text}")]
        return [(target, text)]

    def cvt(self, ins: Instruction, modifiers: list[str]) -> tuple[str, str]:
        *how, to, source = modifiers
        operands = ins.operands[1:]
        if to == "f16x2" and source == "f32":
            high, low = (f"{self.read(o, 'f4')}.astype(f2)" for o in operands)
            return f"np.stack(({low}, {high}), 1).reshape(-1).view(u4)", "u4"
        if to == "bf16x2" and source == "f32":
            high, low = (f"to_bf16({self.read(o, 'f4')})" for o in operands)
            return f"np.stack(({low}, {high}), 1).reshape(-1).view(u4)", "u4"
        if to == "e4m3x2" and source == "f32":
            assert "satfinite" in how
            high, low = (f"to_e4m3({self.read(o, 'f4')})" for o in operands)
            return f"np.stack(({low}, {high}), 1).reshape(-1).view(u2)", "u2"
        (operand,) = operands
        if to == "f16x2" and source == "e4m3x2":
            text = f"from_e4m3({self.read(operand, 'u2')}.view(u1)).astype(f2)"
            return f"{text}.view(u4)", "u4"
        if to == "tf32":
            assert how == ["rna"]
            return f"to_tf32({self.read(operand, 'f4')})", "u4"
        kind, target = TYPES[source], TYPES[to]
        text = self.read(operand, kind)
        if source == "bf16":
            text, kind = f"from_bf16({text})", "f4"
        if to == "bf16":
            if "rn" not in how or kind in ("f2", "f8"):
                raise Unknown(ins.text)
            return f"to_bf16({text if kind == 'f4' else f'odd_f4({text}.astype(f8))'})", "u2"
        if kind[0] == "f" and target[0] in "iu":
            if how[0] not in ("rzi", "rni"):
                raise Unknown(ins.text)
            low, high = np.iinfo(getattr(nb, target)).min, np.iinfo(getattr(nb, target)).max
            rounded = f"{'np.trunc' if how[0] == 'rzi' else 'np.rint'}({text}.astype(f8))"
            return f"np.clip(np.nan_to_num({rounded}, nan=0.0), {low}, {high}).astype({target})", target
        if kind[0] in "iu" and target[0] in "iu" and ("sat" in how):
            raise Unknown(ins.text)
        if kind[0] == "f" and target[0] == "f" and SIZES[target] < SIZES[kind] and "rn" not in how:
            raise Unknown(ins.text)
        return f"{text}.astype({target})", target

    def value(self, head: str, modifiers: list[str], operands: list[object], ins: Instruction) -> tuple[str, str]:
        """An expression and the kind of its result."""
        name = modifiers[-1] if modifiers else ""
        if name not in TYPES:
            raise Unknown(ins.text)
        rest, kind = modifiers[:-1], TYPES[name]
        unsigned = kind.replace("i", "u") if kind[0] == "i" else kind
        if head == "abs" and name in ("f16", "f16x2", "bf16", "bf16x2"):
            size = "u4" if name.endswith("x2") else "u2"
            return f"({self.read(operands[0], size)} & {size}({'0x7FFF7FFF' if size == 'u4' else '0x7FFF'}))", size
        if head == "neg" and name in ("f16x2", "bf16x2"):
            return f"({self.read(operands[0], 'u4')} ^ u4(0x80008000))", "u4"
        if name == "bf16" and head == "neg":
            return f"({self.read(operands[0], 'u2')} ^ u2(0x8000))", "u2"
        if name.startswith("bf16") and head in ("add", "sub", "mul", "fma", "max", "min"):
            two = name == "bf16x2"
            parts = [self.pairs(o) if two else self.read(o, "u2") for o in operands]
            if head == "fma":
                text = f"fma_bf16({', '.join(parts)})"
            elif head in INFIX:
                a, b = (f"from_bf16({part})" for part in parts)
                text = f"to_bf16({a} {INFIX[head]} {b})"
            else:
                raise Unknown(ins.text)
            return (f"{text}.view(u4)", "u4") if two else (text, "u2")
        if name.endswith("x2"):
            parts = [self.pairs(o, kind) for o in operands]
            if head == "fma":
                return f"fma_f2({', '.join(parts)}).view(u4)", "u4"
            if head in ("add", "sub", "mul"):
                return f"({parts[0]} {INFIX[head]} {parts[1]}).view(u4)", "u4"
            raise Unknown(ins.text)
        if head in ("mul", "mad") and rest and rest[0] == "wide":
            wide = f"{kind[0]}{2 * SIZES[kind]}"
            product = f"{self.read(operands[0], kind)}.astype({wide}) * {self.read(operands[1], kind)}.astype({wide})"
            if head == "mad":
                product = f"{product} + {self.read(operands[2], wide)}"
            return f"({product})", wide
        if head in INFIX and not (head == "mul" and rest[:1] == ["hi"]):
            if set(rest) - IGNORED:
                raise Unknown(ins.text)
            a, b = (self.read(o, unsigned) for o in operands)
            return f"({a} {INFIX[head]} {b})", unsigned
        if head == "shf" and rest[0] == "l":
            return f"funnel_left({', '.join(self.read(o, 'u4') for o in operands)})", "u4"
        if set(rest) - IGNORED:
            raise Unknown(ins.text)
        if head == "mad":
            a, b, c = (self.read(o, unsigned) for o in operands)
            return f"({a} * {b} + {c})", unsigned
        if head == "fma":
            parts = ", ".join(self.read(o, kind) for o in operands)
            return f"fma_{kind}({parts})", kind
        if head == "neg":
            return (
                (f"(-{self.read(operands[0], kind)})", kind)
                if kind[0] == "f"
                else (f"(~{self.read(operands[0], unsigned)} + {unsigned}(1))", unsigned)
            )
        if head == "not":
            return f"(~{self.read(operands[0], kind)})", kind
        if head == "abs":
            return f"np.abs({self.read(operands[0], kind)})", kind
        if head in ("min", "max"):
            call = f"f{head}" if kind[0] == "f" else f"{head}imum"
            return f"np.{call}({self.read(operands[0], kind)}, {self.read(operands[1], kind)})", kind
        if head in ("shl", "shr"):
            return self.shift(head, operands, kind)
        if head == "selp":
            a, b = (self.read(o, kind) for o in operands[:2])
            return f"where({self.read(operands[2], 'bool')}, {a}, {b})", kind
        if head == "div":
            a, b = (self.read(o, kind) for o in operands)
            return (f"({a} / {b})" if kind[0] == "f" else f"divide({a}, {b})"), kind
        if head == "rem":
            a, b = (self.read(o, kind) for o in operands)
            return f"({a} - divide({a}, {b}) * {b})", kind
        if head == "sqrt":
            return f"np.sqrt({self.read(operands[0], kind)})", kind
        if head == "popc":
            return f"popcount({self.read(operands[0], kind)})", "u4"
        if head == "bfe":
            a = self.read(operands[0], kind)
            return f"bit_field({a}, {self.read(operands[1], 'u4')}, {self.read(operands[2], 'u4')})", kind
        if head == "lop3":
            return self.lop3(operands), "u4"
        if head == "prmt":
            a, b, selector = (self.read(o, "u4") for o in operands)
            return f"permute({a}, {b}, {selector})", "u4"
        raise Unknown(ins.text)

    def pairs(self, operand: object, kind: str = "u2") -> str:
        text = self.read(operand, "u4")
        return f"{text}.view({kind})"

    def shift(self, head: str, operands: list[object], kind: str) -> tuple[str, str]:
        a, amount = self.read(operands[0], kind), operands[1]
        if isinstance(amount, Immediate) and 0 <= amount.value < 8 * SIZES[kind]:
            return f"({a} {'<<' if head == 'shl' else '>>'} {kind}({amount.value}))", kind
        return f"{head}({a}, {self.read(amount, 'u4')})", kind

    def lop3(self, operands: list[object]) -> str:
        """Bit ``4 * a + 2 * b + c`` of the table, for every bit."""
        table = operands[3].value
        names = dict(zip("abc", (self.read(o, "u4") for o in operands[:3]), strict=True))
        upper, lower = _TWO[table >> 4], _TWO[table & 15]
        if upper == lower:
            text = upper
        elif table >> 4 == 15 ^ (table & 15):
            text = f"(a ^ {lower})"
        else:
            terms = [t for t in (_and("a", upper), _and("~a", lower)) if t]
            text = f"({' | '.join(terms)})"
        truth = eval(text, {"a": 0xF0, "b": 0xCC, "c": 0xAA, "ONES": 0xFF, "ZERO": 0}) & 0xFF
        assert truth == table, (text, table)
        out = ""
        for character in text:
            out += names.get(character, character)
        return out.replace("ONES", "u4(0xFFFFFFFF)").replace("ZERO", "u4(0)")


def _and(a: str, other: str) -> str:
    return "" if other == "ZERO" else a if other == "ONES" else f"({a} & {other})"


#: Functions of b and c by their table.
_TWO = {0: "ZERO", 15: "ONES", 0b1100: "b", 0b1010: "c", 0b0011: "~b", 0b0101: "~c", 0b1000: "(b & c)",
        0b1110: "(b | c)", 0b0110: "(b ^ c)", 0b1001: "(~(b ^ c))", 0b0111: "(~(b & c))", 0b0001: "(~(b | c))",
        0b0100: "(b & ~c)", 0b0010: "(~b & c)", 0b1101: "(b | ~c)", 0b1011: "(~b | c)"}  # fmt: skip


def keep(mask: np.ndarray, old: np.ndarray | None, new: np.ndarray) -> np.ndarray:
    """``new`` where the mask is; what was never written holds a pattern that is no plausible number."""
    if old is None:
        pattern = 0xDEADBEEFDEADBEEF & ((1 << 8 * new.itemsize) - 1)
        old = np.full(new.shape, new.dtype != bool and pattern, new.dtype)
    return np.where(mask, new, old)
