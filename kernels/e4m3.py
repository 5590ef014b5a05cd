# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: SIM300 - upper case names are constexprs, not constants
"""Decoders of weights stored as 8-bit floats (e4m3): see :mod:`qlinear.kernels.decode`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _e4m3(bits, DT: tl.constexpr):
    """The float whose e4m3 bits are the low byte of int32 ``bits``; in fp16 2**-8 of it (see :attr:`Decoder.units`)."""
    if DT == tl.float16:
        return (((bits << 7) & 0x3F80) | ((bits << 8) & 0x8000)).to(tl.int16).to(DT, bitcast=True)
    else:
        wide = ((bits & 0x7F) << 20) | ((bits & 0x80) << 24)
        # 2**120: the difference of the exponents' biases.
        return (wide.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DT)


@triton.jit
def decode_planar_e4m3(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """int16 words of two bytes of e4m3 bits -> two planes.

    A byte permute extends the sign of two bytes over 16 bits each, a shift and a mask put sign, exponent and mantissa
    in their places. What remains is the difference of the exponents' biases, which also makes numbers of what e4m3
    has below its normal range: 2**120 in bf16, multiplied in here (times it plus -0, which keeps every sign); 2**8 in
    fp16, left to what multiplies the sum.
    """
    if PTX and DT == tl.float16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u;
            prmt.b32 t, $2, 0, 0xA280;
            prmt.b32 u, $2, 0, 0xB391;
            shl.b32 t, t, 7;
            shl.b32 u, u, 7;
            and.b32 $0, t, 0xBF80BF80;
            and.b32 $1, u, 0xBF80BF80; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif PTX and DT == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 t, u, v, w;
            mov.b32 v, 0x7B807B80;
            mov.b32 w, 0x80008000;
            prmt.b32 t, $2, 0, 0xA280;
            prmt.b32 u, $2, 0, 0xB391;
            shl.b32 t, t, 4;
            shl.b32 u, u, 4;
            and.b32 t, t, 0x87F087F0;
            and.b32 u, u, 0x87F087F0;
            fma.rn.bf16x2 $0, t, v, w;
            fma.rn.bf16x2 $1, u, v, w; }""",
            "=r,=r,r",
            [words],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        wide = words.to(tl.int32)
        return (_e4m3(wide, DT), _e4m3(wide >> 8, DT))


@triton.jit
def decode_rows_e4m3(words, zeros, PTX: tl.constexpr, DT: tl.constexpr):
    """Bytes of e4m3 bits in natural order: one plane, as they are where products are of e4m3."""
    if DT == tl.float8e4nv:
        return (words.to(DT, bitcast=True),)
    elif PTX and DT == tl.float16:
        # As decode_planar_e4m3, for two neighbours a register.
        plane = tl.inline_asm_elementwise(
            """{ .reg .b32 t, u;
            prmt.b32 t, $2, 0, 0x9180;
            prmt.b32 u, $2, 0, 0xB3A2;
            shl.b32 t, t, 7;
            shl.b32 u, u, 7;
            and.b32 $0, t, 0xBF80BF80;
            and.b32 $1, u, 0xBF80BF80; }""",
            "=r,=r,r",
            [words],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return (plane,)
    else:
        return (_e4m3(words.to(tl.int32), DT),)
