# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: SIM300 - upper case names are constexprs, not constants
"""Decoders: the words of one block of 128 along K -> planes of numbers, in registers.

A decoder is ``(words, zeros, PTX, DT) -> tuple of planes``: plane ``j`` holds ``code - zeros[j]`` in the dtype
``DT``, exactly (or a power of two of it: :attr:`Decoder.units`), for as many columns as ``words`` has. ``zeros[j]`` is
a number, or a column ``[rows, 1]`` of ``DT`` where zero points are stored. The kernels take it as a ``tl.constexpr``,
so one loop serves every format. PTX says whether inline PTX may be used: not in the interpreter, not on AMD; every
decoder says the same in plain Triton. Those of 8-bit floats are in :mod:`qlinear.kernels.e4m3`.

The common trick is a number whose exponent makes the low mantissa bits worth one each, so that a code is converted
by writing its bits there and subtracting: 0x6400 is 1024 in fp16 (10 bits), 0x4300 is 128 in bf16 (7 bits),
0x4B000000 is 2**23 in fp32. FasterTransformer and AWQ use it for fp16 (Kim et al., "Who Says Elephants Can't Run",
2022), Marlin for bf16 too. Here one 32-bit register holds the same plane of two neighbouring columns, so every
instruction makes two numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from qlinear.kernels.e4m3 import decode_planar_e4m3, decode_rows_e4m3


@triton.jit
def _plus(zero, BIAS: tl.constexpr, DT: tl.constexpr):
    """``zero + BIAS`` in DT; for a constant zero the compiler folds it."""
    return (tl.full((), BIAS, DT) + zero).to(DT)


@triton.jit
def _magic(field, zero, DT: tl.constexpr):
    """``field - zero`` for non-negative integers ``field``: below 1024 in fp16, 128 in bf16, 2**23 in fp32."""
    if DT == tl.float16:
        return (field | 0x6400).to(tl.int16).to(DT, bitcast=True) - _plus(zero, 1024.0, DT)
    elif DT == tl.bfloat16:
        return (field | 0x4300).to(tl.int16).to(DT, bitcast=True) - _plus(zero, 128.0, DT)
    else:
        return (field | 0x4B000000).to(DT, bitcast=True) - _plus(zero, 8388608.0, DT)


@triton.jit
def decode_planar4(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """int16 words of four nibbles -> four planes; a result is ``code - zeros[j]``, an integer in -15 .. 15."""
    if PTX and DT == tl.float16:
        # A nibble in the upper half of a byte reads as 1024 + 16 * code: one fused multiply-add puts it right,
        # where a shift would cost an instruction of its own.
        a, b, c, d = tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            shr.u32 t, $4, 8;
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
            lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA;
            lop3.b32 $3, t, 0x00F000F0, 0x64006400, 0xEA; }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return (
            a - _plus(zeros[0], 1024.0, DT),
            b * 0.0625 - _plus(zeros[1], 64.0, DT),
            c - _plus(zeros[2], 1024.0, DT),
            d * 0.0625 - _plus(zeros[3], 64.0, DT),
        )
    elif PTX and DT == tl.bfloat16:
        a, b, c, d = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v;
            shr.u32 t, $4, 4;
            shr.u32 u, $4, 8;
            shr.u32 v, $4, 12;
            lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $1, t, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $2, u, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 $3, v, 0x000F000F, 0x43004300, 0xEA; }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return (
            a - _plus(zeros[0], 128.0, DT),
            b - _plus(zeros[1], 128.0, DT),
            c - _plus(zeros[2], 128.0, DT),
            d - _plus(zeros[3], 128.0, DT),
        )
    else:
        wide = words.to(tl.int32)
        return (
            _magic(wide & 15, zeros[0], DT),
            _magic((wide >> 4) & 15, zeros[1], DT),
            _magic((wide >> 8) & 15, zeros[2], DT),
            _magic((wide >> 12) & 15, zeros[3], DT),
        )


@triton.jit
def decode_planar8(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """int16 words of two bytes -> two planes; the zero point is 128, a result is an integer in -128 .. 127.

    fp16: one byte permute writes 0x64 above two codes. bf16 has 7 bits for 8: with the code ``128*h + l`` the
    result is ``(128 + l) + (-128 if h else -256)``, and both terms are one three-input logic instruction: ``(code &
    0x7F) | 0x4300`` and ``(code & 0x80) ^ 0xC380``.
    """
    if PTX and DT == tl.float16:
        a, b = tl.inline_asm_elementwise(
            """{
            prmt.b32 $0, $2, 0x64646464, 0x4240;
            prmt.b32 $1, $2, 0x64646464, 0x4341; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
        return (a - _plus(zeros[0], 1024.0, DT), b - _plus(zeros[1], 1024.0, DT))
    elif PTX and DT == tl.bfloat16:
        low0, high0, low1, high1 = tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            shr.u32 t, $4, 8;
            lop3.b32 $0, $4, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 $1, $4, 0x00800080, 0xC380C380, 0x6A;
            lop3.b32 $2, t, 0x007F007F, 0x43004300, 0xEA;
            lop3.b32 $3, t, 0x00800080, 0xC380C380, 0x6A; }""",
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return (low0 + high0, low1 + high1)
    else:
        wide = words.to(tl.int32)
        low, high = wide & 255, (wide >> 8) & 255
        # Exact in bf16 as well: |code - 128| has 8 significant bits.
        return (_magic(low, zeros[0], tl.float32).to(DT), _magic(high, zeros[1], tl.float32).to(DT))


@triton.jit
def decode_rows8(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """int8 values in natural order: one plane, nothing to subtract."""
    return (words.to(DT),)


@triton.jit
def decode_nibbles8(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """Bytes of two signed nibbles -> two planes of int8 that hold 16 times the value, or the value in a float DT.

    A nibble in the upper half of a byte *is* 16 times its signed value, so eight numbers cost three instructions; what
    multiplies the sum divides by 16.
    """
    if DT != tl.int8:
        return (((words << 4) >> 4).to(DT), (words >> 4).to(DT))
    elif PTX:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return (words << 4, words & -16)


@triton.jit
def decode_rows16(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """16-bit floats in natural order: one plane, rounded to DT where that is the other kind."""
    return (words.to(tl.float32).to(DT) if words.dtype != DT else words,)


@dataclass(frozen=True)
class Decoder:
    """A decode function and what the loops must know of it."""

    function: Any
    #: Planes one block of 128 along K is stored in; a row of the block has ``128 // planes`` words.
    planes: int
    #: The dtype of a word.
    dtype: torch.dtype
    #: What the numbers of a plane count in, by their dtype, where that is not one: times this they are the values.
    units: Mapping[torch.dtype, float] = field(default_factory=dict)

    @property
    def words(self) -> int:
        return 128 // self.planes


#: By :attr:`qlinear.format.Format.packing`.
DECODERS = {
    "planar4": Decoder(decode_planar4, 4, torch.int16),
    "planar8": Decoder(decode_planar8, 2, torch.int16),
    "nibbles8": Decoder(decode_nibbles8, 2, torch.int8, {torch.int8: 1 / 16}),
    "rows8": Decoder(decode_rows8, 1, torch.int8),
    # A word is the bits of a float; the launcher says of which dtype.
    "rows16": Decoder(decode_rows16, 1, torch.int16),
    "planar_e4m3": Decoder(decode_planar_e4m3, 2, torch.int16, {torch.float16: 256.0}),
    "rows_e4m3": Decoder(decode_rows_e4m3, 1, torch.int8, {torch.float16: 256.0}),
}
