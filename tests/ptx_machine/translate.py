"""Elementwise instructions as lines of Python on arrays of one number a thread.

``R`` is the list of registers: arrays of bool, uint16, uint32 or uint64, or None where nothing has been written. A line
is ``R[7] = (R[3] + R[4])``; where some threads are off, or the instruction has a guard, it is
``R[7] = keep(mask, R[7], ...)``. Arrays are never changed in place: registers may share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_machine import arithmetic, bits, convert, floats, integers
from ptx_machine.arithmetic import keep
from ptx_machine.kinds import KINDS, SIZES, STORED, TYPES, Rule
from ptx_machine.parse import Immediate, Instruction, Negated, Operand, Register, Symbol, Unknown

__all__ = ["MOVES", "RULES", "SIZES", "STORED", "TYPES", "Translator", "Unknown", "keep"]

#: Every opcode that is known, with all its modifiers; besides mov, which has vectors.
RULES: dict[str, Rule] = integers.RULES | floats.RULES | convert.RULES
#: mov by the bytes of what it moves (PTX ISA, 9.7.9 mov).
MOVES = {f"mov.{name}": size for name, size in {
    "pred": 0, "b16": 2, "u16": 2, "s16": 2, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8,
    "f64": 8}.items()}  # fmt: skip


class Translator:
    """Makes lines for programs of so many threads.

    Attributes:
        names: what the lines need: to be their globals.
        symbols: addresses of variables.
    """

    def __init__(self, threads: int, symbols: dict[str, int]) -> None:
        self.threads, self.symbols = threads, symbols
        self.names: dict[str, Any] = {"np": np}
        for module in (arithmetic, bits):
            self.names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self._constants: dict[tuple[int, str], str] = {}

    def lines(self, ins: Instruction, masked: bool) -> list[str]:
        """Lines of Python that execute it; ``masked``: for the threads of ``mask`` alone.

        Raises:
            Unknown: the instruction is not elementwise, or not known with these modifiers and operands.
        """
        try:
            results = self._mov(ins) if ins.opcode in MOVES else self._results(ins)
        except Unknown as error:
            raise Unknown(f"{ins.text or ins.opcode} ({ins.line}): {error}") from None
        mask = "mask" if masked else ""
        if ins.guard is not None:
            # PTX ISA, 9.3 "Predicated Execution".
            guard = f"{'~' if ins.negated else ''}R[{ins.guard.index}]"
            mask = f"({guard} & mask)" if masked else guard
        lines = []
        for target, expression in results:
            if mask:
                expression = f"keep({mask}, R[{target.index}], {expression})"
            lines.append(f"R[{target.index}] = {expression}")
        return lines

    # --- operands --------------------------------------------------------------------------------------------------

    def constant(self, value: int, kind: str) -> str:
        """The name of an array of it."""
        how = KINDS[kind]
        width = 8 * max(1, how.size)
        # Constants have 64 bits: a negative one may be written in hexadecimal.
        value = value - (1 << 64) if width < 64 and 1 << 63 <= value < 1 << 64 else value
        if (value, kind) not in self._constants:
            if not -(1 << width - 1) <= value < 1 << width:
                raise Unknown(f"{value} has more than {width} bits")
            array = np.full(self.threads, value & ((1 << width) - 1), f"u{width // 8}")
            name = f"c{len(self._constants)}"
            read = how.read.format("array")
            self.names[name] = array.astype(bool) if kind == "bool" else eval(read, {"array": array, **self.names})
            self._constants[value, kind] = name
        return self._constants[value, kind]

    def read(self, operand: Operand, kind: str, extends: bool = False) -> str:
        """An operand as an array of the kind; ``extends``: of a wider register the lower bits."""
        if kind == "number":
            if not isinstance(operand, Immediate) or not 0 <= operand.value < 256:
                raise Unknown("a number of 8 bits has to stand there")
            return str(operand.value)
        if isinstance(operand, Negated) and kind == "bool":
            return f"(~{self.read(operand.operand, kind)})"
        if isinstance(operand, Immediate):
            return self.constant(operand.value, kind)
        if isinstance(operand, Symbol):
            if operand.name not in self.symbols:
                raise Unknown(f"no variable {operand.name}")
            return self.constant(self.symbols[operand.name], kind)
        if not isinstance(operand, Register):
            raise Unknown(f"operand {operand}")
        how, text = KINDS[kind], f"R[{operand.index}]"
        if operand.width != how.size:
            if not extends or not 0 < how.size < operand.width or kind[0] not in "iu":
                raise Unknown(f"a register of {operand.width} bytes is read as {how.size}")
            text = f"{text}.astype(u{how.size})"
        return how.read.format(text)

    def _write(self, target: Register, expression: str, kind: str, extends: bool) -> str:
        """The expression as the register stores it; ``extends``: a wider one takes the sign along."""
        how = KINDS[kind]
        if how.size == target.width:
            return how.write.format(expression)
        if not extends or not 0 < how.size < target.width:
            raise Unknown(f"a register of {target.width} bytes is written with {how.size}")
        if kind[0] == "i":
            return f"{expression}.astype(i{target.width}).view(u{target.width})"
        return f"{how.write.format(expression)}.astype(u{target.width})"

    # --- instructions ----------------------------------------------------------------------------------------------

    def _results(self, ins: Instruction) -> list[tuple[Register, str]]:
        rule = RULES.get(ins.opcode)
        if rule is None:
            raise Unknown("an opcode that is not known here")
        if len(ins.operands) != 1 + len(rule.sources):
            raise Unknown(f"{len(rule.sources)} source operands are known here")
        destination, *operands = ins.operands
        parts = [self.read(o, kind, rule.extends) for o, kind in zip(operands, rule.sources, strict=True)]
        text = rule.text.format(*parts) if isinstance(rule.text, str) else rule.text(parts, operands, self.constant)
        targets, texts = [destination], [text]
        if isinstance(destination, tuple):
            # PTX ISA, setp: p|q.
            if not rule.other or len(destination) != 2:
                raise Unknown("two destinations")
            targets, texts = list(destination), [text, rule.other.format(*parts)]
        return self._targets(targets, texts, rule.result, rule.extends)

    def _mov(self, ins: Instruction) -> list[tuple[Register, str]]:
        """PTX ISA, 9.7.9 mov: of one register, into a vector of its parts, or out of one; the first is the lowest."""
        size = MOVES[ins.opcode]
        if len(ins.operands) != 2:
            raise Unknown("two operands are known here")
        target, source = ins.operands
        whole = STORED[size]
        if isinstance(target, list):
            part, text = self._part(size, len(target)), self.read(source, whole)
            texts = [
                f"({text} >> {self.constant(8 * SIZES[part] * i, whole)})" if i else text for i in range(len(target))
            ]
            return self._targets(target, [f"{text}.astype({part})" for text in texts], part)
        if isinstance(source, list):
            part = self._part(size, len(source))
            texts = [f"{self.read(operand, part)}.astype({whole})" for operand in source]
            texts[1:] = [f"({t} << {self.constant(8 * SIZES[part] * i, whole)})" for i, t in enumerate(texts[1:], 1)]
            return self._targets([target], [f"({' | '.join(texts)})"], whole)
        return self._targets([target], [self.read(source, whole)], whole)

    def _part(self, size: int, count: int) -> str:
        if size % count or size // count not in STORED:
            raise Unknown("parts of a size that no register has")
        return STORED[size // count]

    def _targets(
        self, targets: Sequence[Operand], texts: Sequence[str], kind: str, extends: bool = False
    ) -> list[tuple[Register, str]]:
        """What goes to which register; ``_`` takes nothing."""
        results = []
        for target, text in zip(targets, texts, strict=True):
            if target == Symbol("_"):
                continue
            if not isinstance(target, Register):
                raise Unknown(f"destination {target}")
            results.append((target, self._write(target, text, kind, extends)))
        return results
