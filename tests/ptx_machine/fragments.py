"""Matrix instructions of a warp: which thread holds which number, and the products in float64.

PTX ISA, "Matrix Fragments for mma.m16n8k16" and its like. A register of 32 bits holds ``PACKED`` numbers; a thread is
``4 * group + quad``. A tensor core keeps fewer bits of a running sum than float64; products are exact in both.
"""

from __future__ import annotations

import numpy as np

from ptx_machine import arithmetic
from ptx_machine.memory import Array, Fault

#: Numbers of a 32-bit register.
PACKED = {"f16": 2, "bf16": 2, "s8": 4, "e4m3": 4, "tf32": 1}


def unpack(register: Array, kind: str) -> Array:
    """``[threads, PACKED[kind]]`` in float64, the lowest bits first."""
    register = np.ascontiguousarray(register)
    if kind == "f16":
        numbers = register.view(np.float16)
    elif kind == "bf16":
        numbers = arithmetic.from_bf16(register.view(np.uint16))
    elif kind == "s8":
        numbers = register.view(np.int8)
    elif kind == "e4m3":
        numbers = arithmetic.from_e4m3(register.view(np.uint8))
    else:
        numbers = arithmetic.tf32(register.view(np.float32))
    return numbers.astype(np.float64).reshape(-1, PACKED[kind])


def left(registers: list[Array], kind: str) -> Array:
    """A ``[warps, 16, 8 * PACKED]`` of four registers: rows g and g + 8, then the same in the second half of K."""
    count = PACKED[kind]
    # [half of K, rows, warp, group, quad, number]
    numbers = np.stack([unpack(r, kind) for r in registers]).reshape(2, 2, -1, 8, 4, count)
    return numbers.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 8 * count)


def right(registers: list[Array], kind: str) -> Array:
    """B ``[warps, 4 * PACKED * len(registers), 8]``."""
    count = PACKED[kind]
    # [part of K, warp, group, quad, number]
    numbers = np.stack([unpack(r, kind) for r in registers]).reshape(len(registers), -1, 8, 4, count)
    return numbers.transpose(1, 0, 3, 4, 2).reshape(-1, 4 * count * len(registers), 8)


def sums(registers: list[Array], integers: bool) -> Array:
    """C ``[warps, 16, n]`` in float64, of ``n / 2`` registers of one float32, or int32, each.

    Register i has the rows g and g + 8, and the columns 8 (i // 4) + 2 q + i % 2.
    """
    numbers = np.stack(registers).view(np.int32 if integers else np.float32).astype(np.float64)
    # [eight columns, rows, one of two columns, warp, group, quad]
    parts = numbers.reshape(-1, 2, 2, numbers.shape[1] // 32, 8, 4)
    return parts.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, len(registers) * 2)


def from_sums(matrix: Array, integers: bool) -> list[Array]:
    """The registers of :func:`sums`; integers saturate (PTX ISA, "mma", .satfinite)."""
    matrix = np.clip(matrix, -(2**31), 2**31 - 1).astype(np.int32) if integers else matrix.astype(np.float32)
    columns = matrix.shape[2]
    parts = matrix.reshape(-1, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return list(np.ascontiguousarray(parts).reshape(columns // 2, -1).view(np.uint32))


@np.errstate(invalid="ignore", over="ignore")
def mma(kind: str, c: list[Array], a: list[Array], b: list[Array]) -> list[Array]:
    """D = A B + C, 16 x 8 numbers of every warp in four registers."""
    integers = kind == "s8"
    return from_sums(sums(c, integers) + left(a, kind) @ right(b, kind), integers)


@np.errstate(invalid="ignore", over="ignore")
def mma_sp(kind: str, c: list[Array], a: list[Array], b: list[Array], metadata: Array, selector: int) -> list[Array]:
    """:func:`mma` of m16n8k32 with a 2:4 A: of every four columns two are stored, and 2 bits for the place of each.

    PTX ISA, "Matrix Fragments for sparse mma.m16n8k32" and "Sparse matrix storage". Of a row's four threads,
    ``2 * selector`` and the next have the metadata of the first and the second half of K.
    """
    kept = left(a, kind)
    warps = len(kept)
    words = metadata.reshape(warps, 32)
    dense = np.zeros((warps, 16, 32))
    for group in range(8):
        holder = 4 * np.arange(8) + 2 * selector + group // 4
        for half in range(2):
            nibble = words[:, holder] >> np.uint32(16 * half + 4 * (group % 4)) & np.uint32(15)
            first, second = (nibble & 3).astype(int), (nibble >> 2).astype(int)
            if (first >= second).any():
                raise Fault("mma.sp: the metadata of a group of four is not in order")
            rows, where = np.arange(8) + 8 * half, np.arange(warps)[:, None]
            dense[where, rows, 4 * group + first] = kept[:, rows, 2 * group]
            dense[where, rows, 4 * group + second] = kept[:, rows, 2 * group + 1]
    return from_sums(sums(c, False) + dense @ right(b, kind), False)


def from_rows(rows: Array, warps: int, count: int, transposed: bool) -> list[Array]:
    """Rows of 16 bytes ``[warps * 8 * count, 16]`` -> a register for each 8 x 8 matrix (PTX ISA, "ldmatrix")."""
    matrices = rows.view(np.uint16).reshape(warps, count, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    pairs = np.ascontiguousarray(matrices).view(np.uint32)
    return [pairs[:, i].reshape(-1).copy() for i in range(count)]


def to_rows(registers: list[Array], warps: int, transposed: bool) -> Array:
    """The inverse of :func:`from_rows` (PTX ISA, "stmatrix")."""
    matrices = np.stack([r.reshape(warps, 8, 4) for r in registers], 1).view(np.uint16)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    return np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
