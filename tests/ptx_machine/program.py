"""What a PTX text is made of: instructions with their operands, and the program around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias


class Unknown(NotImplementedError):
    """PTX that this machine does not know."""


@dataclass(frozen=True)
class Register:
    """``index`` in the list of a program's registers; ``width`` in bytes, 0 for a predicate."""

    index: int
    width: int


@dataclass(frozen=True)
class Immediate:
    """A constant; of one that is written as 0f or 0d, the bits as a number."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, a variable; or ``_``, a destination that is dropped."""

    name: str


@dataclass(frozen=True)
class Negated:
    """``!p``: a predicate the other way round."""

    operand: Register


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


#: A list is a vector ``{a, b}``, a tuple a pair of destinations ``a|b``.
Operand: TypeAlias = "Register | Immediate | Symbol | Negated | Address | list[Operand] | tuple[Operand, ...]"


@dataclass
class Instruction:
    """``@guard opcode operands;`` and the line of the Python kernel that it was made for."""

    opcode: str
    operands: list[Operand]
    guard: Register | None = None
    negated: bool = False
    text: str = ""
    line: str = ""

    @property
    def parts(self) -> list[str]:
        """The opcode at its dots."""
        return self.opcode.split(".")

    @property
    def place(self) -> str:
        """The text and the line of the kernel, for messages."""
        return f"{self.text} ({self.line})"


@dataclass
class Program:
    """One entry."""

    name: str = ""
    #: (name, bytes) of every parameter.
    parameters: list[tuple[str, int]] = field(default_factory=list)
    threads: int = 0
    body: list[Instruction] = field(default_factory=list)
    #: The instruction that a label stands before.
    labels: dict[str, int] = field(default_factory=dict)
    #: Special registers such as %tid.x, by name.
    special: dict[str, Register] = field(default_factory=dict)
    #: Of the registers, by index. A name in several scopes is there several times.
    names: list[str] = field(default_factory=list)
    #: Of the source, by the numbers that .loc uses.
    files: dict[int, str] = field(default_factory=dict)
