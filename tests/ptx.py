"""An evaluator of the few PTX instructions that the decoders use: inline PTX is tested where there is no GPU.

Registers are numpy arrays of uint32: one lane for each pair of 16-bit words. Semantics are those of the PTX ISA
manual.
"""

from __future__ import annotations

import ast
import inspect
import re
from typing import Any, NamedTuple

import numpy as np
import torch

_MASK = np.uint32(0xFFFFFFFF)


class InlinePtx(NamedTuple):
    """One ``tl.inline_asm_elementwise`` call as it stands in the source."""

    dtype: str
    text: str
    constraints: str


def inline_ptx(function: Any) -> list[InlinePtx]:
    """The inline PTX of a ``@triton.jit`` function, read from its source."""
    tree = ast.parse(inspect.getsource(function.fn))
    calls = [
        c for c in ast.walk(tree) if isinstance(c, ast.Call) and getattr(c.func, "attr", "") == "inline_asm_elementwise"
    ]
    found = []
    for call in calls:
        dtype = next(k.value for k in call.keywords if k.arg == "dtype")
        first = dtype.elts[0] if isinstance(dtype, ast.Tuple) else dtype
        text, constraints = (argument.value for argument in call.args[:2])  # type: ignore[attr-defined]
        found.append(InlinePtx(first.attr, text, constraints))  # type: ignore[attr-defined]
    return found


def evaluate(text: str, constraints: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """Runs the text on its inputs; returns its outputs in order.

    Raises:
        NotImplementedError: an instruction this does not know.
    """
    outputs = constraints.count("=")
    registers: dict[str, np.ndarray] = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    for statement in text.strip().strip("{}").split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        op, operands = statement.split(None, 1)
        target, *sources = [operand.strip() for operand in operands.split(",")]
        registers[target] = _execute(op, [_value(registers, source) for source in sources])
    return [registers[f"${i}"] for i in range(outputs)]


def _value(registers: dict[str, np.ndarray], operand: str) -> np.ndarray:
    if re.fullmatch(r"0x[0-9A-Fa-f]+|\d+", operand):
        return np.array(int(operand, 0), dtype=np.uint32)
    return registers[operand]


def _execute(op: str, sources: list[np.ndarray]) -> np.ndarray:
    if op == "shr.u32":
        return sources[0] >> sources[1]
    if op == "shl.b32":
        return (sources[0] << sources[1]) & _MASK
    if op == "and.b32":
        return sources[0] & sources[1]
    if op == "mov.b32":
        return sources[0]
    if op == "fma.rn.bf16x2":
        return _fma_bf16x2(*sources)
    if op == "lop3.b32":
        return _lop3(*sources)
    if op == "prmt.b32":
        return _prmt(*sources)
    raise NotImplementedError(f"PTX instruction {op}")


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Bit ``4*a + 2*b + c`` of the table, for every bit."""
    result = np.zeros_like(a)
    for index in range(8):
        if int(table) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result & _MASK


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte ``i`` of the result is the byte of ``(b, a)`` that nibble ``i`` of the selector names.

    The highest bit of a nibble asks for the byte's sign, eight times.
    """
    pool = [(source >> np.uint32(8 * i)) & np.uint32(0xFF) for source in (a, b) for i in range(4)]
    result = np.zeros_like(a)
    for i in range(4):
        nibble = int(selector) >> (4 * i) & 0xF
        byte = pool[nibble & 7]
        if nibble & 8:
            byte = (byte >> np.uint32(7)) * np.uint32(0xFF)
        result = result | (byte << np.uint32(8 * i))
    return result


def _fma_bf16x2(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a * b + c`` of both halves, rounded once, subnormals as they are.

    float64 holds the product of two bfloat16 and, where c is zero, the sum; torch rounds it to bfloat16.
    """
    result = np.zeros(np.broadcast(a, b, c).shape, dtype=np.uint32)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y, z = (((t >> shift) << np.uint32(16)).view(np.float32).astype(np.float64) for t in (a, b, c))
        assert not z.any(), "a sum that needs more bits than float64 has"
        half = torch.from_numpy(np.asarray(x * y + z)).to(torch.bfloat16).view(torch.int16)
        result |= half.numpy().view(np.uint16).astype(np.uint32) << shift
    return result
