"""The kinds of numbers in registers: how lines of Python read and write them.

A register is an array of one number a thread: bool, uint16, uint32 or uint64. A kind is numpy's name of what an
instruction sees in those bits, or one of this package's own: ``bf`` for a bfloat16, ``2f2`` for two float16 in one
register.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ptx_machine.parse import Operand

#: numpy's name of the bits of one number by the PTX type (PTX ISA, 5.2 "Types"); bfloat16 is known by its bits.
TYPES = {"s8": "i1", "u8": "u1", "b8": "u1", "s16": "i2", "u16": "u2", "b16": "u2", "s32": "i4", "u32": "u4",
         "b32": "u4", "s64": "i8", "u64": "u8", "b64": "u8", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2",
         "bf16x2": "u2", "f16x2": "f2", "s16x2": "i2", "pred": "bool"}  # fmt: skip
#: Bytes of one number; a predicate has none.
SIZES = {"u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8, "f8": 8, "bool": 0}
#: What a register of so many bytes is stored as.
STORED = {0: "bool", 1: "u1", 2: "u2", 4: "u4", 8: "u8"}


@dataclass(frozen=True)
class Kind:
    """How a kind is had from the unsigned number that holds its bits, and how it is put back."""

    size: int
    read: str = "{}"
    write: str = "{}"


def _view(size: int, kind: str) -> Kind:
    return Kind(size, f"{{}}.view({kind})", f"{{}}.view(u{size})")


#: A result of kind f2 or bf goes through a function: NaN becomes the canonical one there.
KINDS = {
    "bool": Kind(0),
    **{f"u{size}": Kind(size) for size in (1, 2, 4, 8)},
    **{f"i{size}": _view(size, f"i{size}") for size in (1, 2, 4, 8)},
    "f4": _view(4, "f4"),
    "f8": _view(8, "f8"),
    "f2": Kind(2, "{}.view(f2)", "bits_f2({})"),
    "bf": Kind(2, "from_bf16({})", "to_bf16({})"),
    "2i2": _view(4, "i2"),
    "2u2": _view(4, "u2"),
    "2u1": _view(2, "u1"),
    "2f2": Kind(4, "{}.view(f2)", "bits_f2({}).view(u4)"),
    "2bf": Kind(4, "from_bf16({}.view(u2))", "to_bf16({}).view(u4)"),
    "2f4": _view(8, "f4"),
}

#: Name of an array of a constant: ``constant(value, kind)``.
Constant = Callable[[int, str], str]
#: Makes an expression of those of the operands, where it depends on a number that is written in the instruction.
Maker = Callable[[Sequence[str], Sequence[Operand], Constant], str]


@dataclass(frozen=True)
class Rule:
    """One opcode with all its modifiers.

    Attributes:
        text: the expression, with ``{0}`` for the first source operand.
        sources: the kinds that the source operands are read as.
        result: the kind of the expression.
        extends: whether registers may be wider than the types: sources are cut, results extended (``cvt``).
        other: the expression of the second destination, if there is one (``setp``).
    """

    text: str | Maker
    sources: tuple[str, ...]
    result: str
    extends: bool = False
    other: str = ""
