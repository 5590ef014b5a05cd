"""An evaluator of the few PTX instructions that the kernels use: inline PTX is tested where there is no GPU.

Registers are numpy arrays of uint32: one lane for each pair of 16-bit words. Semantics are those of the PTX ISA
manual; ``mma.sp`` is in tests/sparse_mma.py.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

_MASK = np.uint32(0xFFFFFFFF)
#: Random registers for every operand.
_LANES = 4096


class InlinePtx(NamedTuple):
    """One ``tl.inline_asm_elementwise`` call as it stands in the source."""

    dtype: str
    text: str
    constraints: str
    #: How many elements of every operand one execution takes, in registers that follow each other.
    pack: int
    operands: int
    #: Bits of the elements of each result.
    widths: tuple[int, ...]


def inline_ptx(function: Any) -> list[InlinePtx]:
    """The inline PTX of a ``@triton.jit`` function, read from its source."""
    return [_read(call) for call in _calls(ast.parse(inspect.getsource(function.fn)))]


def packed_ptx(path: Path) -> dict[str, InlinePtx]:
    """The inline PTX of a file that takes several elements at a time, by the line it stands in."""
    calls = _calls(ast.parse(path.read_text()))
    return {f"{path.name}:{c.lineno}": _read(c) for c in calls if ast.literal_eval(_keyword(c, "pack")) > 1}


def _calls(tree: ast.AST) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if getattr(call.func, "attr", "") == "inline_asm_elementwise"]


def _keyword(call: ast.Call, name: str) -> ast.expr:
    return next(k.value for k in call.keywords if k.arg == name)


def _read(call: ast.Call) -> InlinePtx:
    dtype = _keyword(call, "dtype")
    dtypes: list[Any] = dtype.elts if isinstance(dtype, ast.Tuple) else [dtype]
    text, constraints = (ast.literal_eval(argument) for argument in call.args[:2])
    operands: Any = call.args[2]
    widths = tuple(int(re.findall(r"\d+", d.attr)[0]) for d in dtypes)
    pack = ast.literal_eval(_keyword(call, "pack"))
    return InlinePtx(dtypes[0].attr, text, constraints, pack, len(operands.elts), widths)


def treats_elements_alike(ptx: InlinePtx) -> bool:
    """Whether an element's results follow from the element alone, wherever in its registers it is and beside what.

    For random operands. Their elements have one width, which the number of registers tells.
    """
    registers = ptx.constraints.count(",") + 1 - ptx.constraints.count("=")
    width = 32 * registers // (ptx.pack * ptx.operands)
    shape = (ptx.operands, _LANES, ptx.pack)
    operands = np.random.default_rng(0).integers(0, 1 << width, shape, np.uint64).astype(f"u{width // 8}")
    results = _on_elements(ptx, operands)
    for place in range(ptx.pack):
        alone = _on_elements(ptx, np.repeat(operands[..., place, None], ptx.pack, -1))
        if any((a != r[:, place, None]).any() for a, r in zip(alone, results, strict=True)):
            return False
    return True


def _on_elements(ptx: InlinePtx, operands: np.ndarray) -> list[np.ndarray]:
    """The results ``[lanes, pack]`` for operands ``[n, lanes, pack]``, elements packed from the lowest bits on."""
    inputs = [register for o in operands for register in np.ascontiguousarray(o).view(np.uint32).T]
    outputs = [np.broadcast_to(o, _LANES) for o in evaluate(ptx.text, ptx.constraints, *inputs)]
    results = []
    for width in ptx.widths:
        count = ptx.pack * width // 32
        parts, outputs = outputs[:count], outputs[count:]
        results.append(np.stack(parts, -1).astype(np.uint32).view(f"u{width // 8}"))
    assert not outputs, "results that fill no register are not known here"
    return results


def evaluate(text: str, constraints: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """Runs the text on its inputs; returns its outputs in order.

    Raises:
        NotImplementedError: an instruction this does not know.
    """
    outputs = constraints.count("=")
    registers: dict[str, np.ndarray] = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    text = text.strip()
    for statement in (text[1:-1] if text.startswith("{") else text).split(";"):
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
    if op == "mul.lo.u32":
        return sources[0] * sources[1]
    if op in ("add.f16x2", "fma.rn.f16x2", "fma.rn.bf16x2"):
        return _halves(op, sources)
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


def _halves(op: str, sources: list[np.ndarray]) -> np.ndarray:
    """``a + b`` or ``a * b + c`` of both numbers of a register, rounded once."""
    dtype = torch.bfloat16 if op.endswith("bf16x2") else torch.float16
    lanes = np.broadcast_arrays(*sources)
    numbers = [torch.from_numpy(lane.astype(np.uint32).view(np.int16)).view(dtype).double() for lane in lanes]
    result = numbers[0] + numbers[1] if op.startswith("add") else numbers[0] * numbers[1] + numbers[2]
    # Numbers as small as codes are exact in float32, so that they are rounded once.
    return result.to(dtype).view(torch.int16).numpy().view(np.uint32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte ``i`` of the result is the byte of ``(b, a)`` that nibble ``i`` of the selector names.

    The highest bit of a nibble asks for the byte's sign, eight times.
    """
    pool = np.stack(
        np.broadcast_arrays(*[(source >> np.uint32(8 * i)) & np.uint32(0xFF) for source in (a, b) for i in range(4)])
    )
    result = np.zeros_like(pool[0])
    for i in range(4):
        nibble = np.broadcast_to((selector >> np.uint32(4 * i)) & np.uint32(0xF), result.shape)
        byte = np.take_along_axis(pool, (nibble & 7)[None].astype(np.int64), 0)[0]
        byte = np.where(nibble & 8, (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
        result = result | (byte << np.uint32(8 * i))
    return result


def interpret_inline_ptx(monkeypatch: pytest.MonkeyPatch, run: Any = None) -> None:
    """Lets Triton's interpreter run inline PTX by :func:`evaluate`; ``run(text, registers)`` has what is not for that.

    As Triton does, ``pack`` neighbours of every operand are in registers that follow each other.
    """
    from triton.runtime import interpreter

    class Results:
        def __init__(self, handles: list[Any]) -> None:
            self.handles = handles

        def get_result(self, index: int) -> Any:
            return self.handles[index]

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: list[Any], types: list[Any], is_pure: bool, pack: int
    ) -> Results:
        shape = values[0].data.shape
        registers: list[np.ndarray] = []
        for value in values:
            flat = np.ascontiguousarray(value.data).reshape(-1, pack)
            registers += list(flat.view(np.uint32).T)
        outputs = run(text, registers) if run is not None else None
        if outputs is None:
            outputs = evaluate(text, constraints, *registers)
        handles = []
        for result in types:
            kind = result.scalar if hasattr(result, "scalar") else result
            count = pack * kind.primitive_bitwidth // 32
            parts, outputs = outputs[:count], outputs[count:]
            numbers = np.stack(np.broadcast_arrays(*parts), -1).astype(np.uint32)
            kinds = {"fp32": np.float32, "int32": np.int32, "int16": np.int16, "fp16": np.float16}
            handles.append(interpreter.TensorHandle(numbers.view(kinds[str(kind)]).reshape(shape), kind))
        return Results(handles)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
